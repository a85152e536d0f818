"""What the two operators share: one public op over q, k and v that picks a backend, and the raw ops behind it.

Public `infsa::<name>` is composite: it views 3-D input as 4-D, sees that k is q, turns rho into a number and a (B, H) tensor,
asks for a backend and calls that backend's raw forward op (autograd.py), to which autograd, vmap and fake tensors belong.
"""

from torch import Tensor

from . import check, register, sharding
from .autograd import RawOps
from .backends import SUFFIXES, backend_of_backward, choose_backend

_ARGUMENTS = "Tensor? key_padding_mask=None, Tensor? query_padding_mask=None, str backend=''"


class Operator(RawOps):
    """Defines `infsa::<name>` and, per backend family, its raw forward and backward ops.

    Args:
        name: the public op's name.
        reference: the operator in plain torch (infsa_kernels.reference).
        outputs: forward's outputs and their dimensions, a letter each; all but "out" are statistics.
        saved: the forward outputs that backward takes, by name and in order.
        fake_forward, fake_backward: check the arguments and return empty outputs of the right shape, dtype and strides.
        flops_forward, flops_backward: FLOPs from the sizes (B, H, N, M, d, dv).
    """

    def __init__(
        self, name, *, reference, outputs, saved, fake_forward, fake_backward, flops_forward, flops_backward
    ):  # fmt: skip
        self.op, self.reference, self.flops = f"infsa::{name}", reference, (flops_forward, flops_backward)
        self.tensor_rho, self.scalar_rho = register.define(
            name,
            {
                "": f"Tensor q, Tensor k, Tensor v, float eps=1e-6, Tensor? rho=None, {_ARGUMENTS}",
                "scalar_rho": f"Tensor q, Tensor k, Tensor v, float eps=1e-6, float rho=1.0, {_ARGUMENTS}",
            },
            self._call,
            _cast,
        )
        inputs = {"q": "BHNd", "k": "BHMd", "v": "BHMv", "head_rho": "BH"}
        masks = {"key_padding_mask": "BM", "query_padding_mask": "BN"}

        def formula(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
            acc = check.acc_dtype(q)
            rho = rho if head_rho is None else rho * head_rho
            masks = key_padding_mask, query_padding_mask
            out = reference(q.to(acc), (q if k is None else k).to(acc), v.to(acc), rho, eps, *masks)
            return (out.to(q.dtype),)

        def from_shapes(flops):
            return lambda q, k, v: flops(*q[:3], v[2], q[3], v[3])

        super().__init__(
            name,
            tensors="Tensor q, Tensor? k, Tensor v",
            rest="float eps, float rho, Tensor? head_rho, Tensor? key_padding_mask, Tensor? query_padding_mask",
            dims=inputs | masks | outputs,
            wrt=list(inputs),
            outputs=list(outputs),
            saved=saved,
            formula=formula,
            fake_forward=fake_forward,
            fake_backward=fake_backward,
            flops_forward=from_shapes(flops_forward),
            flops_backward=from_shapes(flops_backward),
        )

    def overload(self, rho):
        """The overload for this rho. Found by the packet, a number costs 10 us: it has to fail at the other one first."""
        return self.tensor_rho if isinstance(rho, Tensor) else self.scalar_rho

    def _call(self, q, k, v, eps=1e-6, rho=None, key_padding_mask=None, query_padding_mask=None, backend=""):
        sharding.register_waiting()
        self._check_layout(q, k, v, rho, key_padding_mask, query_padding_mask)
        unbatched = q.dim() == 3 and k.dim() == 3 and v.dim() == 3
        tied = k is q
        if unbatched:
            check.three_dimensions(self.op, q, k, v)
            q, v = q.unsqueeze(1), v.unsqueeze(1)
            k = q if tied else k.unsqueeze(1)
        rho, head_rho = self._split_rho(rho, q, unbatched)
        name = choose_backend(self.name, q.device, q.dtype, q.shape, backend or backend_of_backward())
        forward = self.forwards[SUFFIXES[name]]
        k = None if tied else k
        with register.without_autograd_if_unused(q, k, v, head_rho):
            out = forward(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask)[0]
        return out.squeeze(1) if unbatched else out

    def statistics(self, q, k, v, eps, key_padding_mask=None, query_padding_mask=None) -> tuple[Tensor, ...]:
        """What forward keeps beside its output, of 4-D arguments that were checked. They have no gradient."""
        name = choose_backend(self.name, q.device, q.dtype, q.shape, backend_of_backward())
        k = None if k is q else k
        return self.forwards[SUFFIXES[name]](q, k, v, eps, 1.0, None, key_padding_mask, query_padding_mask)[1:]

    def check_scores(self, q, k, rho, eps, key_padding_mask, query_padding_mask) -> None:
        """The checks of the operator for its scores, which have no v."""
        check.python_types(self.op, q, k, k, rho, eps, key_padding_mask, query_padding_mask)
        self._check_layout(q, k, k, rho, key_padding_mask, query_padding_mask)
        unbatched = q.dim() == 3 and k.dim() == 3
        if unbatched:
            check.three_dimensions(self.op, q, k, k)
            q, k = q.unsqueeze(1), k.unsqueeze(1)
        rho, head_rho = self._split_rho(rho, q, unbatched)
        check.forward_arguments(self.op, q, k, k, eps, rho, head_rho, key_padding_mask, query_padding_mask)

    def _check_layout(self, q, k, v, rho, key_padding_mask, query_padding_mask) -> None:
        for name, t in (("q", q), ("k", k), ("v", v)):
            check.dense(self.op, name, t)
        masks = ("key_padding_mask", key_padding_mask), ("query_padding_mask", query_padding_mask)
        for name, t in (("rho", rho), *masks):
            if isinstance(t, Tensor):
                check.dense(self.op, name, t)

    def _split_rho(self, rho, q, unbatched) -> tuple[float, Tensor | None]:
        """rho as a number times a (B, H) tensor of the accumulation dtype, through which its gradient flows."""
        if not isinstance(rho, Tensor):
            return 1.0 if rho is None else rho, None
        heads = q.shape[0 if unbatched else 1] if q.dim() == 4 else 1
        check.rho_tensor(self.op, rho, q, heads, "(B*H,)" if unbatched else "(H,)")
        head_rho = rho.to(check.acc_dtype(q))
        if unbatched and rho.dim() == 1:
            head_rho = head_rho.unsqueeze(-1)
        return 1.0, head_rho.expand(q.shape[:2]) if q.dim() == 4 else head_rho


def _cast(dtype_of, args, kwargs):
    q, k, v, *rest = args
    cast_q = q.to(dtype_of(q))
    return (cast_q, cast_q if k is q else k.to(dtype_of(k)), v.to(dtype_of(v)), *rest), kwargs
