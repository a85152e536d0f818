"""`infsa::linear_varlen` and `infsa::pure_varlen`: both operators on sequences packed one behind another, without padding.

    sequence s:  q[cu_q[s] : cu_q[s + 1]],  k[cu_k[s] : cu_k[s + 1]],  v[cu_k[s] : cu_k[s + 1]]          q (N, H, d)

Each is a call of the dense operator, linear.py's or pure.py's; N and M are the tokens of all S sequences. Where the sequences
begin are values: they are checked where they can be read without waiting for a GPU. docs/varlen.md says more.
"""

import torch
from torch import Tensor

from .. import reference
from ..eager import varlen as eager
from ..eager.common import acc_dtype
from . import backends, check, qkv
from .autograd import skipped_if_unused
from .backends import backend_of_backward, choose_backend
from .register import RawOps, overridable, public


@overridable
def linear_infsa_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
    *,
    score_floor: float = 0.0,
) -> Tensor:
    """Linear-InfSA of packed sequences: every query gets the pooled context of its own sequence. O(N) time.

    The first seven arguments are those of ``torch.nn.attention.varlen.varlen_attn``, in its order.

    Args:
        q: queries (N, H, d), all sequences one behind another; float32, bfloat16, float16 or float64. Any strides.
        k: keys (M, H, d). Pass the same objects as ``q`` and ``cu_seqlens_q`` for the paper's tied (symmetric) operator.
        v: values (M, H, dv).
        cu_seqlens_q: (S + 1,) int32 or int64, on the device of ``q``: 0, then where each of the S sequences ends; the last is N.
            Sequences may be empty.
        cu_seqlens_k: the same for the keys; the last is M.
        max_q, max_k: at least the length of the longest sequence of queries, and of keys.
        rho: output scale, a number or a tensor of shape (), (1,) or (H,), which gets its gradient.
        eps: added to both sums before they divide; above 0.
        score_floor: as in :func:`linear_infsa`, of the mean absolute score of each sequence.

    Returns:
        (N, H, dv) in the dtype of ``q``. ``torch.ops.infsa.linear_varlen`` returns the S contexts (S, H, dv) that its rows are.

    Raises:
        ValueError: a wrong shape, device, eps, rho or score_floor; offsets that are wrong, where they are on the CPU. TypeError:
            a wrong dtype or layout.

    Example::

        >>> q, cu_seqlens = torch.randn(7, 16, 64), torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> linear_infsa_varlen(q, q, q, cu_seqlens, cu_seqlens, 4, 4).shape
        torch.Size([7, 16, 64])
    """
    context = linear_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, score_floor=score_floor)
    # Its gradient is a sum over the tokens of a sequence: in the dtype of sums.
    rows = context.to(acc_dtype(q)).index_select(0, eager.sequence_of_token(cu_seqlens_q, q.shape[0]))
    return rows.to(q.dtype)


@overridable
def pure_infsa_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    rho: float | Tensor = 0.95,
    eps: float = 1e-6,
) -> Tensor:
    """Pure InfSA of packed sequences: queries meet the keys of their own sequence, which has a Frobenius norm of its own.

    O(sum_s N_s M_s) time, O(N + M) memory. Arguments and errors as :func:`linear_infsa_varlen`; ``eps`` is added to the norm.

    Returns:
        (N, H, dv) in the dtype of ``q``, contiguous.

    Example::

        >>> q, cu_seqlens = torch.randn(7, 16, 64), torch.tensor([0, 3, 7], dtype=torch.int32)
        >>> pure_infsa_varlen(q, q, q, cu_seqlens, cu_seqlens, 4, 4).shape
        torch.Size([7, 16, 64])
    """
    return pure_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho)


PACKED = {
    "q": "(N, H, d)",
    "k": "(M, H, d)",
    "v": "(M, H, dv)",
    "cu_seqlens_q": "(S+1) index",
    "cu_seqlens_k": "(S+1) index",
    "head_rho": "(S, H) acc",
    "dhead_rho": "(S, H) acc",
}
LINEAR = PACKED | {
    "out": "(S, H, dv)",
    "context": "(S, H, dv) acc",
    "central_query": "(S, H, d) acc",
    "energy_sum": "(S, H) acc",
    "score_sum": "(S, H) acc",
    "absolute_sum": "(S, H) acc",
    "value_mean": "(S, H, dv) acc",
}
PURE = PACKED | {"out": "(N, H, dv)", "norm": "(S, H) acc"}

# Where k is absent, keys are the queries, and cu_seqlens_k is absent too.
SEQUENCES = "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_q, SymInt max_k"
STAND_INS = {"k": "q", "cu_seqlens_k": "cu_seqlens_q"}


def _more(op: str, given: dict) -> None:
    """What is demanded of the offsets, of their values where these are at hand."""
    if given["k"] is None and given["cu_seqlens_k"] is not None:
        raise ValueError(f"{op}: cu_seqlens_k is given though k is absent, expected None: the keys are those of q")
    for side, tokens in (("q", given["q"]), ("k", given["v"])):
        name, longest = f"cu_seqlens_{side}", given[f"max_{side}"]
        cu_seqlens = given["cu_seqlens_q"] if given[name] is None else given[name]
        check.offsets(op, name, cu_seqlens, tokens.shape[0], "q" if side == "q" else "k", f"max_{side}", longest)


def _counts(given: dict) -> dict[str, int]:
    """Scores of all sequences; where no values are at hand, what they would be if all were the longest."""
    queries, keys = (
        check.lengths(given[f"cu_seqlens_{side}"], given[f"max_{side}"])
        for side in ("q", "q" if given["cu_seqlens_k"] is None else "k")
    )
    return {"scores": sum(n * m for n, m in zip(queries, keys))}


def _formula(dense, per_token: bool):
    """A raw operator's output by the dense reference, on a padded batch: no value is read, so that it can be traced."""

    def evaluate(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, *more):
        *floor, rho, head_rho = more
        acc = acc_dtype(q)
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        rho = rho if head_rho is None else rho * head_rho
        queries, query_padding = eager.padded(q.to(acc), cu_seqlens_q, max_q)
        keys, key_padding = (queries, query_padding) if k is None else eager.padded(k.to(acc), cu_seqlens_k, max_k)
        values, _ = eager.padded(v.to(acc), cu_seqlens_k, max_q if k is None else max_k)
        out = dense(queries, keys, values, rho, eps, key_padding, query_padding, *floor).to(q.dtype)
        if not per_token:
            return (out,)
        sequence = eager.sequence_of_token(cu_seqlens_q, q.shape[0])
        position = torch.arange(q.shape[0], device=q.device) - cu_seqlens_q[sequence]
        return (out[sequence, :, position],)

    return evaluate


raw_linear = RawOps(
    forward=f"linear_varlen_fwd(Tensor q, Tensor? k, Tensor v, {SEQUENCES}, float eps, float rho, Tensor? head_rho) -> "
    "(Tensor out, Tensor context, Tensor central_query, Tensor energy_sum, Tensor score_sum)",
    backward="linear_varlen_bwd(Tensor dout, Tensor q, Tensor? k, Tensor v, Tensor context, Tensor central_query, "
    f"Tensor energy_sum, Tensor score_sum, {SEQUENCES}, float eps, float rho, Tensor? head_rho, bool[4] output_mask) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dhead_rho)",
    tensors=LINEAR,
    stand_ins=STAND_INS,
    more=_more,
    kernels={
        "cpu": "csrc/cpu/linear.cpp",
        "triton": ".triton.linear_varlen",
        "eager": eager.linear,
    },
    formula=_formula(reference.linear, per_token=False),
    flops_forward=lambda N, M, H, d, dv, **_: H * (4 * N * d + 2 * M * d + 2 * M * dv),
    flops_backward=lambda N, M, H, d, dv, **_: H * (8 * N * d + 5 * M * d + 3 * M * dv),
)

# Where score_floor is above 0, as linear_floor.py beside linear.py.
raw_linear_floor = RawOps(
    forward=f"linear_varlen_floor_fwd(Tensor q, Tensor? k, Tensor v, {SEQUENCES}, float eps, float score_floor, float rho, "
    "Tensor? head_rho) -> (Tensor out, Tensor context, Tensor central_query, Tensor energy_sum, Tensor score_sum, "
    "Tensor absolute_sum, Tensor value_mean)",
    backward="linear_varlen_floor_bwd(Tensor dout, Tensor q, Tensor? k, Tensor v, Tensor context, Tensor central_query, "
    f"Tensor energy_sum, Tensor score_sum, Tensor absolute_sum, Tensor value_mean, {SEQUENCES}, float eps, float score_floor, "
    "float rho, Tensor? head_rho, bool[4] output_mask) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dhead_rho)",
    tensors=LINEAR,
    stand_ins=STAND_INS,
    more=_more,
    kernels={
        "cpu": "csrc/cpu/linear.cpp",
        "triton": ".triton.linear_varlen_floor",
        "eager": eager.linear_floor,
    },
    formula=_formula(reference.linear, per_token=False),
    flops_forward=lambda N, M, H, d, dv, **_: H * (4 * N * d + 2 * M * d + 3 * M * dv),
    flops_backward=lambda N, M, H, d, dv, **_: H * (8 * N * d + 5 * M * d + 3 * M * dv),
)
backends.OPERATORS[raw_linear_floor.name] = frozenset(raw_linear_floor.kernels)

raw_pure = RawOps(
    forward=f"pure_varlen_fwd(Tensor q, Tensor? k, Tensor v, {SEQUENCES}, float eps, float rho, Tensor? head_rho) -> "
    "(Tensor out, Tensor norm)",
    backward="pure_varlen_bwd(Tensor dout, Tensor q, Tensor? k, Tensor v, Tensor out, Tensor norm, "
    f"{SEQUENCES}, float eps, float rho, Tensor? head_rho, bool[4] output_mask) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dhead_rho)",
    tensors=PURE,
    stand_ins=STAND_INS,
    more=_more,
    kernels={
        "cpu": "csrc/cpu/pure.cpp",
        "triton": ".triton.pure_varlen",
        "eager": eager.pure,
    },
    formula=_formula(reference.pure, per_token=True),
    flops_forward=lambda scores, H, d, dv, **_: 2 * H * scores * (d + dv),
    flops_backward=lambda scores, H, d, dv, **_: H * scores * (6 * d + 4 * dv),
    counts=_counts,
)

ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_q, SymInt max_k"


@public(
    f"linear_varlen({ARGUMENTS}, float eps=1e-6, Tensor? rho=None, str backend='', float score_floor=0.0) -> Tensor",
    LINEAR, raw=[raw_linear], cast=qkv.cast,
)  # fmt: skip
def linear_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps=1e-6, rho=None, backend="", score_floor=0.0
):  # fmt: skip
    """`torch.ops.infsa.linear_varlen`: the contexts (S, H, dv)."""
    raw, *floor = (raw_linear,) if score_floor == 0 else (raw_linear_floor, score_floor)
    return _attend(raw, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, backend, *floor)


@public(
    f"pure_varlen({ARGUMENTS}, float eps=1e-6, Tensor? rho=None, str backend='') -> Tensor",
    PURE, raw=[raw_pure], cast=qkv.cast,
)  # fmt: skip
def pure_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps=1e-6, rho=None, backend=""):
    """`torch.ops.infsa.pure_varlen`: the output (N, H, dv)."""
    return _attend(raw_pure, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, backend)


def _attend(raw, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, backend, *more) -> Tensor:
    """more: numbers that the raw operator takes after eps."""
    given = raw, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, *more
    if any(t is None for t in given[1:6]):
        _demand(*given)
    try:
        tied = k is q and cu_seqlens_k is cu_seqlens_q
        rho, head_rho = _split(raw.op, rho, q, cu_seqlens_q)
        name = choose_backend(raw.name, q.device, q.dtype, q.shape, backend or backend_of_backward())
        forward, k, cu_seqlens_k = raw.forwards[name], *((None, None) if tied else (k, cu_seqlens_k))
        with skipped_if_unused(q, k, v, head_rho):
            return forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, *more, rho, head_rho)[0]
    except Exception:
        check.in_words(_demand, *given)
        raise


def _demand(raw, q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, rho, *more) -> None:
    for name, t in (("q", q), ("k", k), ("v", v), ("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check.dense(raw.op, name, t)
    number = 1.0 if rho is None or isinstance(rho, Tensor) else rho
    raw.forward.check((q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, eps, *more, number, None))
    _split(raw.op, rho, q, cu_seqlens_q)


def _split(op, rho, q, cu_seqlens_q) -> tuple[float, Tensor | None]:
    """rho as a number times a (S, H) tensor of the dtype of sums, through which its gradient flows."""
    if not isinstance(rho, Tensor):
        return 1.0 if rho is None else rho, None
    check.rho_tensor(op, rho, q, q.shape[1], "(H,)")
    return 1.0, rho.to(acc_dtype(q)).expand(cu_seqlens_q.shape[0] - 1, q.shape[1])
