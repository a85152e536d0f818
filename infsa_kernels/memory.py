"""The memory that the CPU kernels keep for their next call (csrc/cpu/pool.h)."""


def release_memory() -> int:
    """Gives the memory that the CPU kernels keep for their next call back to the system; returns its bytes.

    Results and working memory of 4 MB and more are kept when they are freed, at most ``INFSA_CPU_POOL_MB`` megabytes in a
    process: by default 1024, and no more than an eighth of the machine's memory; 0 keeps none. Without that, the system
    would have to find and zero the same pages again at every call. It may take them before, if it runs out of memory.
    """
    return _pool("release_memory")


def kept_memory() -> int:
    """The bytes that are kept now."""
    return _pool("kept_memory")


def most_kept_memory() -> int:
    """The most bytes that may be kept. A ValueError says what is wrong with ``INFSA_CPU_POOL_MB``."""
    return _pool("most_kept_memory")


def _pool(function: str) -> int:
    try:
        from . import _C
    except ImportError:
        return 0  # without the extension nothing is kept
    return getattr(_C, function)()
