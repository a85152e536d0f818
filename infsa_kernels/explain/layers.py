"""How a model's attention weights are got hold of: the calls of attention operators are observed while it runs.

Each family of models has its own projections, rotary embeddings, norms of queries, grouped keys and adapters; to compute q and k
from modules would be to write each of them a second time, and would go wrong without a word where they change. All of them end
in a call of one of four functions, whose arguments are what is attended with:

    torch.ops.infsa.pure, torch.ops.infsa.linear     q, k
    torch.ops.infsa.pooled_linear                    the tokens and the projections, which are applied here
    torch.nn.functional.scaled_dot_product_attention q, k
    torch.nn.functional.multi_head_attention_forward the same: nn.MultiheadAttention, one function to observers

A TorchFunctionMode sees them whoever makes them and under whatever name, and nn.MultiheadAttention takes no fast path inside one.
"""

import contextlib
import inspect
from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..eager.common import acc_dtype
from ..graph import TokenGraph
from ..ops.linear import linear
from ..ops.pooled_linear import pooled_linear
from ..ops.pure import pure
from .weights import Graph, LinearGraph, SoftmaxGraph


def attention_graphs(model: nn.Module, images: Tensor) -> list[Graph]:
    """What every attention layer of ``model`` does with ``images``, in the order in which they run.

    The model runs once, in evaluation mode and without gradients: up to its last tokens if it has a ``forward_features``, as
    InfViT and timm's models have, else as a whole.

    Returns:
        A graph a layer: a :class:`infsa_kernels.graph.TokenGraph` of Pure InfSA, a :class:`LinearGraph` or a
        :class:`SoftmaxGraph`, which share ``q``, ``k``, ``shape``, ``scores(tokens)``, ``matmul``, ``rmatmul``, ``row_sums()``
        and ``column_sums()``. Weights are those of the operator, before rho. Several hops in one layer are the graph that they
        walk on. Their memory is that of the layers' q and k.

    Raises:
        ValueError: no attention was seen. NotImplementedError: softmax with a mask, or with keys of its own; InfSA with another
        activation than ReLU.
    """
    return observe(model, images, None)


def observe(model: nn.Module, images: Tensor, layer: int | None) -> list[Graph]:
    """The graphs of all layers, or the one of a layer, whose q and k alone are then kept."""
    observer = _Observer(layer)
    run = getattr(model, "forward_features", model)
    # Compiled parts run as they were written: what is inside a compiled graph cannot be observed.
    with evaluating(model), torch.compiler.set_stance("force_eager"), observer:
        run(images)
    if not observer.count:
        raise ValueError(
            "explain: model made no call of InfSA, scaled_dot_product_attention or nn.MultiheadAttention, expected a "
            "model with attention; timm's needs fused attention (timm.layers.set_fused_attn), transformers' an "
            "attn_implementation='sdpa'"
        )
    if layer is not None:
        check_layer(layer, observer.count)
    found = observer.kept if layer is None else [observer.kept[0]]
    with torch.no_grad():
        return [make() for make in found]


def check_layer(layer: int, count: int) -> None:
    if not -count <= layer < count:
        raise ValueError(f"explain: layer is {layer}, expected {-count} to {count - 1}: {count} attention layers ran")


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was.items():
            module.training = training


class _Observer(TorchFunctionMode):
    """Keeps how to make the graph of each layer, or of one: the last -layer if it counts from the end."""

    def __init__(self, layer: int | None):
        super().__init__()
        self.layer, self.count, self.last = layer, 0, None
        self.kept: deque[Callable[[], Graph]] = deque(maxlen=-layer if layer is not None and layer < 0 else None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _GRAPH_OF:
            make, signature = _GRAPH_OF[func]
            given = _arguments(signature, args, kwargs)
            # Hops of one layer are products with one matrix. Its tensors are held, so that memory tells.
            this = make, given.get("q"), given.get("k")
            another = not _same_matrix(this, self.last)
            self.last = this
            if another:
                if self.layer is None or self.layer < 0 or self.layer == self.count:
                    self.kept.append(lambda: make(**given))
                self.count += 1
        return func(*args, **kwargs)


def _same_matrix(a, b) -> bool:
    if b is None or a[0] is not b[0] or a[1] is None:
        return False
    return all((t.data_ptr(), t.shape, t.stride()) == (u.data_ptr(), u.shape, u.stride()) for t, u in zip(a[1:], b[1:]))


def _arguments(signature: inspect.Signature, args, kwargs) -> dict:
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _pure(q, k, eps, key_padding_mask, query_padding_mask, activation, **_) -> TokenGraph:
    _demand_relu(activation)
    tied, q = k is q, _by_heads(q)
    k = q if tied else _by_heads(k)
    return TokenGraph(q, k, key_padding_mask=key_padding_mask, query_padding_mask=query_padding_mask, eps=eps)


def _linear(q, k, eps, key_padding_mask, query_padding_mask, score_floor, activation, **_) -> LinearGraph:
    _demand_relu(activation)
    tied, q = k is q, _by_heads(q)
    return LinearGraph(q, q if tied else _by_heads(k), key_padding_mask, query_padding_mask, eps, score_floor)


def _pooled_linear(
    x,
    num_heads,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    eps,
    norm_weight,
    norm_bias,
    norm_eps,
    padding_mask,
    score_floor,
    **_,
) -> LinearGraph:
    x, norm_weight, norm_bias = (None if t is None else t.to(acc_dtype(x)) for t in (x, norm_weight, norm_bias))
    x = x if norm_eps is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, norm_eps)
    q = _heads(x, q_weight, q_bias, num_heads)
    k = q if k_weight is None else _heads(x, k_weight, k_bias, num_heads)
    return LinearGraph(q, k, padding_mask, padding_mask, eps, score_floor)


def _demand_relu(activation: str) -> None:
    if activation != "relu":
        raise NotImplementedError(
            f"explain: the model has InfSA with activation {activation!r}, expected 'relu': maps and graphs are of its scores"
        )


def _softmax(query, key, attn_mask, is_causal, scale, **_) -> SoftmaxGraph:
    if attn_mask is not None or is_causal:
        raise NotImplementedError(
            "explain: the model gives scaled_dot_product_attention a mask, expected none: maps are of whole pictures"
        )
    query, key = _by_heads(query), _by_heads(key)
    # Grouped keys: each serves as many query heads.
    return SoftmaxGraph(query, key.repeat_interleave(query.shape[1] // key.shape[1], dim=1), scale)


def _multihead(query, key, num_heads, in_proj_weight, in_proj_bias, q_proj_weight, k_proj_weight, bias_k, add_zero_attn,
               attn_mask, key_padding_mask, use_separate_proj_weight, **_) -> SoftmaxGraph:  # fmt: skip
    for name, given in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask), ("bias_k", bias_k),
                        ("add_zero_attn", add_zero_attn or None)):  # fmt: skip
        if given is not None:
            raise NotImplementedError(
                f"explain: an nn.MultiheadAttention of the model has a {name}, expected none: maps are of whole pictures"
            )
    biases = [None] * 2 if in_proj_bias is None else in_proj_bias.chunk(3)
    weights = (q_proj_weight, k_proj_weight) if use_separate_proj_weight else in_proj_weight.chunk(3)
    tokens_first = (query.transpose(0, 1), key.transpose(0, 1))  # (B, N, D)
    return SoftmaxGraph(*(_heads(x, w, b, num_heads) for x, w, b in zip(tokens_first, weights, biases)))


def _by_heads(t: Tensor) -> Tensor:
    """(B, N, d), tokens without heads, as (B, 1, N, d)."""
    return t.unsqueeze(1) if t.dim() == 3 else t


def _heads(x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    """A projection of x (B, N, D), by heads: (B, H, N, d)."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight.to(x.dtype), bias).unflatten(-1, (num_heads, -1)).transpose(1, 2)


_SDPA = inspect.signature(
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False: None
)
_GRAPH_OF = {
    F.scaled_dot_product_attention: (_softmax, _SDPA),
    F.multi_head_attention_forward: (_multihead, inspect.signature(F.multi_head_attention_forward)),
}
for make, operator in ((_pure, pure), (_linear, linear), (_pooled_linear, pooled_linear)):
    for op in operator.overloads:
        _GRAPH_OF[op] = make, inspect.signature(operator.composite)
