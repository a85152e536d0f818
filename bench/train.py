"""`make bench-train`: small models that differ in nothing but their attention, trained alike, without clipping gradients.

    python -m bench.train [--data ...] [--models ...] [--seeds ...] [--jobs N] [--out DIR]

Every run is a line of JSON in OUT/runs.jsonl, and what has its line is not trained again: a run that was ended goes on. Writes
table.txt, and training.png: accuracy, the gradient's norm over the steps, and the discount of the Neumann sum.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples import pictures
from infsa_kernels.nn import InfViT, monitor
from infsa_kernels.nn.rho import logit

from . import machine
from .trainer import fit, normalised

SIZES = dict(in_chans=1, num_classes=10, embed_dim=128, depth=4, num_heads=4)
RECIPE = dict(batch=64, rate=2e-3, decay=0.05, warm_up=0.1)
EPOCHS = {"fashion-mnist": 2, "mnist5k": 8, "digits": 15}
# Positions start this large, in place of InfViT's 0.02: so few pictures do not teach a model where its tokens are.
POSITIONS = 0.5
SEEDS = (0, 1, 2)
FLOOR = 0.1
GAMMAS = (0.3, 0.5, 0.7, 0.9)

# Arguments of InfViT. InfSA's keys are tied to its queries, as the paper's, unless said otherwise.
ATTENTION = {
    "softmax": {"variant": "softmax"},
    "mean pooling": {"variant": "mean"},
    "Pure": {"variant": "pure_infsa", "tied": True},
    "Linear": {"variant": "linear_infsa", "tied": True},
    "Linear, floor": {"variant": "linear_infsa", "tied": True, "score_floor": FLOOR},
    "Linear untied": {"variant": "linear_infsa", "tied": False},
    "Linear untied, floor": {"variant": "linear_infsa", "tied": False, "score_floor": FLOOR},
}
# The Neumann sum of the layers' outputs: gamma fixed, or learned from 0.9 on.
NEUMANN = {f"Linear, γ = {g}": ATTENTION["Linear"] | {"neumann": "layer", "gamma": g} for g in GAMMAS}
NEUMANN["Linear, γ learned"] = ATTENTION["Linear"] | {"neumann": "layer"}
# What becomes of the scores, in place of ReLU: in torch operations, so that the seconds of these runs say nothing.
ACTIVATIONS = {
    f"{operator}, {name}": ATTENTION[operator] | {"activation": activation}
    for operator in ("Linear", "Pure")
    for name, activation in (("GELU", "gelu"), ("|t|", "abs"), ("softplus", "softplus"))
}
PARTS = ATTENTION, NEUMANN, ACTIVATIONS
MODELS = ATTENTION | NEUMANN | ACTIVATIONS

POINTS = 60  # of a curve over the steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "train")
    parser.add_argument("--data", nargs="+", choices=pictures.SMALL, help="default: the first that is here, and digits")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--jobs", type=int, default=cores(), help="models that are trained at a time, one thread each")
    args = parser.parse_args()
    data = args.data or list(dict.fromkeys([first_installed(), "digits"]))
    args.out.mkdir(parents=True, exist_ok=True)
    runs = train_all(plan(data, args.models, args.seeds), args.out / "runs.jsonl", args.jobs)
    text = "\n\n".join(table(name, [run for run in runs if run["data"] == name]) for name in data)
    print(text)
    (args.out / "table.txt").write_text(text + "\n")
    figure([run for run in runs if run["data"] == data[0]]).savefig(args.out / "training.png", dpi=110)


def plan(data: list[str], models: list[str], seeds: list[int]) -> list[dict]:
    """What to train, in the order of what it is worth: all kinds of attention before all seeds, then sums of layers, then other
    activations, both on the first data set only."""
    kinds = [[name for name in models if name in part] for part in PARTS]
    return [
        {
            "data": one,
            "model": name,
            "seed": seed,
            "epochs": EPOCHS[one],
            "arguments": MODELS[name],
            **SIZES,
            **RECIPE,
            "positions": POSITIONS,
        }
        for part, where in zip(kinds, (data, data[:1], data[:1]))
        for seed in seeds
        for one in where
        for name in part
    ]


def train_all(wanted: list[dict], kept: Path, jobs: int) -> list[dict]:
    """The results of ``wanted``: those that ``kept`` has, and the others as they are trained."""
    from tqdm import tqdm

    text = kept.read_text() if kept.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # without a line that was being written when the process was killed
    known = {_key(run): run for run in map(json.loads, whole.splitlines())}
    missing = [run for run in wanted if _key(run) not in known]
    kept.write_text(whole)
    with kept.open("a") as file, tqdm(total=len(missing), unit="run", disable=not missing) as bar:
        for result in _results(missing, jobs):
            known[_key(result)] = result
            file.write(json.dumps(result) + "\n")
            file.flush()
            bar.set_postfix_str(f"{result['model']}, {result['data']}: {100 * result['accuracy']:.1f}%")
            bar.update()
    return [known[_key(run)] for run in wanted]


def _results(runs: list[dict], jobs: int) -> Iterator[dict]:
    """As they come."""
    if jobs == 1:
        yield from map(trained, runs)
        return
    # torch's threads do not survive a fork.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield from (done.result() for done in as_completed([pool.submit(trained, run) for run in runs]))


def _key(run: dict) -> str:
    return json.dumps({name: value for name, value in run.items() if name not in RESULTS}, sort_keys=True)


RESULTS = (
    "accuracy",
    "loss",
    "parameters",
    "median_norm",
    "norms",
    "losses",
    "layers",
    "gamma",
    "seconds",
    "environment",
)


def trained(run: dict) -> dict:
    """A run with its results: accuracy, the norms of the gradient, and what its layers do with the test pictures."""
    torch.set_num_threads(1)
    begin = time.monotonic()
    data = pictures.load(run["data"])
    torch.manual_seed(run["seed"])
    sizes = {name: run[name] for name in SIZES} | {"img_size": data.train[0].shape[-1], "patch_size": data.patch_size}
    model = build(run["arguments"], **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), run["rate"], weight_decay=run["decay"])
    arguments = {name: run[name] for name in ("epochs", "batch", "warm_up")}
    steps = list(fit(model, [optimizer], *data.train, mirrored=data.mirrored, **arguments))
    norms, losses = ([getattr(step, name) for step in steps] for name in ("gradient_norm", "loss"))
    has_infsa = any(hasattr(module, "rho_logit") for module in model.modules())
    model.eval()
    with torch.no_grad(), monitor(model) if has_infsa else contextlib.nullcontext({}) as layers:
        scores = torch.cat([model(normalised(part)) for part in data.test[0].split(500)])
    return run | {
        "accuracy": (scores.argmax(1) == data.test[1]).double().mean().item(),
        "loss": F.cross_entropy(scores, data.test[1]).item(),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "median_norm": statistics.median(norms),
        "norms": _parts(norms, max),
        "losses": _parts(losses, statistics.fmean),
        "layers": layers,
        "gamma": None if model.neumann is None else model.neumann.gamma.tolist(),
        "seconds": time.monotonic() - begin,
        "environment": machine.environment(torch.device("cpu")),
    }


def build(arguments: dict, **sizes) -> InfViT:
    """An InfViT; or one whose attention is the mean of its values; or one whose discounts do not learn."""
    arguments = dict(arguments)
    gamma, variant = arguments.pop("gamma", None), arguments.pop("variant")
    model = InfViT(**sizes, **arguments, variant="linear_infsa" if variant == "mean" else variant)
    nn.init.normal_(model.pos_embed, std=POSITIONS)
    if variant == "mean":
        for block in model.blocks:
            block.attn = MeanPooling(model.embed_dim)
    if gamma is not None:
        nn.init.constant_(model.neumann.logit.requires_grad_(False), logit(gamma))
    return model


class MeanPooling(nn.Module):
    """The floor of every pooler, in the place of an InfSAAttention."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.v_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(2))

    def forward(self, x: Tensor, norm: nn.Module, expanded: bool) -> tuple[Tensor, None]:
        row = self.out_proj(self.v_proj(norm(x).mean(1, keepdim=True)))
        return row.expand(x.shape), None


def _parts(values: list[float], reduce) -> list[float]:
    """A curve of at most POINTS points: each is what ``reduce`` makes of its part of the values."""
    edges = [i * len(values) // POINTS for i in range(POINTS + 1)]
    return [reduce(values[begin:end]) for begin, end in pairwise(edges) if end > begin]


def table(data: str, runs: list[dict]) -> str:
    """Means over the seeds, +- half their range; the largest gradient norm of all seeds."""
    sample = pictures.load(data)
    seeds = sorted({run["seed"] for run in runs})
    layers, epochs = SIZES["depth"], EPOCHS[data]
    lines = [
        f"{sample.source}: {len(sample.train[0])} pictures, {epochs} epochs in batches of {RECIPE['batch']}; "
        f"{len(sample.test[0])} others for accuracy",
        f"InfViT, {layers} layers, D = {SIZES['embed_dim']}, {SIZES['num_heads']} heads, 16 patches and a class token; AdamW, "
        f"no clipping; seeds: {', '.join(map(str, seeds))}; means, +- half the range",
        "",
        f"{'':24}{'accuracy, %':>14}{'test loss':>16}{'largest norm':>14}{'median':>8}   "
        f"{'dead pairs, %, by layer':<26}{'dead heads':>10}{'parameters':>12}",
    ]
    for name in MODELS:
        mine = [run for run in runs if run["model"] == name]
        if not mine:
            continue
        largest, median = max(max(run["norms"]) for run in mine), statistics.fmean(run["median_norm"] for run in mine)
        dead = {
            what: [
                statistics.fmean(run["layers"].get(f"{what}/blocks.{layer}.attn", math.nan) for run in mine)
                for layer in range(layers)
            ]
            for what in ("dead_pairs", "dead_heads")
        }
        known = not math.isnan(dead["dead_pairs"][0])
        by_layer = "  ".join(f"{100 * share:4.1f}" for share in dead["dead_pairs"]) if known else ""
        never = f"{100 * statistics.fmean(dead['dead_heads']):.0f}" if known else ""
        few = f" (of {len(mine)})" if len(mine) < len(seeds) else ""
        lines.append(
            f"{name + few:24}{_spread([100 * run['accuracy'] for run in mine], 1):>14}"
            f"{_spread([run['loss'] for run in mine], 3):>16}{largest:14.3g}{median:8.2g}   "
            f"{by_layer:<26}{never:>10}{mine[0]['parameters']:>12,}"
        )
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +-{(max(values) - min(values)) / 2:.{digits}f}"


def figure(runs: list[dict]):
    """Accuracy of every seed, the largest norms of the gradient over the steps, accuracy over the discount."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    from .plots import MUTED, SETTINGS

    mpl.rcParams.update(SETTINGS)
    figure, (accuracy, norms, gammas) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    shown = [name for name in ATTENTION | ACTIVATIONS if any(run["model"] == name for run in runs)]
    for row, name in enumerate(shown):
        mine = [run for run in runs if run["model"] == name]
        (points,) = accuracy.plot([100 * run["accuracy"] for run in mine], [-row] * len(mine), "o", alpha=0.7)
        for run in mine if name in ATTENTION else ():
            steps = [(i + 0.5) / len(run["norms"]) for i in range(len(run["norms"]))]
            label = name if run is mine[0] else None
            norms.plot(steps, run["norms"], color=points.get_color(), lw=1, alpha=0.8, label=label)
    accuracy.set_yticks([-row for row in range(len(shown))], shown)
    accuracy.set_title("Accuracy, %, a point a seed")
    norms.set_yscale("log")
    norms.set_title("Largest gradient norms, not clipped")
    norms.set_xlabel("part of the steps")
    norms.legend()
    swept = {"none": ATTENTION["Linear"]} | {name.split(" = ")[-1].split()[-1]: NEUMANN[name] for name in NEUMANN}
    for column, arguments in enumerate(swept.values()):
        mine = [100 * run["accuracy"] for run in runs if run["arguments"] == arguments]
        gammas.plot([column] * len(mine), mine, "o", color=MUTED)
    gammas.set_xticks(range(len(swept)), swept)
    gammas.set_title("Linear: accuracy, %, over γ")
    return figure


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_installed() -> str:
    for name in pictures.SMALL:
        try:
            pictures.load(name)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            print(error, file=sys.stderr)
        else:
            return name
    raise SystemExit("bench.train: none of the data sets is here")


if __name__ == "__main__":
    main()
