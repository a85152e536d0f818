"""`python -m bench.models`: the 4-layer InfViT-Linear on one picture, beside itself on the plain path and its softmax twin.

The plain path is the same function from nn.LayerNorm, four nn.Linear over all tokens and the fused operator. The models have
the same weights and are called in turn, forward, without gradients; first, on a small picture, the pooled layer's scores must
be as close to float64 as the plain path's. At 1024 pixels this takes about a minute on 2 cores.
"""

import argparse
import copy
import sys

import torch
from torch import Tensor, nn
from tqdm import tqdm

from infsa_kernels.nn import InfSAAttention, InfViT
from infsa_kernels.testing import FORWARD, assert_close_to_reference

from .extreme import picture
from .image import PATCH
from .measure import interleave, observe
from .report import durations
from .rows import times

GATE_PIXELS = 128
# The least speed-up over each of the others.
GOALS = {"plain path": 1.2, "softmax, SDPA": 3.0}


class PlainAttention(nn.Module):
    """Linear-InfSA with every projection over every token."""

    def __init__(self, attention: InfSAAttention):
        super().__init__()
        self.attention = attention

    @property
    def variant(self) -> str:
        return self.attention.variant

    def forward(self, x: Tensor, norm: nn.Module) -> tuple[Tensor, None]:
        part, x = self.attention, norm(x)
        q, k, v = (
            projection(x).unflatten(-1, (part.num_heads, -1)).transpose(1, 2)
            for projection in (part.q_proj, part.k_proj, part.v_proj)
        )
        context = torch.ops.infsa.linear(q, k, v, part.eps, part.rho)
        return part.out_proj(context.flatten(1)[:, None].expand(x.shape)), None


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = build(device)
    gate(models, device)
    images = picture(args.pixels).to(device)
    actions, seen = {}, {}
    with torch.inference_mode():
        for name, model in tqdm(models.items(), desc="first calls", unit="model"):
            actions[name] = lambda lap, model=model: [model(images)]
            seen[name] = observe(actions[name], device, warm_up=True)[0]
        print(f"calls in turn, {args.budget:g} s per model", file=sys.stderr)
        interleave(actions, seen, args.budget, device)

    found = {name: times(seen[name], "fwd") for name in models}
    own = found["pooled layer"]["median_s"]
    print(
        f"\n4 layers, D = 1024, {args.pixels} x {args.pixels} pixels, {(args.pixels // PATCH) ** 2} tokens, forward, float32"
    )
    for name, row in found.items():
        median, interval = durations(row["median_s"], row["p20_s"], row["p80_s"])
        peak = f"{seen[name].peaks[0] / 1e6:8.0f} MB extra" if seen[name].peaks else ""
        text = f"  {name:<15}{median:>10} {interval:<16} {peak}"
        if name in GOALS:
            ratio = row["median_s"] / own
            text += f"   {ratio:.2f} x, goal {GOALS[name]:g}: {'reached' if ratio >= GOALS[name] else 'MISSED'}"
        print(text)
    return 0


def build(device: torch.device) -> dict[str, InfViT]:
    """The three models with one set of weights."""
    torch.manual_seed(0)
    pooled = InfViT(depth=4, device=device).eval()
    nn.init.normal_(pooled.head.weight, std=0.02)  # at 0, as it starts, all scores would agree
    softmax = InfViT(depth=4, variant="softmax", device=device).eval()
    state = pooled.state_dict()
    softmax.load_state_dict({name: t for name, t in state.items() if not name.endswith("rho_logit")})
    return {"pooled layer": pooled, "plain path": on_plain_path(pooled), "softmax, SDPA": softmax}


def on_plain_path(model: InfViT) -> InfViT:
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn = PlainAttention(block.attn)
    return model


@torch.inference_mode()
def gate(models: dict[str, InfViT], device: torch.device) -> None:
    images = picture(GATE_PIXELS).to(device)
    plain = models["plain path"]
    truth = copy.deepcopy(plain).double()(images.double())
    assert_close_to_reference(models["pooled layer"](images), plain(images), truth, FORWARD, "class scores")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    parser.add_argument("--pixels", type=int, default=1024, help="side of the picture (default 1024)")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of calls per model (default 10)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
