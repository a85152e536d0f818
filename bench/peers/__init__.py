"""The mechanisms that InfSA is measured against, each written from its paper's formulas: one file per comparator.

MECHANISMS maps the name of a row to (class, with its local parts or not). docs: mechanism.py.
"""

from .agent import Agent
from .cosformer import CosFormer
from .elementwise import ReLU, Sigmoid
from .fastformer import Fastformer
from .fla import GatedDeltaNet, SimpleLinear
from .flatten import FLatten
from .infsa import LinearInfSA, LinearInfSAPerToken, LinearInfSAUntied, PureInfSA, PureInfSAUntied
from .inline import InLine
from .linformer import Linformer
from .luna import LUNA
from .mean import Mean
from .mechanism import Mechanism
from .mlla import MLLA
from .nystromformer import Nystromformer
from .performer import Performer
from .qt_vit import QTViT
from .rala import RALA
from .soft import SOFT
from .softmax import Softmax

CORES = {
    "linear_infsa": LinearInfSA,
    "pure_infsa": PureInfSA,
    "softmax": Softmax,
    "linformer": Linformer,
    "performer": Performer,
    "soft": SOFT,
    "flatten": FLatten,
    "agent": Agent,
    "mlla": MLLA,
    "mean": Mean,
    "fastformer": Fastformer,
    "inline": InLine,
    "rala": RALA,
    "qt_vit": QTViT,
    "luna": LUNA,
    "cosformer": CosFormer,
    "nystromformer": Nystromformer,
    "sigmoid": Sigmoid,
    "relu": ReLU,
    "linear_infsa_untied": LinearInfSAUntied,
    "pure_infsa_untied": PureInfSAUntied,
    "gated_deltanet": GatedDeltaNet,
    "simple_linear": SimpleLinear,
}
MECHANISMS: dict[str, tuple[type[Mechanism], bool]] = {
    **{name: (cls, False) for name, cls in CORES.items()},
    "linear_infsa_per_token": (LinearInfSAPerToken, False),
    **{f"{name}+local": (cls, True) for name, cls in CORES.items() if cls.HAS_LOCAL},
}

# The nine of the paper's Table 1.
PAPER = ("linear_infsa", "pure_infsa", "softmax", "linformer", "performer", "soft", "flatten", "agent", "mlla")

# Which rows are not peers but the operators themselves.
OWN = tuple(name for name, (cls, _) in MECHANISMS.items() if cls.SOURCE == "2603.00175")


def label(name: str) -> str:
    cls, local = MECHANISMS[name]
    return cls.LABEL + (" + local parts" if local else "")


def build(name: str, dim: int, grid: tuple[int, int], num_heads: int | None = None) -> Mechanism:
    """The mechanism for tokens of size ``dim`` on a grid of patches; raises NotImplementedError naming what it lacks."""
    cls, local = MECHANISMS[name]
    return cls(dim, num_heads or max(1, dim * cls.HEADS // 1024), grid, local)
