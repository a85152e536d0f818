"""Exported by torch.onnx.export and run by onnxruntime, the operators, layers and models compute what they compute here."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import onnxruntime
import pytest
import torch
import torchvision
import transformers
from calls import DTYPES, OPS, Call, expected
from tolerance import FORWARD, assert_close_to_reference, assert_within
from torch import Tensor, nn

import infsa_kernels
import infsa_kernels.nn.transformers
from infsa_kernels.nn import InfSAAttention, InfViT, convert
from infsa_kernels.onnx import translation_table

ANY = torch.export.Dim.DYNAMIC


class Exported:
    """A module as an ONNX model in onnxruntime, called with tensors; float arrays come back as tensors."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: tuple):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own: deprecations inside the exporter
            self.program = torch.onnx.export(
                module.eval(), inputs, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False,
                custom_translation_table=translation_table(),
            )  # fmt: skip
        model = self.program.model_proto.SerializeToString()
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        names = [i.name for i in self.session.get_inputs()]
        assert len(names) == len(inputs), names
        return [torch.from_numpy(a) for a in self.session.run(None, {n: t.numpy() for n, t in zip(names, inputs)})]


def calls(q, k, v, head_rho, keys_out, queries_out) -> dict[str, Call]:
    """Every form of a call, by name."""
    made = {}
    for op in OPS:
        for dtype in DTYPES:
            low = [t.to(dtype) for t in (q, k, v)]
            made[f"{op} {dtype} untied masked"] = Call(op, *low, head_rho, 1e-6, keys_out, queries_out)
            made[f"{op} {dtype} tied"] = Call(op, low[0], None, low[0], 0.5, 1e-3)
        flat = q.flatten(0, 1)
        made[f"{op} 3-D tied"] = Call(op, flat, None, flat)
    return made


class Operators(nn.Module):
    def forward(self, *inputs):
        outputs = [call.run() for call in calls(*inputs).values()]
        # numpy has no bfloat16
        return [out.float() if out.dtype == torch.bfloat16 else out for out in outputs]
