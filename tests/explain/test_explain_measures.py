"""Deletion curves and localisation, by hand on toy models, and their baselines."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from infsa_kernels.explain import deletion_curve, gaussian_maps, localisation, random_maps
from infsa_kernels.explain.measures import blurred, boxes_to_masks

# What each quarter of a picture of ones counts for.
WEIGHTS = torch.tensor([[[0.4, 0.3], [0.2, 0.1]]])


class Counts(nn.Module):
    """The probability of class 0 is 0.05 + 0.9 of what is left of the quarters."""

    def forward(self, images):
        assert not self.training
        left = (images.mean(1).unflatten(2, (2, -1)).unflatten(1, (2, -1)).mean((2, 4)) * WEIGHTS).sum((1, 2))
        p = 0.05 + 0.9 * left
        return torch.stack([p, 1 - p], 1).log()


@pytest.mark.parametrize("maps, order, scores", [
    (WEIGHTS, "morf", [0.95, 0.59, 0.32, 0.14, 0.05]),
    (WEIGHTS, "lerf", [0.95, 0.86, 0.68, 0.41, 0.05]),
    (-WEIGHTS, "morf", [0.95, 0.86, 0.68, 0.41, 0.05]),
    (torch.zeros(1, 2, 2), "lerf", [0.95, 0.59, 0.32, 0.14, 0.05]),  # equal values go in reading order
    (torch.zeros(1, 2, 2), "morf", [0.95, 0.59, 0.32, 0.14, 0.05]),
])  # fmt: skip
def test_curve_and_area_by_hand(maps, order, scores):
    found = deletion_curve(Counts(), torch.ones(1, 3, 4, 6), maps, order, steps=4, fill="zero")
    torch.testing.assert_close(found.scores, torch.tensor([scores]))
    assert found.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.target.tolist() == [0]
    under = (scores[0] / 2 + sum(scores[1:4]) + scores[4] / 2) / 4 / scores[0]
    assert found.area.item() == pytest.approx(1 - under if order == "morf" else under, abs=1e-6)


def test_target_steps_and_baselines():
    images = torch.ones(3, 1, 4, 4)
    maps = WEIGHTS.expand(3, -1, -1)
    found = deletion_curve(Counts(), images, maps, steps=3, fill="zero", target=torch.tensor([0, 1, 0]))
    assert found.fractions.tolist() == [0, 0.25, 0.75, 1]
    torch.testing.assert_close(found.scores[0] + found.scores[1], torch.ones(4))
    for name, make in (("random", random_maps), ("gaussian", gaussian_maps)):
        alone = deletion_curve(Counts(), images, make(maps), steps=3, fill="zero", target=found.target, baselines=False)
        torch.testing.assert_close(found.baselines[name].scores, alone.scores)
        assert alone.baselines == {} == found.baselines[name].baselines


def test_deleting_takes_whole_patches_of_the_right_place():
    class Looks(nn.Module):
        def forward(self, images):
            seen.append(images.clone())
            return torch.zeros(len(images), 2)

    seen = []
    images = torch.randn(2, 3, 6, 9)
    maps = torch.zeros(2, 2, 3)
    maps[0, 0, 2], maps[1, 1, 1] = 1, 1
    deletion_curve(Looks(), images, maps, steps=6, fill="mean", baselines=False)
    expected = images.clone()
    expected[0, :, :3, 6:] = images[0].mean((1, 2))[:, None, None]
    expected[1, :, 3:, 3:6] = images[1].mean((1, 2))[:, None, None]
    torch.testing.assert_close(seen[1], expected)
    torch.testing.assert_close(seen[6], images.mean((2, 3), keepdim=True).expand_as(images))


def test_an_output_with_logits_and_a_model_in_training():
    class Host(Counts):
        def forward(self, images):
            return type("Output", (), {"logits": super().forward(images)})

    model = Host().train()
    deletion_curve(model, torch.ones(1, 3, 4, 4), WEIGHTS, baselines=False)
    assert model.training


def test_blur_is_that_of_scipy():
    images = torch.randn(2, 3, 20, 40, dtype=torch.float64)
    expected = scipy.ndimage.gaussian_filter(images.numpy(), (0, 0, 2, 2), mode="mirror", truncate=3)
    np.testing.assert_allclose(blurred(images), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(blurred(torch.full((1, 1, 5, 80), 3.0)), torch.full((1, 1, 5, 80), 3.0))


def test_localisation_by_hand():
    """Of four pairs the object's pixel is higher in three; precisions at the object's pixels are 1 and 2/3."""
    maps = torch.tensor([[[0.9, 0.8], [0.3, 0.1]]])
    mask = torch.tensor([[[True, False], [True, False]]])
    found = localisation(maps, mask)
    assert found.roc_auc.tolist() == [0.75]
    assert found.pr_auc.item() == pytest.approx(5 / 6)
    box = localisation(maps, torch.tensor([[0, 0, 1, 2]]), (2, 2))
    assert (box.roc_auc, box.pr_auc) == (found.roc_auc, found.pr_auc)


def test_localisation_resizes_bilinearly_and_is_scikit_learns():
    maps, masks = torch.rand(3, 4, 5), torch.rand(3, 16, 20) > 0.7
    found = localisation(maps, masks)
    for i in range(3):
        resized = nn.functional.interpolate(maps[None, i : i + 1], (16, 20), mode="bilinear").flatten()
        assert found.roc_auc[i] == pytest.approx(roc_auc_score(masks[i].flatten(), resized))
        assert found.pr_auc[i] == pytest.approx(average_precision_score(masks[i].flatten(), resized))


def test_baselines_of_localisation():
    """A random map is at chance; a Gaussian finds what stands in the middle, and not what stands in a corner."""
    boxes = torch.tensor([[22, 22, 42, 42], [0, 0, 20, 20]])
    found = localisation(random_maps(torch.ones(2, 64, 64), seed=1), boxes, (64, 64))
    assert (found.roc_auc - 0.5).abs().max() < 0.05
    assert (found.pr_auc - 400 / 4096).abs().max() < 0.02
    middle, corner = found.baselines["gaussian"].roc_auc.tolist()
    assert middle > 0.95 and corner < 0.3
    assert 0.4 < found.baselines["random"].roc_auc.mean() < 0.6


def test_gaussian_by_hand_and_random_repeats():
    found = gaussian_maps(torch.ones(2, 1, 4), width=0.25)
    expected = [np.exp(-(x**2) / 2) for x in (-1.5, -0.5, 0.5, 1.5)]
    np.testing.assert_allclose(found[1, 0], expected, rtol=1e-6)
    like = torch.ones(2, 3, 3)
    assert (random_maps(like) == random_maps(like)).all() and (random_maps(like) != random_maps(like, seed=1)).any()
    assert (random_maps(like)[0] != random_maps(like)[1]).any()


def test_boxes_become_the_mask_of_their_union():
    found = boxes_to_masks(torch.tensor([[[0, 0, 1, 1], [1, 1, 3, 2]]]), (2, 3))
    assert found.tolist() == [[[True, False, False], [False, True, True]]]


IMAGES, MASKS = torch.ones(1, 3, 4, 4), torch.eye(4)[None].bool()
BAD = [
    (lambda: deletion_curve(Counts(), IMAGES, WEIGHTS, "first"), "order is 'first', expected 'morf' or 'lerf'"),
    (lambda: deletion_curve(Counts(), IMAGES, WEIGHTS, fill="noise"), "fill is 'noise', expected 'blur' or 'mean' or 'zero'"),
    (lambda: deletion_curve(Counts(), IMAGES, WEIGHTS, steps=0), "steps is 0, expected an int of at least 1"),
    (lambda: deletion_curve(Counts(), IMAGES, WEIGHTS[0]), r"maps has shape \[2, 2\], expected \(B, h, w\)"),
    (lambda: deletion_curve(Counts(), IMAGES, torch.ones(2, 2, 2)), r"\[2, 2, 2\] and the pictures \[1, 3, 4, 4\], expected as"),
    (lambda: deletion_curve(Counts(), IMAGES, torch.ones(1, 3, 2)), "sides multiples of the maps'"),
    (lambda: deletion_curve(Counts(), IMAGES, WEIGHTS / 0), "maps holds NaN or infinity"),
    (lambda: deletion_curve(Counts(), IMAGES, WEIGHTS, target=torch.tensor([0, 0])), r"target is \[2\], expected \(B,\)"),
    (lambda: deletion_curve(nn.Identity(), IMAGES, WEIGHTS), r"gives \[1, 3, 4, 4\], expected class scores"),
    (lambda: localisation(WEIGHTS, torch.tensor([[0, 0, 1, 1]])), "size is None, expected the picture's"),
    (lambda: localisation(WEIGHTS, torch.tensor([[0, 0, 5, 1]]), (4, 4)), r"a box is \[0, 0, 5, 1\], .* right <= 4"),
    (lambda: localisation(WEIGHTS, torch.tensor([[2, 0, 2, 1]]), (4, 4)), r"a box is \[2, 0, 2, 1\], expected 0 <= left < right"),
    (lambda: localisation(WEIGHTS, torch.ones(1, 3), (4, 4)), r"boxes has shape \[1, 3\], expected"),
    (lambda: localisation(WEIGHTS, ~MASKS & MASKS), "a mask is all object or has none"),
    (lambda: localisation(WEIGHTS, MASKS[:, :3]), r"and the pictures \[1, 1, 3, 4\], expected as many"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
