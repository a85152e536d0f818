"""One graph and one export of InfViT for pictures of all sizes, also where opt_einsum plans torch.einsum by the sizes."""

import io

import pytest
import torch
from helpers.sweep import swept
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.testing import assert_close

from infsa_kernels.nn import InfViT, patches

# The grid that positions are learned for, multiples of a patch and others, sides that are equal and not.
SIZES = ((16, 16), (16, 24), (18, 25), (64, 7), (40, 40), (5, 5), (33, 64), (100, 17), (24, 16), (300, 280), (12, 12))

FORMS = {
    "linear": {"depth": 2},
    "pure": {"depth": 1, "variant": "pure_infsa", "pool": "mean", "neumann": "head"},
    "softmax": {"depth": 1, "variant": "softmax", "neumann": "layer", "pos_embed": False},
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(form):
    made = InfViT(16, 4, 3, 5, 16, num_heads=2, **FORMS[form]).eval()
    nn.init.normal_(made.head.weight)
    return made


def compare(graph, made, sizes, batches=(2,)):
    for i, (height, width) in enumerate(sizes):
        x = torch.randn(batches[i % len(batches)], 3, height, width)
        assert_close(graph(x), made(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form, planned", [("linear", True), swept(("linear", False)), swept(("pure", True))])
def test_one_graph_for_all_sizes(form, planned, monkeypatch):
    assert torch.backends.opt_einsum.is_available()
    monkeypatch.setattr(torch.backends.opt_einsum, "enabled", planned)
    made, counter = model(form), CompileCounterWithBackend("eager")
    graph = torch.compile(made, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        compare(graph, made, SIZES)
        # The first picture has equal sides, and torch makes one size of what it sees equal.
        assert counter.frame_count <= 2
        # Nor does torch take a size of 1, here one row of patches, for one of many.
        compare(graph, made, [(4, 9)])


@pytest.mark.parametrize("form, example", [*((form, (18, 25)) for form in FORMS), ("linear", (16, 16))])
@pytest.mark.one_in(2)
def test_one_export_for_all_sizes(form, example):
    """And any batch, from an example that is of the learned grid as from one that is not."""
    made = model(form)
    batch, height, width = Dim("batch", max=64), Dim("height", min=5, max=1024), Dim("width", min=5, max=1024)
    with torch.no_grad():
        shapes = ({0: batch, 2: height, 3: width},)
        program = torch.export.export(made, (torch.randn(2, 3, *example),), dynamic_shapes=shapes)
        compare(program.module(), made, SIZES, batches=(1, 2, 5))


@pytest.mark.sweep
def test_an_export_is_saved_and_decomposed():
    made, buffer = model("pure"), io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(made, (torch.randn(2, 3, 18, 25),), dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},))
        torch.export.save(program, buffer)
        buffer.seek(0)
        compare(torch.export.load(buffer).run_decompositions().module(), made, SIZES[:3])


@pytest.mark.parametrize("autocast", [False, True])
def test_an_export_gives_the_learned_positions_to_the_last_bit(autocast):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.learned = nn.Parameter(torch.randn(3, 5, 7))

        def forward(self, picture):
            return patches.resized_positions(self.learned, (3, 5), picture.shape, slice(None))

    made = Positions()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        shapes = ({0: Dim("rows", max=64), 1: Dim("columns", max=64)},)
        program = torch.export.export(made, (torch.randn(4, 6),), dynamic_shapes=shapes).module()
        assert torch.equal(program(torch.randn(3, 5)), made.learned.flatten(0, 1)[None])
        for grid in ((3, 9), (20, 5), (2, 3)):
            picture = torch.randn(grid)
            assert_close(program(picture), made(picture), rtol=1e-5, atol=1e-5)
