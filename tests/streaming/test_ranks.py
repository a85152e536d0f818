"""Processes that share a picture: the scores and the map of one process, to the same bits after an interruption."""

import os

import numpy as np
import pytest
import torch
import torch.multiprocessing
from torch.testing import assert_close

from infsa_kernels.nn import InfViT
from infsa_kernels.streaming import predict, predict_file

WORLD = 2


def model(pool):
    torch.manual_seed(0)
    made = InfViT(16, 4, 3, 5, 32, 2, 4, pool=pool, score_floor=0.3 if pool == "mean" else 0.0).eval()
    torch.nn.init.normal_(made.head.weight)
    return made


class Interrupted(Exception):
    pass


def on_a_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    group = torch.distributed.group.WORLD

    def run(made, path="picture.npy", **arguments):
        usual = {"attention_map": f"{folder}/map.tif", "map_layer": 0, "chunk_tokens": 48, "progress": False}
        return predict_file(made, f"{folder}/{path}", group=group, **usual | arguments)

    for pool in ("cls", "mean"):
        made = model(pool)
        alone = predict_file(
            made, f"{folder}/picture.npy", attention_map=f"{folder}/{rank}.tif", map_layer=0, progress=False
        )
        together = run(made)
        assert_close(together.scores, alone.scores, rtol=1e-5, atol=1e-5)
        assert_close(together.attention, alone.attention)
        assert 0 < together.bytes_read < alone.bytes_read

        # One process loses its state, the other is interrupted in a later pass.
        go, passes = predict._Run._go, []

        def interrupted(self, this, number, go=go, passes=passes):
            if number == 3:
                raise Interrupted
            passes.append(number)
            return go(self, this, number)

        predict._Run._go = interrupted
        with pytest.raises(Interrupted):
            run(made, work_dir=f"{folder}/work")
        torch.distributed.barrier()
        if rank == 1:
            os.unlink(os.path.join(folder, "work", "state-1-of-2.pt"))
        predict._Run._go = lambda self, this, number: passes.append(number) or go(self, this, number)
        passes.clear()
        resumed = run(made, work_dir=f"{folder}/work")
        predict._Run._go = go
        assert passes == list(range(3 if rank == 0 else 0, passes[-1] + 1))
        assert torch.equal(resumed.scores, together.scores) and torch.equal(resumed.attention, together.attention)

    # What one process cannot do, none waits for.
    with pytest.raises(FileNotFoundError if rank == 1 else RuntimeError, match="No such file"):
        run(made, "picture.npy" if rank == 0 else "none.npy")
    with torch.no_grad():
        made.head.bias += rank
    if rank == 1:
        with pytest.raises(ValueError, match="rank 1 of 2 has another model than rank 0"):
            run(made)
    else:
        with pytest.raises(RuntimeError, match="rank 1 of 2 cannot start: ValueError"):
            run(made)
    # More processes than rows of patches.
    one_row = run(model("mean"), "row.npy")
    assert_close(one_row.scores, predict_file(model("mean"), f"{folder}/row.npy", progress=False).scores)
    torch.distributed.destroy_process_group()


def test_two_processes_share_a_picture(tmp_path):
    pytest.importorskip("tifffile")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "picture.npy", rng.integers(0, 256, (83, 61, 3), dtype=np.uint8))
    np.save(tmp_path / "row.npy", rng.integers(0, 256, (4, 61, 3), dtype=np.uint8))
    torch.multiprocessing.spawn(on_a_rank, (str(tmp_path),), WORLD)
