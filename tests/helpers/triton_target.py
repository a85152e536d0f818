"""The package's Triton launchers, without a GPU: what they launch is handed over, compiled for an architecture, not started."""

import contextlib
import hashlib
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from infsa_kernels.triton import (
    central_query,
    configs,
    linear,
    linear_backward,
    linear_fold,
    pure,
    pure_backward,
    pure_tied,
    score_pool_kernels,
    token_rows,
)

RUN = JITFunction.run


@contextlib.contextmanager
def launching(arch: str, launch: Callable):
    """In this block the GPU is an ``arch``, and a launch calls ``launch(kernel, programs, args, options)``.

    What `compiled` makes of these is what the GPU would run: options, specialisation and all are the package's own.
    """

    def run(kernel, *args, grid, warmup, **options):
        launch(kernel, grid[0], args, options)

    with _target(arch, _Driver(arch)), mock.patch.object(JITFunction, "run", run):
        yield


@contextlib.contextmanager
def starting(arch: str):
    """In this block the GPU is an ``arch`` on which nothing runs. It is yielded, and ``started`` has what reached it."""
    driver = _Starting(arch)
    with _target(arch, driver):
        yield driver


@contextlib.contextmanager
def _target(arch: str, of_arch):
    modules = (
        central_query,
        score_pool_kernels,
        token_rows,
        linear,
        linear_backward,
        linear_fold,
        pure,
        pure_backward,
        pure_tied,
    )
    kernels = {f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}

    def forget():
        for kernel in kernels:
            kernel.device_caches.clear()

    forget()
    driver.set_active(of_arch)
    try:
        with mock.patch.object(configs, "arch_of", return_value=arch):
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


class Start(NamedTuple):
    """A launch as the GPU's driver sees it."""

    kernel: str
    programs: int
    stream: int
    arguments: list  # types beside values


class _Starting(_Driver):
    """Loads and starts nothing, and writes down what it was asked to."""

    def __init__(self, arch: str):
        super().__init__(arch)
        self.started: list[Start] = []
        self.stream, self.loaded = 0, []
        self.utils = self
        outer = self

        class Launcher:
            def __init__(self, src, metadata):
                self.kinds = list(src.signature.values())

            def __call__(self, gridX, gridY, gridZ, stream, function, *args):
                _, launch_metadata, enter, leave, *given = args
                if enter:
                    enter(launch_metadata)
                outer.started.append(
                    Start(outer.loaded[function], gridX, stream, list(zip(self.kinds, given, strict=True)))
                )
                if leave:
                    leave(launch_metadata)

        self.launcher_cls = Launcher

    def load_binary(self, name, kernel, shared, device):
        self.loaded.append(f"{name} {hashlib.sha256(kernel).hexdigest()}")
        return 1, len(self.loaded) - 1, 64, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 << 10}

    def get_current_stream(self, device):
        return self.stream
