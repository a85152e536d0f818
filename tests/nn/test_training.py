"""Small InfViTs, and their softmax twin, learn scikit-learn's handwritten digits: 8 x 8 pixels, 16 tokens."""

import pytest
import torch
import torch.nn.functional as F
from helpers.sweep import some
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from infsa_kernels.nn import InfViT

VARIANTS = "linear_infsa", "pure_infsa", "softmax"
EPOCHS, BATCH = 15, 32


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    parts = train_test_split(images, torch.tensor(labels), test_size=0.25, random_state=0, stratify=labels)
    return dict(zip(("train_images", "test_images", "train_labels", "test_labels"), parts))


def train(model, images, labels):
    """AdamW, one cycle, gradients clipped at 1: Linear-InfSA's reach thousands when a sum of scores is near 0."""
    steps = EPOCHS * -(-len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    largest = 0.0
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert norm.isfinite()
            largest = max(largest, norm.item())
            optimizer.step()
            schedule.step()
    return largest


def dead_heads(model, images):
    """Per layer, the share of images and heads without a positive score: output and gradient there are exactly 0."""
    shares = []

    def measure(attention, args, kwargs, out):
        _, weights = type(attention).forward(attention, *args, **kwargs, need_weights=True, average_attn_weights=False)
        shares.append((weights.sum((-1, -2)) == 0).float().mean().item())

    handles = [block.attn.register_forward_hook(measure, with_kwargs=True) for block in model.blocks]
    model(images)
    for handle in handles:
        handle.remove()
    return shares


@pytest.mark.parametrize("variant", some(VARIANTS, VARIANTS[0]))
def test_digits(variant, digits, record_property):
    model = InfViT(8, 2, 1, 10, embed_dim=64, depth=2, num_heads=4, variant=variant, pool="mean")
    nn.init.normal_(model.pos_embed, std=0.5)  # so few pictures do not teach the model where its tokens are
    largest = train(model, digits["train_images"], digits["train_labels"])
    with torch.no_grad():
        right = model(digits["test_images"]).argmax(1) == digits["test_labels"]
        shares = [] if variant == "softmax" else dead_heads(model, digits["test_images"])
    accuracy = right.float().mean().item()
    report = f"{variant}: accuracy {accuracy:.3f}, largest gradient norm {largest:.3g}"
    report += f", dead heads per layer {', '.join(f'{s:.0%}' for s in shares)}" if shares else ""
    print(report)
    record_property("training", report)
    assert accuracy >= 0.95, report
