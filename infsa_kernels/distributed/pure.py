"""Pure InfSA of a sequence that lies on several ranks: a ring of keys and values, or whole sequences of some heads."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ..eager.common import acc_dtype
from ..eager.pure import FEW_SCORES, output_like
from ..ops import backends, check, pure_blocks, qkv
from ..ops import pure as dense
from ..ops.autograd import no_derivative, without_autocast
from ..ops.extension import torch_ops
from ..ops.register import library, public
from ..torch_private import process_group
from . import heads, ring
from .collectives import Group, gather_numbers, name_of

METHODS = ("ring", "all_to_all")


def pure_infsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    *,
    group: Group = None,
    method: str | None = None,
) -> Tensor:
    """:func:`infsa_kernels.pure_infsa` of a sequence whose tokens are sharded over the ranks of a group.

    Every rank of the group has to make the call, with its own tokens and equal B, H, d, dv and dtype. Shards may differ in length
    and be empty.

    Args:
        q, k, v, key_padding_mask, query_padding_mask: this rank's tokens, in the shapes of the dense operator. A mask that one
            rank gives, all give.
        rho, eps: the same on every rank.
        group: a process group, a one-dimensional DeviceMesh as ``mesh["sequence"]``, or None for all ranks.
        method: "all_to_all": every rank gets the whole sequence of its share of the heads. "ring": keys and values travel while
            every rank keeps its queries. None: all_to_all where the ranks divide the heads, or there are hardly any scores; ring
            elsewhere.

    Returns:
        (B, H, N, dv) for this rank's N queries.

    Gradients are those of the sum of the losses of all ranks; that of ``rho`` is this rank's share.

    Raises:
        ValueError, TypeError: as the dense operator; no process group; calls of the ranks that do not fit together.
        RuntimeError: a rank was lost.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"infsa::pure: method is {method!r}, expected None, {' or '.join(map(repr, METHODS))}")
    name = name_of("infsa::pure", group)
    return sharded_pure(q, k, v, eps, rho, key_padding_mask, query_padding_mask, name, method or "")


@public(
    "sharded_pure(Tensor q, Tensor k, Tensor v, float eps=1e-6, Tensor? rho=None, Tensor? key_padding_mask=None, "
    "Tensor? query_padding_mask=None, str group='', str method='', str backend='') -> Tensor",
    dense.TENSORS,
    raw=[pure_blocks],
    cast=qkv.cast,
)
def sharded_pure(q, k, v, eps, rho, key_padding_mask, query_padding_mask, group, method="", backend=""):
    """`torch.ops.infsa.sharded_pure`: this rank's rows of the output."""
    qkv.demand(dense.raw, q, k, v, eps, rho, key_padding_mask, query_padding_mask)
    tied, unbatched = k is q, q.dim() == 3
    if unbatched:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    rho, head_rho = qkv.split_rho(dense.raw.op, rho, q, unbatched)
    backend = backends.choose_backend(
        "pure_blocks", q.device, q.dtype, q.shape, backend or backends.backend_of_backward()
    )
    out = _Rows.apply(
        q, None if tied else k, v, head_rho, key_padding_mask, query_padding_mask, eps, rho, group, method, backend
    )  # fmt: skip
    return out.squeeze(1) if unbatched else out


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, head_rho, key_padding_mask, query_padding_mask, eps, rho, group, method, backend):
        ctx.constants = eps, rho, group, method, backend
        masks = key_padding_mask, query_padding_mask
        out, norm = torch_ops.sharded_pure_fwd(q, k, v, eps, rho, head_rho, *masks, group, method, backend)
        ctx.save_for_backward(q, k, v, head_rho, *masks, out, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, head_rho, *masks, out, norm = ctx.saved_tensors
        eps, rho, *where = ctx.constants
        wanted = list(ctx.needs_input_grad[:4])
        gradients = torch_ops.sharded_pure_bwd(
            dout, q, k, v, out, norm, eps, rho, head_rho, *masks, *where, wanted
        )  # fmt: skip
        return *(t if want else None for t, want in zip(gradients, wanted)), *[None] * 7


class Whole(NamedTuple):
    """The sequence as all ranks have it."""

    queries: list[int]
    keys: list[int]

    @classmethod
    def of(cls, group: str, q: Tensor, v: Tensor, masks) -> "Whole":
        """Asks every rank. ValueError, on all of them, where their calls do not fit together."""
        names = "B", "H", "d", "dv", "the dtype", "whether there is a key_padding_mask", "a query_padding_mask"
        B, H, N, d = q.shape
        M, dv = v.shape[2:]
        mine = [N, M, B, H, d, dv, check.DTYPES.index(q.dtype), *(mask is not None for mask in masks)]
        everyones = gather_numbers(mine, group, q.device)
        for name, values in zip(names, zip(*(numbers[2:] for numbers in everyones))):
            if len(set(values)) > 1:
                values = [str(check.DTYPES[i]) for i in values] if name == "the dtype" else list(values)
                raise ValueError(
                    f"infsa::pure: {name} differs between the ranks of the group, {values}, expected the same; only the number "
                    "of tokens may differ"
                )
        return cls([numbers[0] for numbers in everyones], [numbers[1] for numbers in everyones])


def chosen(method: str, whole: Whole, H: int) -> str:
    """ "all_to_all" sends less, keeps the dense operator's own arithmetic and has a balanced load where ranks divide heads."""
    few = sum(whole.queries) * sum(whole.keys) <= FEW_SCORES
    return method or ("all_to_all" if few or H % len(whole.keys) == 0 else "ring")


class _DenseOps(NamedTuple):
    forward: object
    backward: object


def _parts(group, method, backend, q, v, masks):
    """The module that runs a call, what it runs blocks with, and what it knows of the other ranks."""
    whole, H = Whole.of(group, q, v, masks), q.shape[1]
    if chosen(method, whole, H) == "ring":
        return ring, pure_blocks.choose_blocks(q, backend), ring.Ring(group, whole.keys)
    suffix = backends.SUFFIXES[backend]
    ops = _DenseOps(*(getattr(torch_ops, f"pure_{way}{suffix}").default for way in ("fwd", "bwd")))
    return heads, ops, heads.Heads(group, whole.queries, whole.keys, H)


def _forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask, group, method, backend):
    masks = key_padding_mask, query_padding_mask
    how, ops, others = _parts(group, method, backend, q, v, masks)
    out, norm = how.forward(ops, q, k, v, eps, rho, head_rho, *masks, others)
    return output_like(q, v).copy_(out), norm


def _backward(
    dout, q, k, v, out, norm, eps, rho, head_rho, key_padding_mask, query_padding_mask, group, method, backend, wanted
):  # fmt: skip
    masks = key_padding_mask, query_padding_mask
    how, ops, others = _parts(group, method, backend, q, v, masks)
    wanted = [want and t is not None for want, t in zip(wanted, (q, k, v, head_rho))]
    found = how.backward(ops, dout, q, k, v, out, norm, eps, rho, head_rho, *masks, others, wanted)
    gradients = _fake_backward(
        dout, q, k, v, out, norm, eps, rho, head_rho, *masks, group, method, backend, wanted
    )  # fmt: skip
    return tuple(to.copy_(t) if want else to for to, t, want in zip(gradients, found, wanted))


def _fake_forward(q, k, v, *more):
    return output_like(q, v), q.new_empty(q.shape[:2], dtype=acc_dtype(q))


def _fake_backward(dout, q, k, v, out, norm, eps, rho, head_rho, *more):
    inputs = q, k, v, head_rho
    return tuple(
        q.new_empty(0)
        if not want or t is None
        else norm.new_empty(norm.shape)
        if t is head_rho
        else torch.empty_like(t)
        for t, want in zip(inputs, more[-1])
    )


def _flops(per_score, first, group_at):
    """Of this rank's share, as if all ranks had as many tokens."""

    def formula(*args, out_shape=None, **kwargs):
        (B, H, N, d), (_, _, M, dv) = args[first], args[first + 2]
        return B * H * N * M * dist.get_world_size(process_group(args[group_at])) * per_score(d, dv)

    return formula


for _name, _schema, _kernel, _fake, _formula in (
    (
        "sharded_pure_fwd",
        "(Tensor q, Tensor? k, Tensor v, float eps, float rho, Tensor? head_rho, Tensor? key_padding_mask, "
        "Tensor? query_padding_mask, str group, str method, str backend) -> (Tensor out, Tensor norm)",
        _forward,
        _fake_forward,
        _flops(lambda d, dv: 2 * d + 2 * dv, 0, 8),
    ),
    (
        "sharded_pure_bwd",
        "(Tensor dout, Tensor q, Tensor? k, Tensor v, Tensor out, Tensor norm, float eps, float rho, Tensor? head_rho, "
        "Tensor? key_padding_mask, Tensor? query_padding_mask, str group, str method, str backend, bool[4] output_mask) -> "
        "(Tensor dq, Tensor dk, Tensor dv, Tensor dhead_rho)",
        _backward,
        _fake_backward,
        _flops(lambda d, dv: 6 * d + 4 * dv, 1, 11),
    ),
):
    library.define(_name + _schema)
    _op = getattr(torch_ops, _name).default
    torch.library.register_fake(_op.name(), _fake, lib=library)
    register_flop_formula(_op.overloadpacket)(_formula)
    library.impl(_op, without_autocast(_kernel), "CompositeExplicitAutograd")
    _signature = check.Signature(_name + _schema, dense.TENSORS, {"k": "q"})
    library.impl(_op, no_derivative(_op, _signature, "infsa::sharded_pure has one"), "Autograd", with_keyset=True)
