"""The mechanisms that InfSA is measured against, each written from its paper's formulas: one file per comparator.

MECHANISMS maps the name of a row to (class, with its local parts or not). docs: mechanism.py. "name@backend" is the mechanism
with the operators of this package on one backend.
"""

from . import (
    agent,
    cosformer,
    deltanet,
    elementwise,
    fastformer,
    flatten,
    frwkv,
    infsa,
    inline,
    linear,
    linformer,
    luna,
    machine,
    mean,
    mlla,
    nystromformer,
    performer,
    qt_vit,
    rala,
    soft,
    softmax,
    window,
)
from .infsa import InfSA
from .mechanism import Mechanism

LIMITS, Limit = machine.LIMITS, machine.Limit

# The nine of the paper's Table 1.
TABLE_1 = {
    "linear_infsa": infsa.LinearInfSA,
    "pure_infsa": infsa.PureInfSA,
    "softmax": softmax.Softmax,
    "linformer": linformer.Linformer,
    "performer": performer.Performer,
    "soft": soft.SOFT,
    "flatten": flatten.FLatten,
    "agent": agent.Agent,
    "mlla": mlla.MLLA,
}
CORES = TABLE_1 | {
    "mean": mean.Mean,
    "fastformer": fastformer.Fastformer,
    "inline": inline.InLine,
    "rala": rala.RALA,
    "qt_vit": qt_vit.QTViT,
    "luna": luna.LUNA,
    "cosformer": cosformer.CosFormer,
    "nystromformer": nystromformer.Nystromformer,
    "sigmoid": elementwise.Sigmoid,
    "relu": elementwise.ReLU,
    "linear_attention": linear.Bidirectional,
    "gated_deltanet": deltanet.GatedDeltaNet,
    "window": window.Window,
    "simple_linear": linear.SimpleLinear,
    "frwkv": frwkv.FRWKV,
    "linear_infsa_untied": infsa.LinearInfSAUntied,
    "pure_infsa_untied": infsa.PureInfSAUntied,
    "linear_infsa_per_token": infsa.LinearInfSAPerToken,
    "linear_plain": infsa.LinearPlain,
    "pure_plain": infsa.PurePlain,
    "linear_plain_untied": infsa.LinearPlainUntied,
    "pure_plain_untied": infsa.PurePlainUntied,
    "softmax_64": softmax.SoftmaxOn64,
    "sdpa_math": softmax.by("math", ("cpu", "cuda")),
    "sdpa_flash": softmax.by("flash", ("cpu", "cuda")),
    "sdpa_efficient": softmax.by("efficient", ("cuda",)),
    "sdpa_cudnn": softmax.by("cudnn", ("cuda",)),
    # By packages that are there or not.
    "flash_attention_3": softmax.FlashAttention3,
    "flash_attention_4": softmax.FlashAttention4,
    "triton_sigmoid": elementwise.TritonSigmoid,
    "linear_attention_flash": linear.BidirectionalFlash,
    "gated_deltanet_fla": deltanet.GatedDeltaNetFla,
    "simple_linear_fla": linear.SimpleLinearFla,
}
MECHANISMS: dict[str, tuple[type[Mechanism], bool]] = {
    **{name: (cls, False) for name, cls in CORES.items()},
    **{f"{name}+local": (cls, True) for name, cls in CORES.items() if cls.HAS_LOCAL},
    **{name: (cls, False) for name, cls in LIMITS.items()},
}
PAPER = tuple(TABLE_1)

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
