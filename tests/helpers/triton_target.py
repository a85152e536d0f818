"""The package's Triton launchers, without a GPU: what they launch is handed over, compiled for an architecture, not started."""

import contextlib
from collections.abc import Callable
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from infsa_kernels.triton import configs, linear, linear_backward, pure, pure_backward

RUN = JITFunction.run


@contextlib.contextmanager
def launching(arch: str, launch: Callable):
    """In this block the GPU is an ``arch``, and a launch calls ``launch(kernel, programs, args, options)``.

    What `compiled` makes of these is what the GPU would run: options, specialisation and all are the package's own.
    """
    modules = linear, linear_backward, pure, pure_backward
    kernels = {f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}

    def forget():
        for kernel in kernels:
            kernel.device_caches.clear()

    forget()
    driver.set_active(_Driver(arch))
    try:
        with (
            mock.patch.object(configs, "arch_of", return_value=arch),
            mock.patch.object(
                JITFunction,
                "run",
                lambda kernel, *args, grid, warmup, **options: launch(kernel, grid[0], args, options),
            ),
        ):
            yield
    finally:
        forget()
        with contextlib.suppress(RuntimeError):  # without a GPU there is no driver to go back to
            driver.reset_active()


def compiled(kernel: JITFunction, programs: int, args: tuple, options: dict):
    """The triton.compiler.CompiledKernel of a launch."""
    return RUN(kernel, *args, grid=(programs,), warmup=True, **options)


class _Driver:
    def __init__(self, arch: str):
        nvidia = arch.startswith("sm_")
        self.target = GPUTarget("cuda", int(arch[3:]), 32) if nvidia else GPUTarget("hip", arch, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0
