"""What every comparator is: a token mixer on a grid of patches, as a core on q, k, v and as a layer on tokens."""

import importlib.util
import math

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# Every mechanism by its name, in the order of their definition.
KNOWN: dict[str, type["Mechanism"]] = {}


class Mechanism(nn.Module):
    """``core(q, k, v)`` on (B, H, N, d), and ``forward(x)`` on (B, N, D): projections, core, local parts, projection.

    A subclass says in class attributes what it is; sums over tokens, norms and exponentials are float32 or wider.

    Args:
        dim: size D of a token. num_heads: number of heads H.
        grid: (height, width) in patches; N is their product.
        local: whether the layer has the mechanism's convolutions, where it has any.
    """

    NAME: str  # of its rows; a class without one of its own is no mechanism
    LABEL: str
    SOURCE: str  # arXiv number
    TIME: str  # growth of the core's time, in N tokens, D channels, d per head
    STATE: str  # numbers kept per head between the pass over keys and that over queries, in Python, of N and d
    LEVELS = ("operator", "layer")
    HEADS = 16
    PROJECTIONS, PROJECTION_BIAS = "qkv", True
    NOTE = ""
    NEEDS: tuple[str, str] | None = None  # module and package of kernels that run on a GPU only
    QUADRATIC = False
    CAUSAL = False
    HAS_LOCAL = False
    POOLED = False  # the core gives one token for all: (B, H, 1, d)
    FUSED = False  # the layer is more than its projections around its core
    BY_ROWS = False  # float64 gradients of a few rows or heads are cheap at any length
    PLAIN = False  # the plain code that our kernels' errors are measured by
    COMPILES = True  # False for kernels, which are the same compiled, and for loops over tokens

    def __init_subclass__(cls):
        if "NAME" in vars(cls):
            KNOWN[cls.NAME] = cls

    def __init__(self, dim: int, num_heads: int, grid: tuple[int, int], local: bool = False):
        super().__init__()
        self.dim, self.num_heads, self.grid = dim, num_heads, grid
        self.head_dim, self.tokens = dim // num_heads, grid[0] * grid[1]
        self.local = local and self.HAS_LOCAL
        for name in self.PROJECTIONS:
            setattr(self, f"{name}_proj", nn.Linear(dim, dim, self.PROJECTION_BIAS))
        if self.PROJECTIONS:
            self.out_proj = nn.Linear(dim, dim)
        self.setup(dim, num_heads, grid)

    def setup(self, dim: int, num_heads: int, grid: tuple[int, int]) -> None:
        """Makes the parameters beyond the projections."""

    @classmethod
    def unavailable(cls, device: torch.device) -> str | None:
        """Why it does not run on a device."""
        if cls.NEEDS is None:
            return None
        module, package = cls.NEEDS
        try:
            installed = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the package around the module
            installed = False
        if not installed:
            return f"{package} is not installed"
        return None if device.type == "cuda" else f"{package} needs a GPU"

    def state_size(self) -> int:
        """Numbers of STATE, over all heads of one picture."""
        return self.num_heads * eval(self.STATE, {"N": self.tokens, "d": self.head_dim, "log": math.log})

    def core(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def truth(self, q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
        """Rows of the core's output, by plain torch operations in the dtype of q: what the core is checked against.

        For kernels of a package, these are those of the class that they are a subclass of.
        """
        plain = next(cls for cls in type(self).mro() if not vars(cls).get("NEEDS"))
        if self.QUADRATIC:
            return plain.core(self, q[:, :, rows], k, v)
        out = plain.core(self, q, k, v)
        return out if self.POOLED else out[:, :, rows]

    def results(
        self, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Tensor, gradients: bool
    ) -> dict[str, Tensor]:
        """Rows of out and, if asked, of dq, dk and dv, by plain operations in the dtype of q; of those q, k, v that count.

        "undecided" (B, H, rows), if there: tokens with a score whose sign hangs on rounding, where dq and dk jump.
        """
        if not gradients:
            return {"out": self.truth(q, k, v, rows)}
        leaves = {n: t.detach().requires_grad_() for n, t in zip(("dq", "dk", "dv"), (q, k, v))}
        out = self.truth(*leaves.values(), torch.arange(q.shape[2], device=q.device))
        grads = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
        found = {"out": out.detach() if self.POOLED else out.detach()[:, :, rows]}
        found |= {n: g[:, :, rows] for n, g in zip(leaves, grads) if g is not None}
        unsure = self.undecided(q, k, v)
        return found if unsure is None else found | {"undecided": unsure[:, :, rows]}

    def undecided(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """(B, H, N): tokens with a score whose sign hangs on rounding; None for a mechanism without a jump that matters."""
        return None

    def head_groups(self, gradients: bool) -> list[list[int]]:
        """Heads that ``results`` looks at, and at how many at once: all, unless heads do not mix and float64 is dear."""
        return [list(range(self.num_heads))]

    def local_part(self, x: Tensor, v: Tensor) -> Tensor:
        """(B, N, D) from the layer's tokens (B, N, D) and values (B, H, N, d)."""
        raise NotImplementedError

    def project(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        q = self.heads(self.q_proj(x)) if "q" in self.PROJECTIONS else None
        k = self.heads(self.k_proj(x)) if "k" in self.PROJECTIONS else q
        return q, k, self.heads(self.v_proj(x))

    def finish(self, x: Tensor, out: Tensor, q: Tensor, v: Tensor) -> Tensor:
        """From the core's output (B, H, N, d) to the layer's (B, N, D)."""
        out = flat(out)
        if self.local:
            out = out + self.local_part(x, v)
        return self.out_proj(out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.finish(x, self.core(q, k, v), q, v)

    def sublayer(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """x + layer(norm(x))."""
        return x + self(norm(x))

    def sublayer_truth(self, x: Tensor, norm: nn.LayerNorm, rows: Tensor) -> Tensor:
        """Rows of ``sublayer`` with the core by :meth:`truth`."""
        if not (self.QUADRATIC or self.NEEDS) and type(self).truth is Mechanism.truth:
            return self.sublayer(x, norm)[:, rows]
        y = norm(x)
        q, k, v = self.project(y)
        out = self.truth(q, k, v, rows)
        return x[:, rows] + Mechanism.finish(self, y[:, rows], out, None if q is None else q[:, :, rows], v)

    def limits(self, case: dict, which: str) -> dict[str, float]:
        """What bounds a pass ("fwd", "bwd", "train") from below: names of the machine's limits, and how many of each."""
        return {}

    def work(self, case: dict, which: str) -> dict[str, float]:
        """Bytes and operations ("flops") of a pass at least, where they are known."""
        return {}

    def heads(self, x: Tensor) -> Tensor:
        """(B, N, D) as (B, H, N, d), a view."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    """(B, H, N, d) as (B, N, D): a view, if it came from there."""
    return x.transpose(1, 2).flatten(2)


def wide(x: Tensor) -> Tensor:
    """float32 if narrower."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5
