"""Trains an InfViT with the paper's recipe, on a folder of pictures or on a small data set that a package brings.

    python examples/train_vit.py --data digits
    torchrun --nproc-per-node 8 examples/train_vit.py --data /data/imagenet --amp bfloat16 --compile

A folder has train/CLASS/*.jpg and val/CLASS/*.jpg, as ImageNet has. OUT (--out) gets checkpoints, log.csv and curves.png. Killed
at any moment, the same command goes on where the last checkpoint was made, and gives the same numbers: what is random depends on
the seed, the epoch and the picture, and on nothing that was drawn before.
"""

import argparse
import contextlib
import math
import os
import time
from pathlib import Path

import pictures
import runs
import torch
import torch.distributed as dist
import torch.nn.functional as F
from loading import data_sets, drawn_from, evenly
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, accuracy
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as full
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from infsa_kernels.nn import InfViT, monitor

# Of a folder the paper's recipe for ImageNet; of a small data set one of minutes.
FOLDER = dict(size=224, patch=16, dim=1024, epochs=300, warm_up=10, batch=1024, rate=1e-3, crop=0.08, jitter=0.4)
SMALL = dict(size=None, patch=None, dim=128, epochs=30, warm_up=3, batch=64, rate=1e-3, crop=0.5, jitter=0.2)


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    rank, world = start(args)
    train, test, channels, classes = data_sets(args)
    torch.manual_seed(args.seed)
    model = InfViT(
        args.size, args.patch, channels, len(classes), args.dim, args.depth, args.heads, variant=args.variant,
        tied=args.tied, score_floor=args.score_floor, pool=args.pool, device=args.device,
    )  # fmt: skip
    run = Run(args, model, train, test, rank, world)
    run.resume()
    run.train()
    if dist.is_initialized():
        dist.destroy_process_group()


class Run:
    """The state of a training and what changes it. A step is an update of the weights, by one batch of all processes."""

    def __init__(self, args, model: InfViT, train: Dataset, test: Dataset, rank: int, world: int):
        self.args, self.rank, self.world = args, rank, world
        self.train_data, self.test_data = train, test
        self.per_epoch = len(train) // args.batch
        if not self.per_epoch:
            raise SystemExit(f"train_vit: --batch is {args.batch}, expected at most the {len(train)} training pictures")
        self.steps, self.step = args.epochs * self.per_epoch, 0
        self.rows: list[dict] = []  # of log.csv
        self.epoch: dict[str, float] = {}  # what is summed up for the next one

        self.ema = ModelEmaV3(model, args.ema) if args.ema else None
        self.plain, self.model = model, self._distributed(model)
        if self.ema is not None and args.fsdp:
            shard(self.ema.module, args.device)
        groups = param_groups_weight_decay(model, args.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, args.rate, betas=(0.9, 0.999))
        self.schedule = CosineLRScheduler(
            self.optimizer, self.steps, warmup_t=args.warm_up * self.per_epoch, warmup_lr_init=1e-6, t_in_epochs=False
        )
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.amp == "float16")
        self.mixup = v2.MixUp(alpha=args.mixup, num_classes=model.head.out_features) if args.mixup else None

    def _distributed(self, model: InfViT) -> nn.Module:
        if self.args.compile:
            model.compile()
        if self.args.fsdp:
            shard(model, self.args.device)
        elif self.world > 1:
            return nn.parallel.DistributedDataParallel(model)
        return model

    def train(self) -> None:
        """To the last epoch. A checkpoint every epoch, and every so many minutes."""
        args, saved_at = self.args, time.monotonic()
        order = Order(len(self.train_data), self)
        batches = iter(DataLoader(self.train_data, batch_sampler=order, num_workers=args.workers))
        total, done = self.steps * args.batch, self.step * args.batch
        with tqdm(total=total, initial=done, unit=" images", unit_scale=True, disable=self.rank > 0) as bar:
            while self.step < self.steps:
                begin = time.monotonic()
                self._update(batches)
                self.epoch["seconds"] += time.monotonic() - begin
                bar.update(args.batch)
                if self.step % self.per_epoch == 0:
                    bar.set_postfix_str(self._end_epoch())
                if self.step % self.per_epoch == 0 or self._agreed(time.monotonic() - saved_at > 60 * args.minutes):
                    self.save()
                    saved_at = time.monotonic()

    def _update(self, batches) -> None:
        args = self.args
        if self.step % self.per_epoch == 0:
            self.epoch = dict.fromkeys(("loss", "gradient_norm", "dead_pairs", "skipped", "seconds"), 0.0)
        self.schedule.step_update(self.step)
        last_of_epoch = (self.step + 1) % self.per_epoch == 0
        watch = last_of_epoch and args.variant != "softmax"
        self.model.train()
        with monitor(self.plain) if watch else contextlib.nullcontext({}) as found:
            for part in range(args.accumulate):
                x, classes, skipped = next(batches)
                x, classes = x.to(args.device, non_blocking=True), classes.to(args.device, non_blocking=True)
                with self._gradients_are_shared(part + 1 == args.accumulate):
                    loss = self._loss(x, classes) / args.accumulate
                    self.scaler.scale(loss).backward()
                self.epoch["loss"] += loss.item() / self.per_epoch
                self.epoch["skipped"] += skipped.sum().item()
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.plain.parameters(), args.clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.plain, self.step)
        norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
        if math.isfinite(norm):  # GradScaler leaves out the step of one that is not
            self.epoch["gradient_norm"] = max(self.epoch["gradient_norm"], norm)
        dead = [share for tag, share in found.items() if tag.startswith("dead_pairs/")]
        self.epoch["dead_pairs"] = 100 * sum(dead) / len(dead) if dead else 0.0

    def _loss(self, x: Tensor, classes: Tensor) -> Tensor:
        if self.mixup is not None:
            with drawn_from(self.args.seed, self.step, self.rank):
                x, classes = self.mixup(x, classes)
        with self._autocast():
            return F.cross_entropy(self.model(x), classes, label_smoothing=self.args.smoothing)

    def _autocast(self):
        dtype = getattr(torch, self.args.amp or "float32")
        return torch.autocast(self.args.device.type, dtype, enabled=bool(self.args.amp))

    def _gradients_are_shared(self, shared: bool):
        """Processes add up their gradients once a step."""
        if self.args.fsdp:
            self.model.set_requires_gradient_sync(shared)
        elif self.world > 1 and not shared:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _end_epoch(self) -> str:
        """A row of the log; in a few words."""
        found = self.epoch | dict(zip(("test_loss", "top1", "top5", "test_skipped"), self.evaluate(self.model)))
        if self.ema is not None:
            found["ema_top1"] = self.evaluate(self.ema.module)[1]
        loss, skipped = self._sum(found["loss"], found["skipped"])
        speed = self.per_epoch * self.args.batch / found.pop("seconds")
        found |= {"loss": loss / self.world, "skipped": round(skipped), "test_skipped": round(found["test_skipped"])}
        row = {"epoch": self.step // self.per_epoch, "step": self.step, "rate": self.optimizer.param_groups[0]["lr"]}
        self.rows.append(row | found | {"images_per_second": speed})
        if self.rank == 0:
            runs.write_log(self.args.out, self.rows)
        return f"loss {found['loss']:.3f}, top-1 {found['top1']:.2f}%, {found['skipped']} skipped"

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> list[float]:
        """Loss, top-1 and top-5 in per cent, and how many pictures could not be read: of all processes' test pictures."""
        model.eval()
        batch = -(-self.args.batch // self.world)
        mine = evenly(len(self.test_data), self.rank, self.world)
        loss, top1, top5, skipped = (AverageMeter() for _ in range(4))
        for x, classes, missing in DataLoader(self.test_data, batch, sampler=mine, num_workers=self.args.workers):
            with self._autocast():
                scores = model(x.to(self.args.device)).float()
            classes = classes.to(self.args.device)
            scores, classes = scores[classes >= 0], classes[classes >= 0]
            skipped.update(1.0, missing.sum().item())
            if len(classes):
                loss.update(F.cross_entropy(scores, classes).item(), len(classes))
                for meter, share in zip((top1, top5), accuracy(scores, classes, (1, 5))):
                    meter.update(share.item(), len(classes))
        count, *sums, missing = self._sum(loss.count, loss.sum, top1.sum, top5.sum, skipped.sum)
        if not count:
            raise SystemExit("train_vit: no test picture can be read")
        return [total / count for total in sums] + [missing]

    def save(self) -> None:
        weights = {"model": full.get_model_state_dict(self.model, options=WHOLE)}
        if self.ema is not None:
            weights["ema"] = full.get_model_state_dict(self.ema.module, options=WHOLE)
        optimizer = full.get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        mean = dict(zip(self.epoch, (total / self.world for total in self._sum(*self.epoch.values()))))
        state = {"step": self.step, "epoch": mean, "rows": self.rows, "recipe": recipe(self.args)}
        state |= {"optimizer": optimizer, "scaler": self.scaler.state_dict()}
        if self.rank == 0:
            runs.save(self.args.out, self.step, weights, state)
        if self.world > 1:
            dist.barrier()

    def resume(self) -> None:
        """Goes on from the newest checkpoint, if there is one."""
        checkpoint = runs.latest(self.args.out)
        if checkpoint is None:
            return
        weights, state = runs.load(checkpoint)
        for name, now in recipe(self.args).items():
            if state["recipe"].get(name) != now:
                raise SystemExit(
                    f"train_vit: {name} is {now!r}, but {checkpoint} was trained with {state['recipe'].get(name)!r}; give "
                    "that, or another --out"
                )
        full.set_model_state_dict(self.model, weights["model"], options=WHOLE)
        if self.ema is not None:
            full.set_model_state_dict(self.ema.module, weights["ema"], options=WHOLE)
        full.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=WHOLE)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch, self.rows = state["step"], state["epoch"], state["rows"]

    def _sum(self, *numbers: float) -> list[float]:
        """Over all processes."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.args.device)
        dist.all_reduce(total)
        return total.tolist()

    def _agreed(self, condition: bool) -> bool:
        """What one process finds, all do, at the same step."""
        return self._sum(float(condition))[0] > 0


# Checkpoints hold whole tensors, whatever they are sharded over, and go on with any number of processes.
WHOLE = full.StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: InfViT, device: torch.device) -> None:
    """FSDP2: every block's parameters are gathered when it runs."""
    mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


class Order:
    """The batches of this process, from the run's next step on: lists of (epoch, index)."""

    def __init__(self, pictures: int, run: Run):
        self.pictures, self.run = pictures, run
        self.part = run.args.batch // (run.world * run.args.accumulate)

    def __iter__(self):
        run = self.run
        first, done = divmod(run.step, run.per_epoch)
        for epoch in range(first, run.args.epochs):
            generator = torch.Generator().manual_seed(runs.seed_of(run.args.seed, epoch))
            order = torch.randperm(self.pictures, generator=generator).tolist()
            for at in range(done * run.args.batch, run.per_epoch * run.args.batch, run.args.batch):
                mine = [(epoch, i) for i in order[at : at + run.args.batch][run.rank :: run.world]]
                for begin in range(0, len(mine), self.part):
                    yield mine[begin : begin + self.part]
            done = 0

    def __len__(self):
        return (self.run.steps - self.run.step) * self.run.args.accumulate


def start(args) -> tuple[int, int]:
    """The number of this process and how many there are: torchrun says it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.fsdp or world > 1:
        if "RANK" not in os.environ:
            raise SystemExit("train_vit: --fsdp needs torchrun: torchrun --nproc-per-node N examples/train_vit.py ...")
        if args.device.type == "cuda":
            args.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    if args.batch % (world * args.accumulate):
        raise SystemExit(
            f"train_vit: --batch is {args.batch}, expected a multiple of {world * args.accumulate}: processes x --accumulate"
        )
    return int(os.environ.get("RANK", 0)), world


def recipe(args) -> dict:
    """What the curve depends on."""
    where = ("out", "data", "device", "workers", "minutes", "compile", "fsdp")
    return {name: value for name, value in vars(args).items() if name not in where} | {"data": str(args.data)}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help=f"a folder, or {', '.join(pictures.SMALL)}")
    add("--out", type=Path, default=Path("out"), help="the folder of checkpoints, log.csv and curves.png")
    add("--classes", type=int, help="how many there have to be")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("model").add_argument
    add("--variant", default="linear_infsa", choices=("linear_infsa", "pure_infsa", "multi_hop_infsa", "softmax"))
    add("--untied", dest="tied", action="store_false", help="keys have a projection of their own")
    add("--score-floor", type=float, default=0.0, help="of linear_infsa: 0 is the paper's; 0.1 trains without clipping")
    add("--depth", type=int, default=4)
    add("--heads", type=int, help="of size 16 if linear, else 64, by default")
    add("--pool", default="cls", choices=("cls", "mean"))
    for name in ("dim", "size", "patch"):
        add(f"--{name}", type=int)
    add = parser.add_argument_group("recipe").add_argument
    for name, kind, what in (
        ("epochs", int, ""), ("warm_up", int, "epochs"), ("batch", int, "of all processes"), ("rate", float, "of AdamW"),
        ("crop", float, "the least part of a picture that is cut out"), ("jitter", float, "of colours; 0 for none"),
    ):  # fmt: skip
        default = f"{FOLDER[name]:g} for a folder, else {SMALL[name]:g}"
        add(f"--{name.replace('_', '-')}", type=kind, help=f"{what}{what and '; '}{default}")
    add("--weight-decay", type=float, default=0.05)
    add("--clip", type=float, default=1.0, help="the gradient's norm; 0 for no limit")
    add("--smoothing", type=float, default=0.1, help="of labels")
    add("--mixup", type=float, default=0.0, help="alpha of mixup; 0 for none")
    add("--rand-augment", action="store_true")
    add("--ema", type=float, default=0.0, help="decay of an average of the weights, as 0.9999; 0 for none")
    add = parser.add_argument_group("how it runs").add_argument
    add("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--amp", choices=("bfloat16", "float16"), help="autocast; float16 with a GradScaler")
    add("--accumulate", type=int, default=1, help="parts of a process's batch that go one after another")
    add("--fsdp", action="store_true", help="FSDP2 in place of DDP")
    add("--compile", action="store_true")
    add("--workers", type=int, default=0, help="processes that read pictures")
    add("--minutes", type=float, default=10, help="between checkpoints; one is made after every epoch too")
    args = parser.parse_args(argv)
    small = args.data in pictures.SMALL
    args.data = args.data if small else Path(args.data)
    for name, default in (SMALL if small else FOLDER).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.variant == "softmax":
        args.tied = False
    if args.fsdp and args.amp == "float16":
        parser.error("--amp float16 has no GradScaler with --fsdp; give --amp bfloat16")
    return args


if __name__ == "__main__":
    main()
