"""What operators demand of their arguments, and the words where one is not so.

Demands derive from what an operator declares: its schema, and the dimensions and dtype of every tensor. Kernels in Python and
fakes are checked before they run. Compiled kernels have invariants of their own, in few words: what they have refused is said in
words from here afterwards, and calls that are right do not wait for Python.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from itertools import zip_longest
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from ..eager.common import acc_dtype
from ..reference import ACTIVATIONS
from ..torch_private import FakeTensor, is_batched

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NO_BROADCASTING = "broadcasting is not implied, use .expand()"
_FLOATING = "torch.float32, torch.bfloat16, torch.float16 or torch.float64"

# Numbers are finite and above this.
NUMBERS = {
    "eps": (0.0, "a finite number above 0; the paper's is 1e-6"),
    "rho": (-math.inf, "a finite number; the paper's is 0.95"),
    "score_floor": (math.nextafter(0, -1), "a finite number of at least 0; 0 is the paper's operator"),
    "norm_eps": (math.nextafter(0, -1), "a finite number of at least 0, or None for no normalisation"),
}

# Python types that need no closer look, by the type in the schema.
PLAIN = {
    "Tensor": Tensor,
    "Tensor?": (NoneType, Tensor),
    "float": (float, int),
    "float?": (NoneType, float, int),
    "rho": (float, int, Tensor),
    "str": str,
}


class Declared(NamedTuple):
    """A tensor of an operator: "(B, H, d) acc"."""

    text: str  # of its dimensions
    letters: tuple[str, ...]
    dtype: str

    @classmethod
    def read(cls, text: str) -> "Declared":
        dimensions, dtype = re.fullmatch(r"(\(.*\)) ?(.*)", text).groups()
        return cls(dimensions, tuple(re.findall(r"[^(), ]+", dimensions)), dtype)


class Signature:
    """An operator's arguments and results by name, and what is demanded of them.

    Args:
        schema: as torch takes it, "linear_fwd(Tensor q, Tensor? k, ...) -> (Tensor out, ...)".
        tensors: the dimensions of every tensor: "(B, H, N, d)". A letter stands for one size, which the first tensor that has
            it decides for all; "S+1" is that of S and one more. The dtype is that of the first tensor, or what follows the
            dimensions: "bool", "float64", "index" for an integer, "acc" for the dtype of sums, "or acc" for either. A gradient
            dx is declared by x.
        stand_ins: whose sizes count for an optional tensor's where that is absent.
        more: (op, arguments by name), raises what is demanded beyond that.
    """

    def __init__(
        self, schema: str, tensors: dict[str, str], stand_ins: dict[str, str] | None = None,
        more: Callable[[str, dict], None] | None = None,
    ):  # fmt: skip
        name, arguments, results = re.fullmatch(r"(\w+)\((.*)\) -> (.*)", schema).groups()
        self.name = re.sub("_(fwd|bwd)$", "", name)
        # A floor is an argument of the public operator, whose name errors tell.
        self.op = f"infsa::{self.name.removesuffix('_floor')}"
        given = (argument.split("=")[0].split() for argument in arguments.split(", ") if argument != "*")
        self.kinds = {n: kind for kind, n in given}
        self.arguments = list(self.kinds)
        self._more = more
        self.results = [result.split()[-1] for result in results.strip("()").split(", ")]
        declared = {n: Declared.read(text) for n, text in tensors.items()}
        declared = {f"d{n}": t for n, t in declared.items()} | declared
        self.tensors = {n: declared[n] for n in (*self.arguments, *self.results) if n in declared}
        self.are_tensors = [n in declared for n in self.arguments]
        order = [n for name in tensors for n in (name, f"d{name}") if n in self.kinds]
        at = self.arguments.index
        self._order = [(at(n), n, at((stand_ins or {}).get(n, n))) for n in order]
        self._numbers = [(at(n), n) for n in self.arguments if self.kinds[n].startswith("float")]
        self._plain = {n: PLAIN.get("rho" if n == "rho" else kind, ()) for n, kind in self.kinds.items()}

    def first_of(self, values: Sequence) -> Tensor:
        """The tensor whose dtype and device the others follow."""
        return values[self._order[0][0]]

    def types(self, values: Sequence, by_name: dict[str, object]) -> None:
        """TypeError where torch's dispatcher would refuse the values in its own words, or take a bool for a number."""
        for name, value in (*zip(self._plain, values), *by_name.items()):
            if not isinstance(value, self._plain[name]) or isinstance(value, bool):
                self._type(name, value)

    def _type(self, name, value) -> None:
        kind = self.kinds[name]
        if name == "rho":
            right, expected = hasattr(value, "__float__") and not isinstance(value, bool), "a number or a Tensor"
        elif kind in ("int", "SymInt"):
            right, expected = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool), "an int"
        elif kind.startswith("float"):
            return number(self.op, name, value, "a number" if kind == "float" else "a number or None")
        elif kind == "str":
            right, expected = False, "a str"
        else:
            of = " of torch.bool" if self.tensors[name].dtype == "bool" else ""
            right, expected = False, f"a Tensor{of}" + (" or None" if kind == "Tensor?" else "")
        if not right:
            raise TypeError(f"{self.op}: {name} is a {_kind(value)}, expected {expected}")

    def check(self, values: Sequence) -> dict[str, int]:
        """The sizes by letter. TypeError for a wrong dtype or layout, ValueError for a wrong shape, device or number."""
        first, sizes = self.first_of(values), {}
        for at, name, stand_in in self._order:
            t = values[stand_in] if values[at] is None else values[at]
            if t is None and "?" in self.kinds[name]:
                continue
            dense(self.op, name, t)
            dtypes = DTYPES if t is first else self.dtypes(name, first)
            if t.dtype not in dtypes:
                said, to = (_FLOATING, "") if t is first else (dtypes[0], dtypes[0])
                raise TypeError(f"{self.op}: {name} has dtype {t.dtype}, expected {said}; convert it with .to({to})")
            same_device(self.op, name, t, first, self._order[0][1])
            self._check_shape(name, t.shape, sizes)
        for at, name in self._numbers:
            if values[at] is not None:
                finite(self.op, name, values[at])
        if self._more:
            self._more(self.op, dict(zip(self.arguments, values)))
        return sizes

    def _check_shape(self, name, shape, sizes) -> None:
        """``sizes`` gains those that this tensor is the first to have."""
        text, letters, dtype = self.tensors[name]
        if len(shape) != len(letters) and not sizes.keys() >= set(letters):
            raise ValueError(
                f"{self.op}: {name} has shape {list(shape)}, expected {text}; view it with {len(letters)} dimensions"
            )
        expected = [sizes.setdefault(letter, size) for letter, size in zip_longest(letters, shape) if letter]
        _one_less(sizes)
        if list(shape) != expected:
            fix = "one element for each sequence and one more" if dtype == "index" else _NO_BROADCASTING
            raise ValueError(f"{self.op}: {name} has shape {list(shape)}, expected {text} = {expected}; {fix}")

    def dtypes(self, name: str, first: Tensor) -> tuple[torch.dtype, ...]:
        """Those that a tensor may have, the usual one before others."""
        acc = acc_dtype(first)
        by_declaration = {"": (first.dtype,), "acc": (acc,), "or acc": (first.dtype, acc), "bool": (torch.bool,)}
        by_declaration["float64"] = (torch.float64,)
        by_declaration["index"] = (torch.int32, torch.int64)
        return by_declaration[self.tensors[name].dtype]

    def sizes(self, shapes: Sequence) -> dict[str, int]:
        """The sizes by letter, from right shapes in the place of the tensors."""
        found: dict[str, int] = {}
        for at, name, stand_in in self._order:
            found.update(zip(self.tensors[name].letters, shapes[at] or shapes[stand_in] or ()))
        _one_less(found)
        return found

    def empty(self, name: str, first: Tensor, sizes: dict[str, int] | None) -> Tensor:
        """A tensor as declared, uninitialised; without sizes the (0,) that stands for no gradient."""
        shape = [sizes[letter] for letter in self.tensors[name].letters] if sizes else 0
        return first.new_empty(shape, dtype=self.dtypes(name, first)[0])


def _one_less(sizes: dict[str, int]) -> None:
    """The size S where that of "S+1" is known."""
    sizes.update({letter[:-2]: size - 1 for letter, size in sizes.items() if letter.endswith("+1")})


def in_words(demand, *arguments) -> None:
    """Raises what ``demand`` has to say about the arguments, if it has, in the place of the error that is being handled."""
    try:
        demand(*arguments)
    except (TypeError, ValueError) as told:
        raise told from None


def finite(op, name, x):
    """A number in its range, which its name tells."""
    low, expected = NUMBERS[name]
    if not low < x < math.inf:
        raise ValueError(f"{op}: {name} is {x:g}, expected {expected}")


def activation(op, name):
    """The name of one that there is."""
    if name not in tuple(ACTIVATIONS):
        *most, last = map(repr, ACTIVATIONS)
        raise ValueError(f"{op}: activation is {name!r}, expected {', '.join(most)} or {last}")


def number(op, name, value, expected="a number"):
    """What becomes a float: whatever has one, but no tensor whose gradient, or whose other elements, would be lost."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError(f"{op}: {name} is a {_kind(value)}, expected {expected}")
    elif value.requires_grad:
        raise TypeError(
            f"{op}: {name} is a tensor that requires a gradient, expected {expected}: it gets none; give float({name})"
        )
    elif is_batched(value):
        raise TypeError(
            f"{op}: {name} is a tensor that vmap maps over, expected {expected}; loop over its values instead"
        )
    elif value.numel() != 1:
        raise TypeError(
            f"{op}: {name} is a tensor of shape {list(value.shape)}, expected {expected}; give one for all heads"
        )


def dense(op, name, t):
    """A tensor, and one that is memory with strides."""
    if t is None:
        raise TypeError(f"{op}: {name} is None, expected a Tensor")
    if t.layout != torch.strided or t.is_quantized or t.is_nested:
        kind = "nested tensor" if t.is_nested else "quantized tensor" if t.is_quantized else f"{t.layout} tensor"
        raise TypeError(f"{op}: {name} is a {kind}, expected a dense strided one; densify it first")


def offsets(op, name, cu_seqlens, tokens, tokens_name, longest_name, longest) -> None:
    """Where packed sequences begin and the last one ends; of the values only what can be read without waiting for a GPU."""
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: {name} has shape [0], expected (S+1): a 0, and where each of the S sequences ends")
    if type(cu_seqlens) is not Tensor or cu_seqlens.device.type != "cpu" or is_batched(cu_seqlens):
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"{op}: {name} starts at {values[0]}, expected 0, where the first sequence begins")
    lengths = [end - begin for begin, end in itertools.pairwise(values)]
    for s, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"{op}: {name} falls from {values[s]} to {values[s + 1]} at position {s + 1}, expected no fall; give the "
                "lengths of the sequences summed up, by .cumsum(0)"
            )
    if values[-1] != tokens:
        raise ValueError(
            f"{op}: {name} ends at {values[-1]}, expected {tokens}, the number of tokens of {tokens_name}; slice the tokens "
            "that belong to no sequence off"
        )
    if lengths and longest < max(lengths):
        raise ValueError(
            f"{op}: {longest_name} is {longest}, expected at least {max(lengths)}, the length of sequence "
            f"{lengths.index(max(lengths))}"
        )


def lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """Those of packed sequences; of tensors without values, the longest for each."""
    if isinstance(cu_seqlens, FakeTensor) or cu_seqlens.is_meta:
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()


def same_device(op, name, t, first, first_name):
    if t.device != first.device:
        raise ValueError(
            f"{op}: {name} is on {t.device}, expected {first.device}, where {first_name} is; move it with "
            f".to({first_name}.device)"
        )


def rho_tensor(op, rho, first, heads, letters, first_name="q"):
    """rho as a public op takes it: one value, or one per head."""
    dense(op, "rho", rho)
    if not rho.is_floating_point():
        raise TypeError(f"{op}: rho has dtype {rho.dtype}, expected a floating dtype; convert it with .to()")
    if rho.shape not in ((), (1,), (heads,)):
        raise ValueError(
            f"{op}: rho has shape {list(rho.shape)}, expected [], [1] or {letters} = [{heads}]; "
            "give one value, or one per head"
        )
    same_device(op, "rho", rho, first, first_name)


def real_among_fake(op, tensors: dict) -> TypeError | None:
    """What to say where torch's FakeTensorMode has refused a real tensor with an AssertionError that names none."""
    for name, t in tensors.items():
        if type(t) in (Tensor, torch.nn.Parameter):
            return TypeError(
                f"{op}: {name} is a real tensor, expected a fake one, as others are or as the FakeTensorMode in force asks "
                "for; convert it with mode.from_tensor()"
            )
    return None


def _kind(value) -> str:
    return type(value).__name__
