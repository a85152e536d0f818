"""The mechanisms that InfSA is measured against, each written from its paper's formulas: one file per comparator.

MECHANISMS maps the name of a row to (class, with its local parts or not). docs: mechanism.py. "name@backend" is the mechanism
with the operators of this package on one backend.
"""

import importlib
import pkgutil

from . import machine
from .infsa import InfSA
from .mechanism import KNOWN, Mechanism

LIMITS, Limit = machine.LIMITS, machine.Limit

# The nine of the paper's Table 1.
PAPER = ("linear_infsa", "pure_infsa", "softmax", "linformer", "performer", "soft", "flatten", "agent", "mlla")

for module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{module.name}")
CORES = {name: KNOWN[name] for name in PAPER} | KNOWN
MECHANISMS: dict[str, tuple[type[Mechanism], bool]] = {
    **{name: (cls, False) for name, cls in CORES.items()},
    **{f"{name}+local": (cls, True) for name, cls in CORES.items() if cls.HAS_LOCAL},
    **{name: (cls, False) for name, cls in LIMITS.items()},
}

# Which rows are not peers but the operators themselves.
OWN = tuple(name for name, cls in CORES.items() if issubclass(cls, InfSA))

# The same mechanism otherwise: with its convolutions, untied, with a floor, as its authors' layer, or by another's kernels.
VARIANTS = tuple(
    n for n in MECHANISMS if "+" in n or n.endswith(("_untied", "_floor", "_per_token", "_64")) or n.startswith("sdpa_")
)


def base(name: str) -> str:
    return name.partition("@")[0]


def of(name: str) -> type[Mechanism]:
    return MECHANISMS[base(name)][0]


def label(name: str) -> str:
    cls, local = MECHANISMS[base(name)]
    return cls.LABEL + (" + local parts" if local else "") + name.removeprefix(base(name)).replace("@", " on ")


def build(name: str, dim: int, grid: tuple[int, int], num_heads: int | None = None) -> Mechanism:
    """The mechanism for tokens of size ``dim`` on a grid of patches; raises NotImplementedError naming what it lacks."""
    cls, local = MECHANISMS[base(name)]
    return cls(dim, num_heads or max(1, dim * cls.HEADS // 1024), grid, local)
