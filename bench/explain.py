"""`make bench-explain`: what small models look at, that were trained alike on pictures whose object is known.

    python -m bench.explain [--variants ...] [--seeds ...] [--out DIR]

Trains every variant from every seed and measures: accuracy; the fall of the class's probability as patches are deleted; how well
maps find the object's box; how close Linear-InfSA's weights come to the Perron eigenvector. Beside them stand maps that know
nothing, and what the paper reports of ImageNet. What is done stays in OUT while the recipe stays the same, so that a run that was
stopped goes on. Writes table.txt, results.json and maps.png.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from infsa_kernels.explain import (
    attention_graphs,
    attention_maps,
    deletion_curve,
    gaussian_maps,
    localisation,
    random_maps,
)
from infsa_kernels.graph import eigenvector_alignment
from infsa_kernels.nn import InfViT

from . import scenes
from .scenes import Items, Scenes
from .trainer import fit

# As the paper has them: keys tied to queries in InfSA, and a twin that differs in nothing but its attention.
VARIANTS = {
    "linear_infsa": {"variant": "linear_infsa", "tied": True},
    "pure_infsa": {"variant": "pure_infsa", "tied": True},
    "multi_hop_infsa": {"variant": "multi_hop_infsa", "tied": True, "hops": 3},  # all of them take four times as long
    "softmax": {"variant": "softmax"},
}
SEEDS = (0, 1, 2)
SIDE, LARGE_SIDE = 96, 1024
SIZES = dict(img_size=SIDE, patch_size=12, in_chans=1, embed_dim=64, depth=4, num_heads=4)
TRAIN, TEST, MAPPED, LARGE = 12288, 1024, 128, 4
# 1,152 steps: 75 s of a core for a model, 18 minutes for all twelve with what is measured of them.
EPOCHS, BATCH, DECAY, CLIP, WARM_UP = 3, 32, 0.05, 1.0, 0.05
# Muon's of the blocks' matrices, with which all of these models learn in fewer steps; AdamW's of the rest.
MATRIX_RATE, RATE = 0.02, 2e-3
KINDS = ("class_token", "in", "rollout")
STEPS = 10

# Per cent: MoRF-AOC, ROC-AUC and PR-AUC of the paper's 4-layer models on ImageNet; its cosine and Spearman.
PAPER = {
    "softmax": {"morf": 42.6, "roc": 53.8, "pr": 56.2},
    "pure_infsa": {"morf": 71.7, "roc": 77.3, "pr": 72.4},
    "linear_infsa": {"morf": 76.0, "roc": 75.9, "pr": 76.1, "cosine": 98.5, "spearman": 93.7},
}
COLUMNS = {"accuracy": "accuracy", "morf": "MoRF-AOC", "lerf": "LeRF-AUC", "roc": "ROC-AUC", "pr": "PR-AUC"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.explain", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out" / "explain")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    train, test = scenes.items()
    backgrounds = scenes.textures()
    held_out = scenes.draw(test, backgrounds, TEST, _generator(1))
    large = scenes.draw(test, backgrounds, LARGE, _generator(3), LARGE_SIDE)
    results, models = {}, {}  # by variant; by seed, or of the first one
    for seed in args.seeds:
        for name in args.variants:
            model = trained(name, seed, train, backgrounds, out)
            models.setdefault(name, model)
            results.setdefault(name, {})[seed] = measured(name, seed, model, held_out, large, train.source, out)
    text = table(results, train.source)
    print(text)
    (out / "table.txt").write_text(text + "\n")
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(models, held_out, large, test.names).savefig(out / "maps.png", dpi=110)


def recipe(source: str) -> dict:
    """What a result depends on beside its variant and seed: one of another recipe is not taken from OUT."""
    names = ("TRAIN", "TEST", "MAPPED", "EPOCHS", "BATCH", "DECAY", "CLIP", "WARM_UP")
    names += ("MATRIX_RATE", "RATE", "STEPS", "LARGE", "LARGE_SIDE")
    return {"source": source, "variants": VARIANTS, **SIZES, **{name.lower(): globals()[name] for name in names}}


def trained(name: str, seed: int, items: Items, backgrounds: list[Tensor], out: Path) -> InfViT:
    """A model of InfViT after the one recipe of all."""
    torch.manual_seed(seed)
    model = InfViT(**SIZES, **VARIANTS[name], num_classes=len(items.names))
    kept = out / f"{name}-{seed}.pt"
    this = recipe(items.source)
    if kept.exists() and (done := torch.load(kept, weights_only=True))["recipe"] == this:
        model.load_state_dict(done["weights"])
        return model.eval()
    pictures, classes = _training_set(items, backgrounds, out)
    matrices = {id(p): p for p in model.blocks.parameters() if p.dim() == 2}
    others = [p for p in model.parameters() if id(p) not in matrices]
    optimizers = [
        torch.optim.Muon(matrices.values(), MATRIX_RATE, weight_decay=DECAY),
        torch.optim.AdamW(others, RATE, weight_decay=DECAY),
    ]
    schedule = dict(epochs=EPOCHS, batch=BATCH, warm_up=WARM_UP, clip=CLIP, contrast=32.0)
    for epoch, steps in itertools.groupby(
        fit(model, optimizers, pictures, classes, **schedule), lambda step: step.epoch
    ):
        loss = statistics.fmean(step.loss for step in steps)
        print(f"{name} seed {seed}: epoch {epoch + 1} of {EPOCHS}, loss {loss:.3f}", flush=True)
    torch.save({"recipe": this, "weights": model.state_dict()}, kept)
    return model.eval()


def _training_set(items: Items, backgrounds: list[Tensor], out: Path) -> tuple[Tensor, Tensor]:
    """The pictures of all runs, uint8, and their classes; a run's seed is that of its weights and its order."""
    kept, this = out / "training.pt", recipe(items.source)
    if kept.exists() and (done := torch.load(kept, weights_only=True))["recipe"] == this:
        return done["pictures"], done["classes"]
    generator = _generator(0)
    parts = [scenes.draw(items, backgrounds, 128, generator, SIDE) for _ in range(TRAIN // 128)]
    pictures = torch.cat([part.pictures.mul(32).add(127.5).round().clamp(0, 255).byte() for part in parts])
    classes = torch.cat([part.classes for part in parts])
    torch.save({"recipe": this, "pictures": pictures, "classes": classes}, kept)
    return pictures, classes


def measured(name: str, seed: int, model: InfViT, held_out: Scenes, large: Scenes, source: str, out: Path) -> dict:
    """All figures of a model, fractions of 1."""
    kept, this = out / f"{name}-{seed}.json", recipe(source)
    if kept.exists() and (done := json.loads(kept.read_text()))["recipe"] == this:
        return done["found"]
    with torch.no_grad():
        right = torch.cat([model(x).argmax(1) for x in held_out.pictures.split(128)]) == held_out.classes
    images, boxes = held_out.pictures[:MAPPED], held_out.boxes[:MAPPED]
    found = {"accuracy": right.double().mean().item(), "maps": {}}
    maps = {kind: attention_maps(model, images, kind=kind) for kind in KINDS}
    like = maps["class_token"]
    for kind, values in (maps | {"random": random_maps(like), "gaussian": gaussian_maps(like)}).items():
        areas = {
            order: deletion_curve(model, images, values, order, STEPS, baselines=False).area.mean().item()
            for order in ("morf", "lerf")
        }
        place = localisation(values, boxes, (SIDE, SIDE), baselines=False)
        found["maps"][kind] = areas | {"roc": place.roc_auc.mean().item(), "pr": place.pr_auc.mean().item()}
    if name != "softmax":
        graphs = attention_graphs(model, images[:32])
        # The two largest eigenvalues of a trained head may lie so close that its vector takes thousands of products to 1e-6.
        aligned = [eigenvector_alignment(graph.q, tol=1e-3) for graph in graphs]
        names = "cosine", "spearman", "uniform_cosine"
        found["alignment"] = {n: torch.stack([one[n] for one in aligned]).nanmean().item() for n in names}
        found["dead"] = torch.stack([graph.row_sums().amax(-1) == 0 for graph in graphs]).double().mean().item()
    found["large"] = _on_large_scenes(model, large)
    kept.write_text(json.dumps({"recipe": this, "found": found}))
    return found


def _on_large_scenes(model: InfViT, large: Scenes) -> dict:
    """Of pictures of ten times the side that the model was trained on: whether the class is found, and the object."""
    with torch.no_grad():
        right = model(large.pictures).argmax(1) == large.classes
    values = attention_maps(model, large.pictures)
    # The model pads a picture to whole patches; nothing of an object is there.
    more = [patches * SIZES["patch_size"] - LARGE_SIDE for patches in values.shape[1:]]
    place = localisation(values, F.pad(large.masks, (0, more[1], 0, more[0])))
    found = {"map": place, "random": place.baselines["random"], "gaussian": place.baselines["gaussian"]}
    return {"accuracy": right.double().mean().item()} | {
        name: {"roc": one.roc_auc.mean().item(), "pr": one.pr_auc.mean().item()} for name, one in found.items()
    }


def table(results: dict[str, dict[int, dict]], source: str) -> str:
    """Means over the seeds, their spread (largest - smallest), baselines, and the paper's figures."""
    seeds = ", ".join(map(str, next(iter(results.values()))))
    lines = [
        f"{source}: {TRAIN} scenes of {SIDE} x {SIDE} pixels, {EPOCHS} epochs; {TEST} others for accuracy, of which "
        f"{MAPPED} for maps",
        f"InfViT, {SIZES['depth']} layers, D = {SIZES['embed_dim']}, {SIZES['num_heads']} heads, patches of "
        f"{SIZES['patch_size']} x {SIZES['patch_size']}; seeds: {seeds}; means, +- half the range of several",
        "Per cent. Deleted patches are blurred; boxes are found at the pixels; maps are of the last layer",
        f"{LARGE_SIDE} x {LARGE_SIDE}: {LARGE} scenes of that size, with objects and patches of the same; the class token's map",
        "",
        f"{'':34}" + "".join(f"{title:>14}" for title in COLUMNS.values()),
    ]
    for name, by_seed in results.items():
        mine = list(by_seed.values())
        for kind in mine[0]["maps"]:
            cells = [_cell([r["accuracy"] for r in mine]) if kind == KINDS[0] else ""]
            cells += [_cell([r["maps"][kind][column] for r in mine]) for column in list(COLUMNS)[1:]]
            what = f"  {kind} map" if kind not in KINDS else kind
            lines.append(f"{name if kind == KINDS[0] else '':16}{what:18}" + "".join(f"{c:>14}" for c in cells))
        for which, what in (
            ("map", f"{LARGE_SIDE} x {LARGE_SIDE}"),
            ("random", "  random map"),
            ("gaussian", "  gaussian map"),
        ):
            big = [r["large"] for r in mine]
            cells = [_cell([r["accuracy"] for r in big]) if which == "map" else "", "", ""]
            cells += [_cell([r[which][column] for r in big]) for column in ("roc", "pr")]
            lines.append(f"{'':16}{what:18}" + "".join(f"{c:>14}" for c in cells))
        paper = PAPER.get(name, {})
        cells = [f"{paper[column]:.1f}" if column in paper else "" for column in COLUMNS]
        lines += [f"{'':16}{'the paper':18}" + "".join(f"{c:>14}" for c in cells), ""]
    lines.append(
        f"{'alignment with the eigenvector':34}{'cosine':>14}{'equal weights':>14}{'Spearman':>14}{'dead heads':>14}"
    )
    for name, by_seed in results.items():
        mine = list(by_seed.values())
        if "alignment" in mine[0]:
            names = "cosine", "uniform_cosine", "spearman"
            cells = [_cell([r["alignment"][n] for r in mine]) for n in names] + [_cell([r["dead"] for r in mine])]
            lines.append(f"{name:34}" + "".join(f"{c:>14}" for c in cells))
    cells = [f"{PAPER['linear_infsa']['cosine']:.1f}", "", f"{PAPER['linear_infsa']['spearman']:.1f}"]
    lines.append(f"{'linear_infsa, the paper':34}" + "".join(f"{c:>14}" for c in cells))
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    mean = f"{100 * sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} +-{50 * (max(values) - min(values)):.1f}"


def picture(models: dict, held_out: Scenes, large: Scenes, names: tuple[str, ...]):
    """Scenes beside what every variant's class token reads, first seed; the last scene is the first of the large ones."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    from infsa_kernels.explain.picture import MUTED, overlaid

    shown = [(held_out.pictures[i], held_out.boxes[i], held_out.classes[i]) for i in range(6)]
    shown.append((large.pictures[0], large.boxes[0], large.classes[0]))
    names_of_rows = list(models)
    size = 1 + len(names_of_rows), len(shown)
    figure, axes = plt.subplots(*size, figsize=(2.05 * size[1], 2.2 * size[0]))
    for column, (image, box, label) in enumerate(shown):
        photograph = (image[0] / 4 + 0.5).clamp(0, 1)[..., None].expand(-1, -1, 3).numpy()
        axes[0, column].imshow(photograph)
        size = "" if image.shape[-1] == SIDE else f", {image.shape[-1]} x {image.shape[-1]}"
        axes[0, column].set_title(names[label] + size, fontsize=10, color=MUTED)
        for row, name in enumerate(names_of_rows, 1):
            values = attention_maps(models[name], image[None])[0]
            axes[row, column].imshow(overlaid(photograph, values.numpy()))
            if column == 0:
                axes[row, 0].text(
                    -0.08, 0.5, name, rotation=90, ha="right", va="center", transform=axes[row, 0].transAxes
                )
        left, top, right, bottom = (box - 0.5).tolist()
        for ax in axes[:, column]:
            ax.add_patch(
                mpl.patches.Rectangle((left, top), right - left, bottom - top, fill=False, ec="#5ad1ff", lw=1.1)
            )
            ax.set_axis_off()
    figure.subplots_adjust(0.03, 0.01, 0.995, 0.95, 0.04, 0.04)
    return figure


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


if __name__ == "__main__":
    main()
