"""`python -m bench.extreme`: a whole InfViT on one picture of 9216 x 9216 pixels, 331,776 tokens, in bounded memory.

The picture goes through patches, layers and head of an untrained model; without gradients, tokens pass patch embedding and MLP
in chunks, so that a layer's input and output, two (N, D) tensors, are all that grows with the picture. Prints the time of every
part and the peak resident memory of the process. On 2 cores the four layers take a few minutes.
"""

import argparse
import resource
import sys
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

from infsa_kernels.nn import InfViT

from .image import PATCH, photograph

DEPTH = 4


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    side = args.pixels // PATCH
    print(f"{args.pixels} x {args.pixels} pixels, {side**2:,} tokens, 4 layers of Linear-InfSA, D = 1024, float32")
    began = time.perf_counter()
    images = picture(args.pixels)
    torch.manual_seed(0)
    model = InfViT(depth=DEPTH).eval()
    before = resident()
    print(f"picture and model: {time.perf_counter() - began:.1f} s, {before / 1e9:.2f} GB resident")

    seconds = timed_parts(model, side**2)
    began = time.perf_counter()
    with torch.inference_mode():
        features = model.forward_features(images)
    total = time.perf_counter() - began
    for name, took in seconds.items():
        print(f"  {name:<12}{took:9.2f} s")
    print(f"  {'in all':<12}{total:9.2f} s, {side**2 / total:,.0f} tokens/s")
    tokens = features.nbytes
    print(
        f"peak {peak() / 1e9:.2f} GB resident: {before / 1e9:.2f} GB before, one (N, D) tensor is {tokens / 1e9:.2f} GB"
    )
    finite = bool(features.isfinite().all())
    print("every feature is finite" if finite else "WRONG: features are not finite")
    return int(not finite)


def picture(pixels: int) -> Tensor:
    """(1, 3, pixels, pixels), each channel normalised."""
    image = torch.from_numpy(photograph(pixels)).permute(2, 0, 1).contiguous()
    for channel in image:
        channel -= channel.mean()
        channel /= channel.std()
    return image[None]


def timed_parts(model: InfViT, tokens: int) -> dict[str, float]:
    """Seconds of patch embedding, attention and MLP, filled in while the model runs, behind a progress bar."""
    seconds = dict.fromkeys(("patches", "attention", "MLP"), 0.0)
    bar = tqdm(total=tokens * (len(model.blocks) + 1), unit="token", unit_scale=True, dynamic_ncols=True)

    def watch(module: nn.Module, name: str) -> None:
        def start(module, args):
            module.began = time.perf_counter()

        def stop(module, args, out):
            seconds[name] += time.perf_counter() - module.began
            if name != "attention":
                bar.update(out.shape[-2])
                bar.set_description(name)
            if bar.n >= bar.total:
                bar.close()

        module.register_forward_pre_hook(start)
        module.register_forward_hook(stop)

    watch(model.patch_embed, "patches")
    for block in model.blocks:
        watch(block.attn, "attention")
        watch(block.mlp, "MLP")
    return seconds


def resident() -> int:
    """Bytes of this process that are in memory now, where the system tells; else the most there ever were."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("VmRSS"))
    except OSError:
        return peak()


def peak() -> int:
    """The most bytes of this process that were ever in memory."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.extreme", description=__doc__)
    parser.add_argument(
        "--pixels", type=int, default=9216, help="side of the picture (default 9216, the paper's largest)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
