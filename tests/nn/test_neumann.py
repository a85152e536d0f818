"""The discounted sum of layers' outputs."""

import pytest
import torch
from torch.testing import assert_close

from infsa_kernels import pure_infsa_scores
from infsa_kernels.nn import NeumannSum


@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_equal_layers_sum_to_the_resolvent(gamma):
    """O_l = A^l x with Pure InfSA's A, whose Frobenius norm is below 1: (I - gamma A)^-1 x - x."""
    q, k = torch.randn(2, 1, 2, 9, 8, dtype=torch.float64).unbind()
    A = pure_infsa_scores(q, k, rho=1.0)[0, 0]
    x = torch.randn(9, 5, dtype=torch.float64)
    layers = 300
    neumann = NeumannSum(layers, gamma_init=gamma, dtype=torch.float64)

    def outputs():
        out = x
        for _ in range(layers):
            out = A @ out
            yield out

    identity = torch.eye(9, dtype=torch.float64)
    assert_close(neumann(outputs()), (torch.linalg.inv(identity - gamma * A) - identity) @ x, rtol=1e-10, atol=1e-12)


def test_gamma_per_layer_and_per_head():
    outputs = list(torch.randn(3, 2, 5, 8, dtype=torch.float64).unbind())
    for heads in (None, 4):
        neumann = NeumannSum(3, heads, dtype=torch.float64)
        torch.nn.init.normal_(neumann.logit)
        gamma = torch.sigmoid(neumann.logit)
        expected = torch.zeros_like(outputs[0])
        for layer, out in enumerate(outputs):
            for channel in range(8):
                g = gamma[layer] if heads is None else gamma[layer, channel // 2]
                expected[..., channel] += g ** (layer + 1) * out[..., channel]
        assert_close(neumann(outputs), expected)
        assert torch.autograd.gradcheck(
            lambda logit: torch.func.functional_call(neumann, {"logit": logit}, (outputs,)), neumann.logit
        )


def test_starts_at_gamma_init():
    assert_close(NeumannSum(2, 3, gamma_init=0.7).gamma, torch.full((2, 3), 0.7))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_layers=0), "num_layers is 0"),
        (dict(num_layers=2, num_heads=0), "num_heads is 0"),
        (dict(num_layers=2, gamma_init=1.0), "gamma_init is 1.0"),
    ],
)
def test_wrong_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeumannSum(**arguments)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_layers(count):
    with pytest.raises(ValueError, match=f"outputs has {count} tensors, expected num_layers = 2"):
        NeumannSum(2)([torch.ones(1)] * count)
