"""Which calls CUDA C++ takes from Triton by default: those whose time is that of their launches and of the host."""

import functools
import importlib
import itertools
import os
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..torch_private import below_autocast, computes_at_once
from . import backends, extension


class Sizes(NamedTuple):
    """The largest call of CUDA C++ on GPUs from a compute capability on, and why."""

    since: tuple[int, int]
    most_bytes: int  # of q, k and v
    most_head_bytes: int  # of the longest of them in one head, a row of which takes a line of 128 bytes at least
    reason: str


# No GPU has measured this yet: launches and bytes are counted. make gpu-check measures both backends at all sizes.
#
# Triton starts two kernels a direction, one forward up to 512 tokens, each from Python; CUDA C++ starts one, from C++. A launch
# more is 2 to 3 us, in which an H100 reads 8 MB: what is larger is bound by its bytes, which Triton spreads over more programs.
# A cluster of 8 blocks holds a head group of 8 x 192 KB; what is longer would be a grid.
#
# Without clusters the two passes meet in three barriers of the whole grid, which take as long as the launches that they spare.
SIZES = (
    Sizes(
        (9, 0), 8 << 20, 1536 << 10, "one launch a direction, in clusters, where Triton starts up to two, from Python"
    ),
    Sizes((8, 0), 0, 0, "without clusters, barriers of the whole grid take as long as the launches that they spare"),
)
LINE_BYTES = 128

# What has been decided, by all that it depends on beside sizes.
_decided: dict[tuple, bool] = {}


@functools.cache
def sizes_on(device: torch.device) -> Sizes | None:
    """The row of SIZES for a GPU on which CUDA C++ runs; None where it does not."""
    if device.type != "cuda" or backends.why_not("linear", "cuda", device, torch.float32, (1, 1, 1, 1)):
        return None
    capability = torch.cuda.get_device_capability(device)
    return next((sizes for sizes in SIZES if capability >= sizes.since), None)


def takes(raw, q: Tensor, k: Tensor, v: Tensor, key_padding_mask, query_padding_mask) -> bool:
    """Whether CUDA C++ runs a call of a raw operator for which nobody has asked for a backend.

    A kind of call is checked first, as Triton's kernels are (triton/first_use.py), both directions at once: the backward pass
    runs where the forward pass ran. Where nothing can be checked, as while torch.compile traces, inside torch.func's transforms
    and in the capture of a CUDA graph, what is known decides. `INFSA_CUDA=0` takes nothing, `INFSA_CUDA=1` takes it unchecked.
    """
    if "cuda" not in raw.kernels or not (sizes := sizes_on(q.device)):
        return False
    setting, tied, (d, dv) = os.environ.get("INFSA_CUDA", ""), k is q, (q.shape[3], v.shape[3])
    bytes_of_all = q.element_size() * (q.numel() + v.numel() + (0 if tied else k.numel()))
    bytes_of_head = max(q.shape[2], v.shape[2]) * max(LINE_BYTES, q.element_size() * max(d, dv))
    if setting == "0" or bytes_of_all > sizes.most_bytes or bytes_of_head > sizes.most_head_bytes:
        return False
    masks = key_padding_mask is not None, query_padding_mask is not None
    kind = raw.name, q.device, q.dtype, int(d), int(dv), tied, masks, bool(q.stride(1) < q.stride(2)), setting == "1"
    try:
        return _decided[kind]
    except KeyError:
        return _decide(kind)


def _decide(kind: tuple) -> bool:
    name, device, dtype, d, dv, tied, masks, token_major, trusted = kind
    if backends.why_not(name, "cuda", device, dtype, (1, 1, 1, max(d, dv))):
        decided = False
    elif trusted:
        decided = True
    elif torch.cuda.is_current_stream_capturing():
        return False  # the library's kernels are loaded by their first call, which may not be here
    else:
        try:
            first_use = importlib.import_module(".triton.first_use", extension.NAME)
        except ImportError:
            return False  # the check is beside Triton's kernels; choose_backend tells that they are missing
        masked = " and ".join(itertools.compress(first_use.known_attention.SIDES, masks))
        precision = "ieee" if dtype == torch.float32 else ""
        like = name, "forward", str(dtype).removeprefix("torch."), precision, d, dv, tied, masked, token_major, False
        forward = first_use.known_attention.Variant(*like, backend="cuda")
        check = first_use.checked if computes_at_once() else first_use.cached
        try:
            with below_autocast():
                decided = not any(check(v, device) for v in (forward, replace(forward, direction="backward")))
        except LookupError:
            return False
    _decided[kind] = decided
    return decided
