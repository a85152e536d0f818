"""What linear and pure share: q, k and v of three dimensions or four, k that is q, and rho as a number or per head."""

import functools

from torch import Tensor

from ..eager.common import acc_dtype
from . import check, launch_bound, sharding
from .autograd import skipped_if_unused
from .backends import backend_of_backward, choose_backend, force


def attend(raw, q, k, v, eps, rho, key_padding_mask, query_padding_mask, backend, *more) -> Tensor:
    """The output of a raw operator (register.RawOps), linear's or pure's, on the backend of choice.

    Args:
        more: numbers that the raw operator takes after eps.
    """
    given = raw, q, k, v, eps, rho, key_padding_mask, query_padding_mask, *more
    if q is None or k is None or v is None:
        demand(*given)
    if sharding.over_sequence(q.dim() - 2, q, k, v):
        demand(*given)
        from ..distributed import dtensor

        return dtensor.attend(raw.op.removeprefix("infsa::"), *given[1:8], backend, *more)
    try:
        tied, unbatched = k is q, q.dim() == k.dim() == v.dim() == 3
        if unbatched:
            q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
        rho, head_rho = split_rho(raw.op, rho, q, unbatched)
        backend = backend or backend_of_backward()
        if not backend and q.is_cuda and launch_bound.takes(raw, q, k, v, key_padding_mask, query_padding_mask):
            name = "cuda"
        else:
            name = choose_backend(raw.name, q.device, q.dtype, q.shape, backend)
        forward, k = raw.forwards[name], None if tied else k
        with skipped_if_unused(q, k, v, head_rho):
            # Goes on where ``kernels`` says for this backend, in the file of the operator.
            out = forward(q, k, v, eps, *more, rho, head_rho, key_padding_mask, query_padding_mask)[0]
    except Exception:
        check.in_words(demand, *given)
        raise
    return out.squeeze(1) if unbatched else out


def attend_in_torch(
    raw, reference, q, k, v, eps, rho, key_padding_mask, query_padding_mask, backend, activation, **more
) -> Tensor:
    """The same by ``reference``, for activations that no kernel has: torch differentiates it, and holds what it holds."""
    check.activation(raw.op, activation)
    masks = key_padding_mask, query_padding_mask
    demand(raw, q, k, v, eps, rho, *masks, *more.values())
    force(raw.name, backend or "eager", q.device, q.dtype, q.shape, activation)
    acc = acc_dtype(q)
    return reference(q.to(acc), k.to(acc), v.to(acc), rho, eps, *masks, activation=activation, **more).to(q.dtype)


def statistics(raw, q, k, v, eps, key_padding_mask=None, query_padding_mask=None) -> tuple[Tensor, ...]:
    """What forward keeps beside its output, of 4-D arguments that were checked. They have no gradient."""
    name = choose_backend(raw.name, q.device, q.dtype, q.shape, backend_of_backward())
    return raw.forwards[name](q, None if k is q else k, v, eps, 1.0, None, key_padding_mask, query_padding_mask)[1:]


def demand_of_scores(public, raw, q, k, rho, eps, key_padding_mask, query_padding_mask, *, activation="relu", **more):
    """What an operator demands, for its scores, which have no v."""
    by_name = more | {"activation": activation}
    public.signature.types((q, k, k, eps, rho, key_padding_mask, query_padding_mask), by_name)
    check.activation(raw.op, activation)
    demand(raw, q, k, k, eps, rho, key_padding_mask, query_padding_mask, *more.values())


def demand(raw, q, k, v, eps, rho, key_padding_mask, query_padding_mask, *more) -> None:
    """What linear and pure demand of their arguments."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        check.dense(raw.op, name, t)
    unbatched = q.dim() == k.dim() == v.dim() == 3
    if unbatched:
        _three_dimensions(raw.name).check((q, k, v))
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    number = 1.0 if rho is None or isinstance(rho, Tensor) else rho
    raw.forward.check((q, k, v, eps, *more, number, None, key_padding_mask, query_padding_mask))
    split_rho(raw.op, rho, q, unbatched)


@functools.cache
def _three_dimensions(name: str) -> check.Signature:
    """Before they are viewed with four dimensions, so that errors name the shapes given."""
    schema = f"{name}(Tensor q, Tensor k, Tensor v) -> Tensor"
    return check.Signature(schema, {"q": "(B*H, N, d)", "k": "(B*H, M, d)", "v": "(B*H, M, dv)"})


def split_rho(op, rho, q, unbatched) -> tuple[float, Tensor | None]:
    """rho as a number times a (B, H) tensor of the dtype of sums, through which its gradient flows."""
    if not isinstance(rho, Tensor):
        return 1.0 if rho is None else rho, None
    check.rho_tensor(op, rho, q, q.shape[0 if unbatched else 1], "(B*H,)" if unbatched else "(H,)")
    head_rho = rho.to(acc_dtype(q))
    if unbatched and rho.dim() == 1:
        head_rho = head_rho.unsqueeze(-1)
    return 1.0, head_rho.expand(q.shape[:2])


def cast(dtype_of, args, kwargs):
    """Under autocast q, k and v take its dtype, one by one, and what is tied stays tied."""
    q, k, v, *rest = args
    cast_q = q.to(dtype_of(q))
    return (cast_q, cast_q if k is q else k.to(dtype_of(k)), v.to(dtype_of(v)), *rest), kwargs


def formula(reference):
    """A raw operator's output by its reference, in the dtype of sums."""

    def evaluate(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
        acc = acc_dtype(q)
        rho = rho if head_rho is None else rho * head_rho
        masks = key_padding_mask, query_padding_mask
        return (reference(q.to(acc), (q if k is None else k).to(acc), v.to(acc), rho, eps, *masks).to(q.dtype),)

    return evaluate
