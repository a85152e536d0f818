"""A layer of Linear-InfSA as two sums over tokens that are never all there.

    E = sum_i e_i,  sum_i e_i u_i          ->  the central query, and one key of width D per head
    R = sum_j r_j,  sum_j r_j x^_j         ->  the row that the attention adds to every token

and with a floor sum_j |t_j|, sum_j x^_j and the number of tokens beside the second (docs/linear.md).

Each chunk of tokens gives its part, by the two raw operators of the pooled layer (docs/pooled_linear.md); the parts are summed in
float64, in the order of the chunks.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..eager.common import acc_dtype
from ..nn.attention import InfSAAttention
from ..nn.plain import has_forward, is_plain
from ..nn.vit import Block, InfViT
from ..ops import central_query, linear_steps, score_pool, score_pool_floor
from ..ops.backends import choose_backend, takes_backend
from ..ops.pooled_linear import Projection, keys_of, output_of


class Attention:
    """The attention of one block of an InfViT, a chunk of tokens (n, D) at a time."""

    def __init__(self, block: Block):
        attn, norm = block.attn, block.norm1
        self.attn, self.eps, self.norm_eps = attn, attn.eps, norm.eps
        self.norm = attn.num_heads, norm.weight, norm.bias
        queries, keys = attn.q_proj, attn.q_proj if attn.tied else attn.k_proj
        projection = Projection.of(queries.weight, queries.bias, *self.norm)
        self.weight, self.bias = projection.whole().to(queries.weight.dtype), projection.bias
        self.key_projection = Projection.of(keys.weight, keys.bias, *self.norm)
        self.score_floor, H, D = attn.score_floor, attn.num_heads, attn.embed_dim
        self.score_shapes = [(1, H, 2 * D + 3)] if self.score_floor else [(H, D), (H,)]

    def query_sums(self, x: Tensor) -> list[Tensor]:
        """sum e u, (H, d), and sum e, (H,)."""
        op = self._op(central_query, x)
        mean, energy = op(x[None], self.weight, self.bias, self.norm_eps, self.eps, None)
        energy = energy[0].double()
        return [mean[0].double() * (energy + self.eps)[:, None], energy]

    def set_queries(self, sums: list[Tensor]) -> None:
        """The sums over all tokens: now scores can be computed."""
        central = (sums[0] / (sums[1] + self.eps)[:, None]).to(acc_dtype(self.weight))
        self.keys, self.shift = keys_of(central[None], self.key_projection)

    def score_sums(self, x: Tensor) -> list[Tensor]:
        """sum r x^, (H, D), and sum r, (H,); with a floor these and more as linear_steps.floored_mean takes them."""
        if self.score_floor:
            forward, given = self._op(score_pool_floor, x), (self.keys, self.shift, self.norm_eps, self.eps)
            return [score_pool_floor.sums_of_part(forward, x[None], *given)]
        mean, _, total = self._op(score_pool, x)(x[None], self.keys, self.shift, self.norm_eps, self.eps, None)
        total = total[0].double()
        return [mean[0].double() * (total + self.eps)[:, None], total]

    def set_scores(self, sums: list[Tensor]) -> Tensor:
        """The sums over all tokens: the row (1, D) that the layer adds to each, in the dtype of the model."""
        acc, attn = self.keys.dtype, self.attn
        if self.score_floor:
            pooled, (scores, absolute, _, count) = linear_steps.floored_mean(
                sums[0], self.score_floor, self.eps, acc
            )  # fmt: skip
            floor = self.score_floor * absolute[0]
            pooled, total, self.floor = pooled[0], scores[0] + floor, (floor / count[0]).to(acc)
        else:
            total, self.floor = sums[1], 0
            pooled = (sums[0] / (total + self.eps)[:, None]).to(acc)
        self.total, mass = (total + self.eps).to(acc), (total / (total + self.eps)).to(acc)
        values = Projection.of(attn.v_proj.weight, attn.v_proj.bias, *self.norm)
        row = output_of(pooled[None], mass[None], values, attn.rho, attn.out_proj.weight, attn.out_proj.bias)
        return row.to(attn.q_proj.weight.dtype)

    def weights(self, x: Tensor) -> Tensor:
        """What the layer looks at: the weight of each token, the mean over the heads, (n,)."""
        x = F.layer_norm(x.to(self.keys.dtype), x.shape[-1:], eps=self.norm_eps)
        scores = x @ self.keys[0].mT
        scores = torch.relu(scores if self.shift is None else scores + self.shift)
        return ((scores + self.floor) / self.total).mean(-1)

    def _op(self, half, x: Tensor):
        shape = 1, self.attn.num_heads, len(x), self.attn.head_dim
        # As a public operator's call: `with infsa_kernels.backend(...)` sees it.
        ask = functools.partial(handle_torch_function, _backend, (x,)) if has_torch_function((x,)) else _backend
        return half.raw.forwards[ask(x, shape)]


def _backend(x: Tensor, shape: tuple[int, int, int, int], backend: str = "") -> str:
    return choose_backend("pooled_linear", x.device, x.dtype, shape, backend)


takes_backend[_backend] = 2


def check_model(model: nn.Module) -> None:
    """NotImplementedError for a model whose tokens cannot go through it chunk by chunk, and for calls that would not be made."""
    if not isinstance(model, InfViT) or not has_forward(model, InfViT.forward):
        raise NotImplementedError(
            f"predict_file: model is {type(model).__name__}, expected an InfViT whose forward is its own"
        )
    if model.variant != "linear_infsa":
        raise NotImplementedError(
            f"predict_file: variant is {model.variant!r}, expected 'linear_infsa': every token of the others has scores with "
            "all tokens, which would be read once for each chunk; call the model on a picture that fits"
        )
    if model.sequence_group is not None:
        raise NotImplementedError(
            "predict_file: model was parallelized, expected one that was not; give predict_file(group=...), whose processes each "
            "read rows of their own"
        )
    for block in model.blocks:
        if block.attn.activation != "relu":
            raise NotImplementedError(
                f"predict_file: activation is {block.attn.activation!r}, expected 'relu', the only one that the passes have; "
                "call the model on a picture that fits"
            )
    if torch.is_autocast_enabled(model.patch_embed.weight.device.type):
        raise NotImplementedError("predict_file: autocast is on, expected a model in one dtype; give model.bfloat16()")
    for name, module in model.named_modules():
        # These are not called as a whole, or not at all.
        whole = name == "" or isinstance(module, (Block, InfSAAttention))
        if whole and (module._forward_hooks or module._forward_pre_hooks):
            raise NotImplementedError(f"predict_file: model.{name} has a hook, which would never be called; remove it")
        parts = {"norm1": nn.LayerNorm} if isinstance(module, Block) else {}
        if isinstance(module, InfSAAttention):
            parts = dict.fromkeys(("q_proj", "v_proj", "out_proj") + ("k_proj",) * (not module.tied), nn.Linear)
        for part, kind in parts.items():
            child = getattr(module, part)
            if not is_plain(child, kind, model.patch_embed.weight.device):
                raise NotImplementedError(
                    f"predict_file: model.{name}.{part} is {type(child).__name__}, with a hook, an adapter or weights of its "
                    f"own kind, expected a plain nn.{kind.__name__}: its weights are read as data; merge or remove what was added"
                )
