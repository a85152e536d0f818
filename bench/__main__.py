"""InfSA among the mechanisms of the field and beside what the machine needs at least.

    operator   q, k, v given                 layer   tokens -> attention sub-layer -> tokens, D = 1024
    model      a picture -> class scores of a 4- or 24-layer Vision Transformer

Without options: the main figures, in at most 3 minutes of measuring. Each turn runs in a process of its own and becomes rows of
OUT/rows.jsonl. What has its row is not measured again (--again does), so an interrupted run goes on.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from . import cases, compare, peers, report, streamed
from .engine import passes
from .image import PATCH
from .machine import ROOT
from .run import describe, live, run

OWN_PLAN = ("level", "only", "sizes", "phase", "way", "depth", "dtype", "layout", "batch")


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.file:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
        kind = dtype[args.dtype or cases.DTYPE[args.device]]
        streamed.main(args.file, args.pixels, args.dim, args.depth[0], kind, args.device, args.out)
        return 0
    if args.compare:
        return compare.show(*(compare.load(path) for path in args.compare))
    if args.versus:
        plan, out = versus_plan(args), args.out / "versus"
        return compare.versus(args.versus, plan, args.device, args.rounds, args.budget, out)
    if args.report:
        return show(args, "tables")
    rows = []
    for level, turns, minutes in chosen(args):
        if args.plan:
            measured = sum(len(turn["names"]) * len(passes(turn)) for turn in turns)
            print(f"{level}: {len(turns)} turns of {measured} rows, at most {minutes:g} minutes")
            print("\n".join(f"  {describe(turn)}: {', '.join(turn['names'])}" for turn in turns))
            continue
        with live(turns, minutes) as told:
            rows += run(turns, args.out, args.device, minutes, args.budget, told, args.limit, args.again)
    if args.plan:
        return 0
    show(args, "screen" if not (args.all or args.own_plan) else "tables")
    return int(any(row["status"] == "wrong" for row in rows))


def chosen(args) -> list[tuple[str, list[dict], float]]:
    """(level, turns, minutes) for each part of a run."""
    minutes, levels = cases.MINUTES[args.device], args.level or cases.LEVELS
    if args.all:
        plans = {level: cases.everything(level, args.device, args.quick) for level in levels}
    elif args.own_plan:
        sizes = cases.QUICK_SIZES if args.quick else (1024,)
        plans = {level: asked(args, level, cases.FIELD[level], sizes) for level in levels}
    else:
        plans = {"main": cases.main(args.device, args.quick)}
    given = args.minutes or (cases.QUICK_MINUTES if args.quick else None)
    return [(level, turns, given or minutes.get(level, minutes["main"])) for level, turns in plans.items()]


def asked(args, level: str, names: list[str], sizes: tuple[int, ...]) -> list[dict]:
    """The turns that the options choose; ``names`` and ``sizes`` where they do not say which."""
    case = {f: getattr(args, f) for f in ("dtype", "layout", "batch") if getattr(args, f)}
    names, sizes = args.only or names, args.sizes or sizes
    return cases.turns(level, names, sizes, args.device, args.phase, args.way, depths=args.depth, **case)


def versus_plan(args) -> list[dict]:
    usual = compare.VERSUS
    levels = args.level or usual["levels"]
    return [turn for level in levels for turn in asked(args, level, usual["names"], usual["sizes"])]


def show(args, what: str) -> int:
    """Draws and writes what the folder has, and prints it."""
    rows, files, left_out = report.write(args.out)
    if left_out:
        print(f"{left_out} rows of other machines or older commits are left out", file=sys.stderr)
    if not rows:
        print(f"No rows.jsonl is in {args.out}: run `make bench` first", file=sys.stderr)
        return 1
    shown = [path for path in files if path.stem in ("overview", "layer_speed_up", "report")]
    print(report.screen(rows, shown) if what == "screen" else report.text(rows))
    if what != "screen":
        print(f"\nWritten to {args.out}: rows.jsonl, {', '.join(path.name for path in files)}")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    known = f"mechanisms, as softmax,mlla+local,linear_infsa@triton; there are {', '.join(peers.MECHANISMS)}"
    add("--all", action="store_true", help="everything instead of the main figures, each level in its minutes")
    add("--level", type=_of(cases.LEVELS), help="of operator,layer,model")
    add("--only", type=_of(peers.MECHANISMS), help=known)
    add("--sizes", type=_sizes, help="sides of the picture in pixels, multiples of 16")
    add("--phase", type=_of(("fwd", "train")), help="of fwd,train (default: both)")
    add("--way", type=_of(("eager", "compile", "graph")), help="of eager,compile,graph (default: eager)")
    add("--depth", type=_of(cases.DEPTHS, int), help="layers of the models (default: 4,24)")
    add("--dtype", choices=("fp32", "bf16", "fp16", "fp64"), help="default: fp32 on a CPU, bf16 on a GPU")
    add("--layout", choices=("bnhd", "bhnd"), help="of q, k and v in memory (default: bnhd)")
    add("--batch", type=int, help="pictures in a call (default: 1)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: cuda if there is one")
    add("--quick", action="store_true", help="small pictures: under two minutes")
    add("--again", action="store_true", help="measure also what has its row")
    add("--minutes", type=float, help="the most that the run, or each level of --all, takes")
    add("--limit", type=float, help="seconds of one mechanism, with its building, check and compilation")
    add("--budget", type=float, help="seconds of calls per mechanism")
    add("--out", type=Path, default=ROOT / "bench" / "out", help="folder of rows.jsonl, plots, table and page")
    add("--plan", action="store_true", help="measure nothing: list the turns, and the minutes that they may take")
    add(
        "--file",
        type=Path,
        help="measure one model on this picture, streamed: .npy, TIFF or Zarr; see bench/streamed.py",
    )
    add("--pixels", type=int, help="side of the picture that is made where --file is not there")
    add("--dim", type=int, default=1024, help="size D of the tokens of --file's model")
    add("--report", action="store_true", help="measure nothing: draw and print what the folder has")
    add("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two rows.jsonl: the times of B beside those of A")
    add("--versus", metavar="REV", help="this working tree beside a commit, branch or tag, in turn")
    add("--rounds", type=int, default=5, help="times that --versus measures each turn on each side")
    args = parser.parse_args(arguments)
    args.own_plan = any(getattr(args, name) for name in OWN_PLAN)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.phase, args.way = args.phase or ("fwd", "train"), args.way or ("eager",)
    args.depth = args.depth or cases.DEPTHS
    args.budget = args.budget or (cases.QUICK_BUDGET if args.quick else cases.BUDGET)
    return args


def _of(known: Iterable, kind=str):
    """Parts of a list with commas, each one of those known; a mechanism may name its backend."""

    def parts(value: str) -> list:
        found = [kind(part) for part in value.split(",")]
        bases = {peers.base(part) if known is peers.MECHANISMS else part for part in found}
        if unknown := sorted(bases - set(known), key=str):
            raise argparse.ArgumentTypeError(
                f"no {', '.join(map(str, unknown))}; there are {', '.join(map(str, known))}"
            )
        return found

    return parts


def _sizes(value: str) -> list[int]:
    sizes = [int(part) for part in value.split(",")]
    if any(size < 112 or size % PATCH for size in sizes):
        why = "mechanisms pool 7 x 7 landmarks from the grid"
        raise argparse.ArgumentTypeError(f"a size is a multiple of {PATCH} from 112: {why}")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
