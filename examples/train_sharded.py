"""Trains InfViT on pictures that no process has whole: each rank makes and sees a strip of them.

    torchrun --nproc-per-node 4 examples/train_sharded.py --sequence 2

A mesh of data x sequence: the ranks of a sequence share every picture, those of data have different ones. Parameters are sharded
over all of them by FSDP2. The pictures have 0 to 3 bright squares anywhere: to count them takes the whole picture.
"""

import argparse
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from infsa_kernels.distributed import parallelize
from infsa_kernels.nn import InfViT

PATCH, SQUARE, CLASSES = 8, 16, 4

# A block also gives what its attention added: one row, repeated as a view, that nothing writes to.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequence", type=int, default=2, help="ranks that share a picture")
    parser.add_argument("--pixels", type=int, default=256, help="side of a picture")
    parser.add_argument("--batch", type=int, default=16, help="pictures in a step of each sequence")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--variant", default="linear_infsa", choices=("linear_infsa", "pure_infsa"))
    parser.add_argument(
        "--checkpoint", action="store_true", help="keep only the input of every block for the backward pass"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile every block")
    parser.add_argument("--timeout", type=int, default=120, help="seconds after which a rank that waits gives up")
    return parser.parse_args()


def strips(seed: int, batch: int, pixels: int, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of ``batch`` pictures, (batch, 1, rows, pixels), and how many squares the whole pictures have."""
    places = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (batch,), generator=places)
    corners = torch.randint(pixels - SQUARE, (batch, CLASSES, 2), generator=places)
    noise = torch.Generator().manual_seed(seed * 1009 + rows.start)
    pictures = 0.1 * torch.randn(batch, 1, len(rows), pixels, generator=noise)
    for picture, label, marks in zip(pictures, labels.tolist(), corners.tolist()):
        for y, x in marks[:label]:
            top, bottom = max(y - rows.start, 0), max(y + SQUARE - rows.start, 0)
            picture[:, top:bottom, x : x + SQUARE] = 1
    return pictures, labels


def main() -> None:
    given = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=given.timeout))
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % given.sequence or given.pixels % PATCH:
        raise SystemExit(
            f"--sequence {given.sequence} has to divide the {world} ranks, and {PATCH} has to divide --pixels {given.pixels}"
        )
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (world // given.sequence, given.sequence), mesh_dim_names=("data", "sequence"))
    data, strip = mesh["data"].get_local_rank(), mesh["sequence"].get_local_rank()

    torch.manual_seed(0)
    model = InfViT(given.pixels, PATCH, 1, CLASSES, 64, 2, 4, variant=given.variant, pool="mean").to(device)
    model.set_grad_checkpointing(given.checkpoint)
    # First whose tokens are whose, then whose parameters.
    parallelize(model, mesh["sequence"])
    for block in model.blocks:
        if given.compile:
            block.compile()
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    patches = given.pixels // PATCH
    rows = range(patches * strip // given.sequence * PATCH, patches * (strip + 1) // given.sequence * PATCH)
    for step in range(given.steps):
        pictures, labels = (t.to(device) for t in strips(step * world + data, given.batch, given.pixels, rows))
        scores = model(pictures)
        loss = F.cross_entropy(scores, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 9 or step == given.steps - 1):
            right = (scores.argmax(1) == labels).float().mean()
            print(f"step {step + 1}: loss {loss.item():.3f}, {right.item():.0%} of this batch right", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
