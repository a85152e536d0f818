"""The mechanisms that InfSA is measured against, each written from its paper's formulas: one file per comparator.

MECHANISMS maps the name of a row to (class, with its local parts or not). docs: mechanism.py. "name@backend" is the mechanism
with the operators of this package on one backend.
"""

from .agent import Agent
from .cosformer import CosFormer
from .deltanet import GatedDeltaNet, GatedDeltaNetFla
from .elementwise import ReLU, Sigmoid, TritonSigmoid
from .fastformer import Fastformer
from .flatten import FLatten
from .frwkv import FRWKV
from .infsa import (
    InfSA,
    LinearInfSA,
    LinearInfSAPerToken,
    LinearInfSAUntied,
    LinearPlain,
    LinearPlainUntied,
    PureInfSA,
    PureInfSAUntied,
    PurePlain,
    PurePlainUntied,
)
from .inline import InLine
from .linear import Bidirectional, BidirectionalFlash, SimpleLinear, SimpleLinearFla
from .linformer import Linformer
from .luna import LUNA
from .machine import LIMITS
from .mean import Mean
from .mechanism import Mechanism
from .mlla import MLLA
from .nystromformer import Nystromformer
from .performer import Performer
from .qt_vit import QTViT
from .rala import RALA
from .soft import SOFT
from .softmax import FlashAttention3, FlashAttention4, Softmax, SoftmaxOn64, by
from .window import Window

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
    "linear_attention": Bidirectional,
    "gated_deltanet": GatedDeltaNet,
    "window": Window,
    "simple_linear": SimpleLinear,
    "frwkv": FRWKV,
    "linear_infsa_untied": LinearInfSAUntied,
    "pure_infsa_untied": PureInfSAUntied,
    "linear_infsa_per_token": LinearInfSAPerToken,
    "linear_plain": LinearPlain,
    "pure_plain": PurePlain,
    "linear_plain_untied": LinearPlainUntied,
    "pure_plain_untied": PurePlainUntied,
    "softmax_64": SoftmaxOn64,
    "sdpa_math": by("math", ("cpu", "cuda")),
    "sdpa_flash": by("flash", ("cpu", "cuda")),
    "sdpa_efficient": by("efficient", ("cuda",)),
    "sdpa_cudnn": by("cudnn", ("cuda",)),
    # By packages that are there or not.
    "flash_attention_3": FlashAttention3,
    "flash_attention_4": FlashAttention4,
    "triton_sigmoid": TritonSigmoid,
    "linear_attention_flash": BidirectionalFlash,
    "gated_deltanet_fla": GatedDeltaNetFla,
    "simple_linear_fla": SimpleLinearFla,
}
MECHANISMS: dict[str, tuple[type[Mechanism], bool]] = {
    **{name: (cls, False) for name, cls in CORES.items()},
    **{f"{name}+local": (cls, True) for name, cls in CORES.items() if cls.HAS_LOCAL},
    **{name: (cls, False) for name, cls in LIMITS.items()},
}

# The nine of the paper's Table 1.
PAPER = ("linear_infsa", "pure_infsa", "softmax", "linformer", "performer", "soft", "flatten", "agent", "mlla")

# Which rows are not peers but the operators themselves.
OWN = tuple(name for name, cls in CORES.items() if issubclass(cls, InfSA))

# The same mechanism otherwise: with its convolutions, untied, as its authors' layer, or by another's kernels.
VARIANTS = tuple(
    n for n in MECHANISMS if "+" in n or n.endswith(("_untied", "_per_token", "_64")) or n.startswith("sdpa_")
)


def of(name: str) -> type[Mechanism]:
    return MECHANISMS[name.partition("@")[0]][0]


def label(name: str) -> str:
    base, at, backend = name.partition("@")
    cls, local = MECHANISMS[base]
    return cls.LABEL + (" + local parts" if local else "") + (f" on {backend}" if at else "")


def build(name: str, dim: int, grid: tuple[int, int], num_heads: int | None = None) -> Mechanism:
    """The mechanism for tokens of size ``dim`` on a grid of patches; raises NotImplementedError naming what it lacks."""
    cls, local = MECHANISMS[name.partition("@")[0]]
    return cls(dim, num_heads or max(1, dim * cls.HEADS // 1024), grid, local)
