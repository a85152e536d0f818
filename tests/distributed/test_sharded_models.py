"""Models whose tokens lie on several ranks: scores and gradients of one process."""

import copy
import functools
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import ranks
from torch import nn
from torch.testing import assert_close

from infsa_kernels.distributed import parallelize
from infsa_kernels.nn import InfSAAttention, InfViT, convert

VARIANTS = ("linear_infsa", "pure_infsa")
PATCH, D, H = 4, 16, 4

# Rows of patches of each rank's strip, by the number of ranks: of 5, uneven, and with none on one.
STRIPS = {2: ([3, 2], [0, 5]), 4: ([1, 2, 1, 1], [3, 0, 0, 2])}


def vit(variant="linear_infsa", **arguments):
    torch.manual_seed(0)
    model = InfViT((20, 12), PATCH, 2, 3, D, 2, H, variant=variant, **arguments).double()
    nn.init.normal_(model.head.weight)
    return model


def results(model, x, run=None):
    """The scores, and every gradient of a loss of them."""
    model.zero_grad()
    scores = (run or model)(x)
    scores.square().sum().backward()
    return {"scores": scores.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def mean_of_ranks(gradients):
    """What DistributedDataParallel makes of them."""
    return {n: t if n == "scores" else ranks.over_ranks(t) / dist.get_world_size() for n, t in gradients.items()}


def pictures_in_strips_are_whole_pictures(models=4):
    arguments = {}, {"pool": "mean", "neumann": "layer"}, {"score_floor": 0.3, "pos_embed": False, "rho_per_head": True}
    strips = STRIPS[dist.get_world_size()] * 2
    for variant, given, rows in list(zip(VARIANTS * 2, (*arguments, arguments[1]), strips))[:models]:
        model = vit(variant, **given)
        # The last strip ends within a patch, if it has a whole one too.
        heights = [r * PATCH for r in rows]
        heights[-1] -= rows[-1] > 1
        x = torch.randn(2, 2, sum(heights), 12, dtype=torch.float64)
        expected = results(copy.deepcopy(model), x)
        parallelize(model, None)
        strip = ranks.shard(x, heights, 2)
        actual = results(model, strip)
        assert_close(mean_of_ranks(actual), expected)
        model.set_grad_checkpointing()
        assert_close(results(model, strip), actual, rtol=0, atol=0)
        with torch.no_grad(), mock.patch("infsa_kernels.nn.vit.CHUNK_TOKENS", 4):
            assert_close(model(strip), expected["scores"])


def resized_positions_know_their_rows():
    """A picture of another size than the positions'."""
    model, world = vit(), dist.get_world_size()
    x = torch.randn(1, 2, 2 * world * PATCH, 20, dtype=torch.float64)
    expected = model(x)
    assert_close(parallelize(model, None)(x.chunk(world, 2)[dist.get_rank()]), expected)


def wrong_strips_are_refused():
    model, rank = parallelize(vit(), None), dist.get_rank()
    with pytest.raises(ValueError, match="strip of rank 0 ends 2 pixels into a row"):
        model(torch.randn(1, 2, 4 if rank else 6, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="patches across, expected one picture's"):
        model(torch.randn(1, 2, 4, 12 if rank else 16, dtype=torch.float64))


def attention_of_shards_is_attention():
    """The module by itself: its own tokens, masks, cross-attention, and both layouts of tokens."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for variant in VARIANTS:
        for batch_first in (True, False):
            torch.manual_seed(0)
            floor = 0.3 if variant == "linear_infsa" and batch_first else 0.0
            whole = InfSAAttention(
                D, H, batch_first=batch_first, variant=variant, tied=batch_first, score_floor=floor
            ).double()
            module = parallelize(copy.deepcopy(whole), None)
            x, memory = (torch.randn(2, 3 * world, D, dtype=torch.float64) for _ in range(2))
            mask = torch.arange(3 * world) >= torch.tensor([3 * world, 2])[:, None]

            def run(m, x, memory, mask, batch_first=batch_first):
                x, memory = (t if batch_first else t.transpose(0, 1) for t in (x, memory))
                outs = m(x, key_padding_mask=mask)[0], m(x, memory)[0]
                return torch.cat([t if batch_first else t.transpose(0, 1) for t in outs], -1)

            mine = slice(3 * rank, 3 * rank + 3)
            expected, actual = run(whole, x, memory, mask), run(module, x[:, mine], memory[:, mine], mask[:, mine])
            assert_close(ranks.whole(actual, 1), expected)
    module.dropout = 0.5
    with pytest.raises(NotImplementedError, match=r"dropout is 0\.5"):
        module(x.transpose(0, 1))
    with pytest.raises(NotImplementedError, match="the weights are asked for"):
        module.eval()(x.transpose(0, 1), need_weights=True)


def converted_models_are_sharded_between_their_layers():
    from helpers import host_models  # in this process only: the libraries are slow to import

    names = "timm ViT", "timm ViT, qk_norm", "torchvision ViT", "transformers ViT"
    for name, variant in zip(names, VARIANTS * 2):
        torch.manual_seed(0)
        floor = 0.3 if name == "torchvision ViT" else 0.0
        model = convert(host_models.build(name).double(), variant, score_floor=floor).model
        inputs = host_models.inputs_of(model, torch.float64)

        def run(_, inputs=inputs):
            out = host_models.run(model, inputs)
            return out[:, 0] if out.dim() == 3 else out

        expected = results(model, None, run)
        model = parallelize(copy.deepcopy(model), None)
        assert_close(mean_of_ranks(results(model, None, run)), expected, rtol=1e-6, atol=1e-9)


def refused_models():
    with pytest.raises(ValueError, match="no InfSA attention"):
        parallelize(nn.Linear(2, 2), None)
    with pytest.raises(NotImplementedError, match="has several hops"):
        parallelize(vit("multi_hop_infsa", hops=2), None)
    with pytest.raises(NotImplementedError, match="has another activation than 'relu'"):
        parallelize(vit(activation="gelu"), None)
    with pytest.raises(NotImplementedError, match="has add_bias_kv"):
        parallelize(InfSAAttention(D, H, add_bias_kv=True), None)
    with pytest.raises(NotImplementedError, match="is softmax attention"):
        parallelize(nn.ModuleList([InfSAAttention(D, H), nn.MultiheadAttention(D, H)]), None)
    from helpers import host_models

    half = convert(host_models.build("timm ViT"), exclude_patterns="1").model
    with pytest.raises(NotImplementedError, match=r"blocks\.1\.attn is softmax attention"):
        parallelize(half, None)
    with pytest.raises(ValueError, match="is parallelized already"):
        parallelize(parallelize(vit(), None), None)
    with pytest.raises(NotImplementedError, match="not one in each layer of one list"):
        parallelize(nn.ModuleDict({"a": InfSAAttention(D, H, batch_first=True), "b": InfSAAttention(D, H)}), None)


def two_dimensional_mesh():
    """Data x sequence: FSDP2 over both, activation checkpoints, compiled blocks."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    data, strip = (mesh[name].get_local_rank() for name in ("data", "sequence"))
    x = torch.randn(4, 2, 20, 12, dtype=torch.float64)
    mine = x[2 * data : 2 * data + 2].split([12, 8], 2)[strip]
    for variant, compiled in (("linear_infsa", True), ("pure_infsa", False)):
        model = vit(variant, pool="mean")
        expected = results(copy.deepcopy(model), x)
        model.set_grad_checkpointing(not compiled)
        parallelize(model, mesh["sequence"])
        for block in model.blocks:
            if compiled:
                block.compile(backend="aot_eager", fullgraph=True)
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        actual = results(model, mine)
        assert_close(actual.pop("scores"), expected.pop("scores")[2 * data : 2 * data + 2])
        # The loss of all pictures is a sum, FSDP's a mean over two sets of them.
        assert_close({n: 2 * t.full_tensor() for n, t in actual.items()}, expected)


CHECKS = [
    pictures_in_strips_are_whole_pictures,
    resized_positions_know_their_rows,
    wrong_strips_are_refused,
    attention_of_shards_is_attention,
    converted_models_are_sharded_between_their_layers,
    refused_models,
]


def test_two_ranks(tmp_path):
    ranks.run(CHECKS, 2, tmp_path / "store")


@pytest.mark.sweep
def test_four_ranks(tmp_path):
    checks = [functools.partial(pictures_in_strips_are_whole_pictures, 2), two_dimensional_mesh]
    ranks.run(checks, 4, tmp_path / "store")


def stuck_and_lost_rank():
    """One rank does not come, then it ends: the other is told, when the timeout is over and at once."""
    from infsa_kernels import distributed

    q, patient = torch.randn(1, 2, 64, 8), dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank() == 1:
        time.sleep(4)
        os._exit(0)
    with pytest.raises(RuntimeError, match="rank 0 of 2 waited for the others in vain"):
        distributed.linear_infsa(q, q, q, group=patient)
    for function, options in ((distributed.linear_infsa, {}), (distributed.pure_infsa, {"method": "ring"})):
        with pytest.raises(RuntimeError, match="one of them ended, raised an error or took longer"):
            function(q, q, q, **options)
    os._exit(0)


@pytest.mark.sweep
def test_a_lost_rank_is_an_error_on_the_others(tmp_path):
    ranks.run([stuck_and_lost_rank], 2, tmp_path / "store")


@pytest.mark.sweep
def test_example_learns():
    """The script as it stands, by torchrun."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "examples/train_sharded.py"]
    options = ["--pixels", "64", "--steps", "20", "--batch", "8"]
    run = subprocess.run([*command, *options], cwd=root, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "FSDP2-wrapped" not in run.stderr
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+),", run.stdout)]
    assert len(losses) == 2 and losses[1] < losses[0], run.stdout
