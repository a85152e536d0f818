"""Softmax attention, O = softmax(s q k^T) v: torch's fused kernels, each of them alone, and FlashAttention 3 and 4."""

import importlib

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .mechanism import Mechanism, scale


class Softmax(Mechanism):
    NAME, LABEL, SOURCE = "softmax", "Softmax (SDPA)", "1706.03762"
    TIME, STATE, QUADRATIC = "N^2 D", "2 * N * d", True

    def core(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def truth(self, q, k, v, rows):
        return (scale(q) * q[:, :, rows] @ k.mT).softmax(-1) @ v


class SoftmaxOn64(Softmax):
    NAME, LABEL, HEADS, LEVELS = "softmax_64", "Softmax (SDPA), 64 heads", 64, ("operator",)
    NOTE = "on the q, k and v of Linear-InfSA"


class OneBackend(Softmax):
    """By one backend of SDPA alone."""

    BACKEND: SDPBackend
    DEVICES, COMPILES = ("cpu", "cuda"), False

    @classmethod
    def unavailable(cls, device):
        return None if device.type in cls.DEVICES else f"{cls.LABEL} needs a GPU"

    def core(self, q, k, v):
        with sdpa_kernel(self.BACKEND):
            return super().core(q, k, v)


class Math(OneBackend):
    NAME, LABEL, BACKEND = "sdpa_math", "Softmax (SDPA: math)", SDPBackend.MATH


class Flash(OneBackend):
    NAME, LABEL, BACKEND = "sdpa_flash", "Softmax (SDPA: flash)", SDPBackend.FLASH_ATTENTION


class Efficient(OneBackend):
    NAME, LABEL, BACKEND = "sdpa_efficient", "Softmax (SDPA: efficient)", SDPBackend.EFFICIENT_ATTENTION
    DEVICES = ("cuda",)


class CuDNN(OneBackend):
    NAME, LABEL, BACKEND = "sdpa_cudnn", "Softmax (SDPA: cudnn)", SDPBackend.CUDNN_ATTENTION
    DEVICES = ("cuda",)


class FlashAttention3(Softmax):
    """A package with ``flash_attn_func(q, k, v)`` on (B, N, H, d)."""

    COMPILES, LEVELS = False, ("operator",)
    NAME, LABEL, SOURCE = "flash_attention_3", "Softmax (FlashAttention 3)", "2407.08608"
    NEEDS = "flash_attn_interface", "FlashAttention 3"

    def core(self, q, k, v):
        out = importlib.import_module(self.NEEDS[0]).flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)))
        # Some releases return the log-sum-exp beside it.
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


class FlashAttention4(FlashAttention3):
    NAME, LABEL, SOURCE = "flash_attention_4", "Softmax (FlashAttention 4)", "flash-attn-4"
    NEEDS = "flash_attn.cute", "FlashAttention 4"
