"""What the machine needs at least, as mechanisms that take their turn among the others: reads, copies, products, launches.

They take q, k and v and give nothing back that could be compared; "qkv" and the like say which of them they move.
"""

import functools

import torch

import infsa_kernels

from .mechanism import DTYPES, Mechanism

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}

# Ways to read a float32 vector once; which is the fastest depends on the machine and on torch's build.
READS = {"sum": torch.sum, "amax": torch.amax, "dot": lambda x: torch.dot(x, x), "norm": torch.linalg.vector_norm}
# Ways to multiply two matrices. torch.mm uses MKL on x86, which holds back on other makers' processors; convolutions go
# through oneDNN, which does not.
PRODUCTS = {
    "mm": torch.mm,
    "convolution": lambda a, b: torch.nn.functional.conv2d(b.view(1, len(b), -1, 32), a[..., None, None]),
}


class Limit(Mechanism):
    SOURCE, TIME, STATE, NOTE = "-", "", "0", "a limit of the machine"
    LEVELS, PROJECTIONS, COMPILES = ("operator",), "", False

    def sublayer(self, x, norm):
        """Beside layers it is what it is beside operators."""
        return self.core(x, x, x)


def moving(what: str, tensors: str) -> type[Limit]:
    """Reads, copies into place, or copies into fresh memory, of the tensors named."""

    class Moving(Limit):
        LABEL = f"a {'fresh copy' if what == 'clone' else what} of {', '.join(tensors.upper())}"
        targets = None

        def core(self, q, k, v):
            # Dense, as memory holds them: views of heads would be read in another order than they lie.
            named = {"q": q, "k": k, "v": v}
            dense = [named[n].as_strided((named[n].numel(),), (1,)) for n in tensors]
            if what == "read":
                way = READS[fastest_read(q.device)]
                return [way(t.view(torch.float32)) for t in dense][-1]
            if what == "clone":
                return [t.clone() for t in dense]
            self.targets = self.targets or [torch.empty_like(t) for t in dense]
            return [target.copy_(t) for target, t in zip(self.targets, dense)]

        def work(self, case, which):
            size = case["batch"] * self.tokens * self.dim * DTYPES[case["dtype"]].itemsize
            return {"bytes": (1 if what == "read" else 2) * len(tensors) * size}

    return Moving


def product(name: str) -> type[Limit]:
    """A square matrix product, by one way or by the fastest."""

    class Product(Limit):
        LABEL = "a matrix product" + (" (torch.mm)" if name == "mm" else "")

        def core(self, q, k, v):
            device = q.device
            way = PRODUCTS["mm" if name == "mm" or device.type == "cuda" else fastest_product(device, q.dtype)]
            return way(*matrices(device, q.dtype))

        def work(self, case, which):
            return {"flops": 2 * GEMM_SIZE[case["device"]] ** 3}

    return Product


class Launch(Limit):
    LABEL = "an empty launch"

    def core(self, q, k, v):
        return tensor(1, device=q.device).add_(1)  # as little as a kernel can do


class Tiny(Limit):
    LABEL = "a tiny call of Linear-InfSA"

    def core(self, q, k, v):
        x = tensor(1, 1, 4, 16, device=q.device)
        return torch.ops.infsa.linear(x, x, x)


class TinyKernel(Limit):
    LABEL = "a tiny call of its C++ operator"

    @classmethod
    def unavailable(cls, device):
        chosen = infsa_kernels.choose_backend("linear", device, torch.float32, (1, 1, 4, 16))
        return None if chosen in ("cpu", "cuda") else "there is no C++ operator here"

    def core(self, q, k, v):
        x = tensor(1, 1, 4, 16, device=q.device)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.infsa.linear_fwd(x, None, x, 1e-6, 1.0, None, None, None)[0]


@functools.cache
def matrices(device, dtype):
    n = GEMM_SIZE[device.type]
    return torch.randn(2, n, n, device=device).to(dtype).unbind()


@functools.cache
def tensor(*shape, device):
    return torch.randn(shape, device=device)


@functools.cache
def fastest_read(device) -> str:
    x = torch.randn(1 << 24, device=device)
    return min(READS, key=lambda way: _seconds(READS[way], x))


@functools.cache
def fastest_product(device, dtype) -> str:
    return min(PRODUCTS, key=lambda way: _seconds(PRODUCTS[way], *matrices(device, dtype)))


def _seconds(run, *arguments) -> float:
    from torch.utils.benchmark import Timer  # late: it takes setuptools with it

    call = {"run": run, "arguments": arguments}
    timer = Timer("run(*arguments)", globals=call, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).median


# The machine's limits by name; of memory, of arithmetic, and of launching.
LIMITS = {
    **{what + suffix: moving(what, tensors) for what in ("read", "copy", "clone")
       for suffix, tensors in (("", "qv"), ("_qkv", "qkv"))},
    "read_qqv": moving("read", "qqv"),
    "gemm": product("fastest"),
    "gemm_mm": product("mm"),
    "launch": Launch,
    "tiny": Tiny,
    "tiny_kernel": TinyKernel,
}  # fmt: skip
