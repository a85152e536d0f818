"""Quadratic attention with a function of each score for the softmax: sigmoid attention and ReLU attention.

    O = sigmoid(s q k^T - ln N) v   (arXiv:2409.04431),      O = ReLU(s q k^T) v / N   (arXiv:2309.08586)

A block of queries at a time: the N x N scores are never held. "TritonSigmoid" (arXiv:2604.27124): sigmoid attention's kernels.
"""

import math

import torch

from .mechanism import Mechanism, scale

BLOCK_SCORES = 1 << 24


class Elementwise(Mechanism):
    TIME, STATE, QUADRATIC = "N^2 D", "2 * N * d", True

    def core(self, q, k, v):
        B, H, _, _ = q.shape
        rows = max(1, BLOCK_SCORES // (B * H * k.shape[-2]))
        return torch.cat([self.weights((scale(q) * part) @ k.mT) @ v for part in q.split(rows, 2)], 2)


class Sigmoid(Elementwise):
    NAME, LABEL, SOURCE = "sigmoid", "Sigmoid attention", "2409.04431"

    def weights(self, scores):
        return torch.sigmoid(scores - math.log(scores.shape[-1]))


class TritonSigmoid(Sigmoid):
    COMPILES = False
    NAME, LABEL, SOURCE, LEVELS = "triton_sigmoid", "Sigmoid attention (TritonSigmoid)", "2604.27124", ("operator",)
    NEEDS = "triton_sigmoid", "TritonSigmoid"

    def core(self, q, k, v):
        from triton_sigmoid import sigmoid_attention

        return sigmoid_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


class ReLU(Elementwise):
    NAME, LABEL, SOURCE = "relu", "ReLU attention", "2309.08586"
    NOTE = "the nearest quadratic peer of Pure InfSA"

    def weights(self, scores):
        return torch.relu(scores) / scores.shape[-1]
