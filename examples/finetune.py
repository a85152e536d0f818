"""Turns the softmax attention of a pretrained Vision Transformer into InfSA and trains the model on.

    python examples/finetune.py --model timm:vit_small_patch16_224 --data FOLDER
    python examples/finetune.py --model transformers:google/vit-base-patch16-224 --data FOLDER

FOLDER is as for train_vit.py, or the name of a small data set. A converted model has softmax's weights and another attention: it
is worth little before it has been trained on, and OUT/log.csv shows how it comes back. Writes OUT/model.safetensors.
"""

import argparse
from pathlib import Path

import pictures
import runs
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from loading import data_sets
from timm.data import resolve_model_data_config
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from infsa_kernels.nn import convert, monitor


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.manual_seed(args.seed)
    model, args.size, normalisation = load(args.model, args.pretrained)
    train, test, _, classes = data_sets(args, normalisation)
    replace_head(model, len(classes))
    if args.variant != "softmax":
        report = convert(model, args.variant, score_floor=args.score_floor, inplace=True)
        print(report)
        if not report.converted:
            raise SystemExit(f"finetune: nothing of {args.model} could be converted; the report above says why")
    model.to(args.device)

    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, args.weight_decay), args.rate)
    per_epoch = len(train) // args.batch
    steps = args.epochs * per_epoch
    schedule = CosineLRScheduler(optimizer, steps, warmup_t=steps // 20, t_in_epochs=False)
    rows = [{"epoch": 0, "loss": float("nan"), "gradient_norm": float("nan")} | evaluate(model, test, args)]
    for epoch in range(args.epochs):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(runs.seed_of(args.seed, epoch)))
        keys = [(epoch, i) for i in order[: per_epoch * args.batch].tolist()]
        model.train()
        loss, largest = 0.0, 0.0
        batches = DataLoader(train, args.batch, sampler=keys, num_workers=args.workers)
        for step, (x, labels, _) in enumerate(tqdm(batches, f"epoch {epoch + 1}", leave=False), epoch * per_epoch):
            schedule.step_update(step)
            now = F.cross_entropy(scores(model, x.to(args.device)), labels.to(args.device))
            optimizer.zero_grad()
            now.backward()
            largest = max(largest, nn.utils.clip_grad_norm_(model.parameters(), args.clip).item())
            optimizer.step()
            loss += now.item() / per_epoch
        rows.append({"epoch": epoch + 1, "loss": loss, "gradient_norm": largest} | evaluate(model, test, args))
        print("  ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()), flush=True)
        args.out.mkdir(parents=True, exist_ok=True)
        runs.write_log(args.out, rows)
    safetensors.torch.save_model(model, args.out / "model.safetensors")
    print(f"{args.out / 'model.safetensors'}: to load it, make the model, convert it the same way, load_state_dict")


def load(name: str, pretrained: bool) -> tuple[nn.Module, int, tuple]:
    """The model, the side of the pictures that it takes, and their mean and deviation."""
    library, _, name = name.partition(":")
    try:
        if library == "timm":
            model = timm.create_model(name, pretrained=pretrained)
            config = resolve_model_data_config(model)
            return model, config["input_size"][-1], (list(config["mean"]), list(config["std"]))
        if library == "transformers":
            import transformers

            if pretrained:
                model = transformers.AutoModelForImageClassification.from_pretrained(name)
            else:
                config = transformers.AutoConfig.from_pretrained(name)
                model = transformers.AutoModelForImageClassification.from_config(config)
            return model, model.config.image_size, ([0.5] * 3, [0.5] * 3)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"finetune: --model {library}:{name} could not be loaded: {error}") from None
    raise SystemExit(f"finetune: --model is {library}:{name}, expected timm:NAME or transformers:NAME")


def replace_head(model: nn.Module, classes: int) -> None:
    """Another number of classes: a new last layer, which starts at 0."""
    if hasattr(model, "reset_classifier"):
        model.reset_classifier(classes)
    else:
        model.classifier = nn.Linear(model.config.hidden_size, classes)
        model.config.num_labels = classes
    head = model.get_classifier() if hasattr(model, "get_classifier") else model.classifier
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)


def scores(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@torch.no_grad()
def evaluate(model: nn.Module, test, args) -> dict[str, float]:
    model.eval()
    found, labels = [], []
    # A layer in which many heads have no positive score learns slowly: docs/nn.md.
    if args.variant == "softmax":
        layers = {}
    else:
        with monitor(model) as layers:
            scores(model, torch.stack([test[i][0] for i in range(min(64, len(test)))]).to(args.device))
    for x, here, _ in DataLoader(test, args.batch, num_workers=args.workers):
        found.append(scores(model, x.to(args.device)).float().cpu()[here >= 0])
        labels.append(here[here >= 0])
    found, labels = torch.cat(found), torch.cat(labels)
    dead = [share for tag, share in layers.items() if tag.startswith("dead_pairs/")]
    return {
        "test_loss": F.cross_entropy(found, labels).item(),
        "top1": accuracy(found, labels)[0].item(),
        "dead_pairs": 100 * sum(dead) / len(dead) if dead else 0.0,
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="timm:NAME or transformers:NAME; NAME may be a folder of transformers")
    add("--random", dest="pretrained", action="store_false", help="random weights, to try it out without a download")
    add("--variant", default="pure_infsa", help="pure_infsa, linear_infsa, multi_hop_infsa; softmax to compare with")
    add(
        "--score-floor", type=float, default=0.1, help="of linear_infsa, whose keys are not tied here; 0 is the paper's"
    )
    add("--data", required=True, help=f"a folder, or {', '.join(pictures.SMALL)}")
    add("--classes", type=int, help="how many there have to be")
    add("--out", type=Path, default=Path("finetuned"))
    add("--epochs", type=int, default=5)
    add("--batch", type=int, default=64)
    add("--rate", type=float, default=1e-4)
    add("--weight-decay", type=float, default=0.05)
    add("--clip", type=float, default=1.0, help="the gradient's norm")
    add("--crop", type=float, default=0.5, help="the least part of a picture that is cut out")
    add("--jitter", type=float, default=0.2, help="of colours")
    add("--rand-augment", action="store_true")
    add("--workers", type=int, default=0, help="processes that read pictures")
    add("--seed", type=int, default=0)
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.variant != "linear_infsa":
        args.score_floor = 0.0
    args.data = args.data if args.data in pictures.SMALL else Path(args.data)
    args.patch = None
    return args


if __name__ == "__main__":
    main()
