"""Maps in captum, Quantus and pytorch-grad-cam themselves, where they are installed."""

import functools

import numpy as np
import pytest
import torch

from infsa_kernels.explain import attention_maps, attributions, quantus_explain, reshape_transform
from infsa_kernels.nn import InfViT


@pytest.fixture(params=["linear_infsa", "pure_infsa", "softmax"])
def model(request):
    model = InfViT(32, 8, 3, 5, 32, 2, 2, variant=request.param).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def test_attributions_are_maps_of_the_pictures_size(model):
    images = torch.randn(2, 3, 32, 32)
    found = attributions(model, images, kind="in", layer=0)
    assert found.shape == images.shape
    maps = attention_maps(model, images, layer=0, kind="in")
    expected = torch.nn.functional.interpolate(maps[:, None], (32, 32), mode="bilinear")
    torch.testing.assert_close(found, expected.expand_as(found))
    array = quantus_explain(model, images.numpy(), np.array([0, 1]), kind="in", layer=0)
    np.testing.assert_array_equal(array, found[:, :1].numpy())


def test_tokens_are_put_on_the_grid():
    tokens = torch.arange(2 * 8 * 3).reshape(2, 8, 3)
    found = reshape_transform((2, 3))(tokens)  # two tokens before the patches
    assert found.shape == (2, 3, 2, 3)
    assert (found[1, :, 1, 2] == tokens[1, 7]).all() and (found[0, :, 0, 0] == tokens[0, 2]).all()
    with pytest.raises(ValueError, match=r"gives \[2, 8, 3\], expected tokens .* h x w = 3 x 3"):
        reshape_transform((3, 3))(tokens)


def test_captum(model):
    metrics = pytest.importorskip("captum.metrics")
    images = torch.randn(2, 3, 32, 32)
    sensitivity = metrics.sensitivity_max(
        functools.partial(attributions, model, kind="in"), images, n_perturb_samples=2
    )
    assert sensitivity.shape == (2,) and sensitivity.isfinite().all()

    def noise(x):
        step = 0.1 * torch.randn_like(x)
        return step, x - step

    infidelity = metrics.infidelity(model, noise, images, attributions(model, images), target=torch.tensor([0, 1]))
    assert infidelity.shape == (2,) and infidelity.isfinite().all()


def test_quantus(model):
    quantus = pytest.importorskip("quantus")
    images, classes = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32), np.array([0, 1])
    options = dict(explain_func=quantus_explain, explain_func_kwargs={"kind": "katz"}, device="cpu")
    flipping = quantus.PixelFlipping(features_in_step=256, disable_warnings=True)
    curves = flipping(model=model, x_batch=images, y_batch=classes, a_batch=None, **options)
    assert np.shape(curves) == (2, 12)
    masks = np.zeros((2, 1, 32, 32), bool)
    masks[:, :, 4:20, 4:20] = True
    localisation = quantus.RelevanceMassAccuracy(disable_warnings=True)
    shares = localisation(model=model, x_batch=images, y_batch=classes, a_batch=None, s_batch=masks, **options)
    assert all(0 < share < 1 for share in shares)


def test_grad_cam(model):
    cam = pytest.importorskip("pytorch_grad_cam")
    images = torch.randn(2, 3, 32, 32)
    targets = [cam.utils.model_targets.ClassifierOutputTarget(c) for c in (0, 1)]
    with cam.GradCAM(model, [model.blocks[-1].norm1], reshape_transform=reshape_transform((4, 4))) as explain:
        found = explain(images, targets)
    assert found.shape == (2, 32, 32) and np.isfinite(found).all()
    if model.variant != "softmax":
        assert found.max() > 0
