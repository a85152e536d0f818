"""What a picture will cost: `python -m infsa_kernels.streaming --plan --pixels 46080 --embed-dim 256`.

Nothing is predicted and no weights are made: operations and bytes follow from the sizes. Rates that are not given are measured
here, in half a minute; with those of another machine it is a plan for that one.
"""

import argparse
import tempfile

import torch

from ..nn.vit import CHUNK_TOKENS, InfViT
from .plan import described, measured_disk, measured_operations, plan
from .predict import GPU_CHUNK_TOKENS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m infsa_kernels.streaming", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--plan", action="store_true", required=True, help="what there is: predicting is InfViT.predict_file")
    add("--pixels", type=int, required=True, help="side of a square picture")
    add("--embed-dim", type=int, default=1024)
    add("--depth", type=int, default=4)
    add("--patch-size", type=int, default=16)
    add("--pool", choices=("cls", "mean"), default="cls")
    add("--dtype", choices=DTYPES, default="fp32", help="of the model and the tokens between its layers")
    add("--pixel-bytes", type=int, choices=(1, 2, 4), default=1, help="of one channel of the picture")
    add("--map-layer", type=int, help="a layer whose attention map is asked for")
    add("--work-dir", help="folder of the tokens; default: they stay in memory")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--operations", type=float, help="of matrix products a second, in place of those measured here")
    add("--read", type=float, help="bytes of tokens a second, in place of those measured in --work-dir")
    add("--write", type=float, help="the same, written")
    add("--picture", type=float, help="bytes of the picture's file a second (default: as --read)")
    args = parser.parse_args(arguments)
    sizes = dict(patch_size=args.patch_size, embed_dim=args.embed_dim, depth=args.depth, pool=args.pool)
    model = InfViT(args.patch_size, num_classes=0, device="meta", dtype=DTYPES[args.dtype], **sizes)
    found = plan(model, args.pixels, args.pixels, args.map_layer, args.pixel_bytes)
    rates = {"operations": args.operations, "read": args.read, "write": args.write}
    if not args.operations:
        device = torch.device(args.device)
        tokens = GPU_CHUNK_TOKENS if device.type == "cuda" else CHUNK_TOKENS
        rates["operations"] = measured_operations(model, tokens, device)
    if not (args.read and args.write):
        read, write = measured_disk(args.work_dir or tempfile.gettempdir())
        rates["read"], rates["write"] = args.read or read, args.write or write
    if args.picture:
        rates["picture"] = args.picture
    print(described(found, rates, args.work_dir or "memory"))


if __name__ == "__main__":
    main()
