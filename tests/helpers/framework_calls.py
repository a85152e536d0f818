"""Small calls in every form and memory layout, for the tests of what the framework does with the operators."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.calls import Call

B, H, N, M, D, DV = 2, 3, 5, 4, 8, 6

# Memory layouts of a (B, H, L, d) tensor.
LAYOUTS = ("contiguous", "token_major", "gaps")

# Every kind of rho, tied and untied, with and without masks, four dimensions and three.
FORMS = ("plain", "tied", "tied_scalar_rho", "head_rho", "masked", "tied_masked_one_rho", "three_dimensions")


def tensor(layout: str, *shape: int, dtype: torch.dtype, device: str) -> Tensor:
    *batch, L, d = shape
    if layout == "token_major":
        return torch.randn(*batch[:-1], L, batch[-1], d, dtype=dtype, device=device).transpose(-2, -3)
    if layout == "gaps":
        storage = torch.full((*batch, L, 2 * d + 1), torch.nan, dtype=dtype, device=device)
        storage[..., 1::2] = torch.randn(shape, dtype=dtype, device=device)
        return storage[..., 1::2]
    return torch.randn(shape, dtype=dtype, device=device)


def mask(length: int, device: str) -> Tensor:
    """Ignores other rows in each sample of the batch, and never all of them."""
    return (torch.arange(length, device=device) + torch.arange(B, device=device)[:, None]) % 3 == 0


def make_call(op: str, form: str, dtype: torch.dtype, device: str, layout: str = "contiguous") -> Call:
    def random(*shape):
        return tensor(layout, *shape, dtype=dtype, device=device)

    heads = (B * H,) if form == "three_dimensions" else (B, H)
    tied = form.startswith("tied")
    length = N if tied else M
    q, k, v = random(*heads, N, D), None if tied else random(*heads, length, D), random(*heads, length, DV)
    rho_shape = {"tied_scalar_rho": (), "tied_masked_one_rho": (1,), "head_rho": (H,), "three_dimensions": (B * H,)}
    rho = torch.rand(rho_shape[form], device=device) + 0.5 if form in rho_shape else 0.95
    if "masked" not in form:
        return Call(op, q, k, v, rho)
    return Call(op, q, k, v, rho, key_padding_mask=mask(length, device), query_padding_mask=mask(N, device))


class RawCalls(TorchDispatchMode):
    """Records the raw operators that run: (direction, suffix of the backend, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "infsa":
            _, direction, *suffix = func._opname.split("_")
            self.calls.append((direction, "".join(f"_{s}" for s in suffix), args))
        return func(*args, **(kwargs or {}))

    def arguments(self, direction):
        return [args for name, _, args in self.calls if name == direction]
