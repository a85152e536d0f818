"""What the launcher of the CUDA kernels asks of the driver and does with the answers, as shipped, with GPUs that do not exist."""

import ctypes
import sys
from dataclasses import astuple, dataclass

import pytest
from helpers.cuda_on_host import library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fibers of the C library")

TOO_LARGE, INVALID = 2, 1


@dataclass
class Gpu:
    """100 multiprocessors, each with room for two blocks; with clusters of 8 blocks, unless told otherwise."""

    ptx_version: int = 90  # that the kernel was compiled from; 0: the driver does not find it
    has_clusters: int = 1
    active_clusters: int = 12  # -1: the driver does not say
    blocks_at_once: int = 2
    launch: int = 0  # the error

    def made(self):
        return (ctypes.c_int64 * 5)(*astuple(self))

    def device(self, floored=False) -> tuple[int, int]:
        found = (ctypes.c_int64 * 2)()
        assert library("launches").ask_device(self.made(), floored, found) == 0, "an error was left for others to find"
        return tuple(found)

    def run(self, N=4096, most_blocks=1 << 30) -> dict[str, int]:
        found = (ctypes.c_int64 * 7)()
        failed = library("launches").launch(self.made(), ctypes.c_int64(N), ctypes.c_int64(most_blocks), found)
        names = "blocks", "threads", "shared", "cluster", "cooperative", "tries", "errors_left"
        launched = dict(zip(names, found))
        assert launched["errors_left"] == 0, "an error was left for others to find"
        return launched | {"failed": failed}


def test_a_gpu_with_clusters():
    assert Gpu().device() == Gpu().device(floored=True) == (200, 227 << 10)
    launched = Gpu().run()
    assert (launched["cluster"], launched["cooperative"], launched["tries"]) == (8, 0, 1)
    assert launched["blocks"] == 16 * 8 and launched["threads"] == 256 and not launched["failed"]


@pytest.mark.parametrize(
    "gpu",
    [Gpu(ptx_version=80), Gpu(ptx_version=0), Gpu(has_clusters=0), Gpu(active_clusters=0), Gpu(active_clusters=-1)],
    ids=["8.0+PTX", "not compiled for it", "none", "do not fit", "unknown"],
)
def test_without_clusters_the_grid_does_everything(gpu):
    """Code that a newer GPU compiles from PTX of sm_80 has an empty cluster kernel, whose outputs would stay uninitialised."""
    assert gpu.device() == (200, 0)
    launched = gpu.run()
    assert (launched["cluster"], launched["cooperative"], launched["failed"]) == (0, 1, 0)
    assert launched["blocks"] <= 200


@pytest.mark.parametrize(("most", "tries"), [(200, 1), (199, 2), (60, 3), (1, 8)])
def test_a_grid_that_does_not_fit_is_halved(most, tries):
    """A part of the GPU, as MPS and MIG give it: the driver counts all of it and refuses the launch."""
    launched = Gpu(has_clusters=0).run(N=1 << 17, most_blocks=most)
    assert launched["blocks"] <= most and launched["tries"] == tries and not launched["failed"]


def test_no_block_fits():
    launched = Gpu(has_clusters=0).run(N=1 << 17, most_blocks=0)
    assert launched["failed"] and launched["tries"] == 8


def test_another_error_is_told_at_once():
    assert Gpu(launch=INVALID).run()["failed"] and Gpu(launch=INVALID).run()["tries"] == 1
