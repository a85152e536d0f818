"""The modules under torch.compile, checkpointing, DDP, FSDP2 and tensor parallelism: the same numbers as alone."""

import copy
import functools

import pytest
import torch
from helpers import ranks
from helpers.sweep import swept
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from infsa_kernels.nn import InfSAAttention, InfViT

VARIANTS = ("linear_infsa", "pure_infsa")
B, N, D, H = 4, 6, 16, 4
WORLD = 2


def attention(variant, **arguments):
    torch.manual_seed(0)
    return InfSAAttention(D, H, batch_first=True, variant=variant, rho_per_head=True, **arguments).double()


def vit(variant):
    torch.manual_seed(0)
    model = InfViT(8, 4, 1, 3, D, 2, H, variant=variant, neumann="layer").double()
    nn.init.normal_(model.head.weight)
    return model


def results(module, x, run=None):
    """The output and every gradient, x's too."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    out = (module if run is None else run)(x)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    return {"out": out.detach(), "x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tied", [False, True])
def test_rho_learns(variant, tied):
    module, x = attention(variant, tied=tied), torch.randn(B, N, D, dtype=torch.float64)
    target = 0.5 * module(x)[0].detach()
    rho = module.rho.detach().clone()
    optimizer = torch.optim.SGD([module.rho_logit], lr=1.0)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append((module(x)[0] - target).square().sum())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert (module.rho < rho).all() and len(module.rho.unique()) > 1

    frozen = attention(variant, rho_trainable=False)
    assert "rho_logit" not in dict(frozen.named_parameters())


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        swept(("attention by inductor", "linear_infsa")),
        swept(("attention by inductor", "pure_infsa")),
        ("attention with dropout", "linear_infsa"),
        ("attention with dropout", "pure_infsa"),
        swept(("vit", "linear_infsa")),
        swept(("vit", "pure_infsa")),
    ],
)
def test_compiles_whole_for_any_length(kind, variant):
    """One graph without a break, forward and backward, compiled at most twice for four sizes."""
    module, compiler = {
        "attention by inductor": lambda: (attention(variant), "inductor"),
        "attention with dropout": lambda: (attention(variant, dropout=0.5).eval(), "aot_eager"),
        "vit": lambda: (vit(variant), "aot_eager"),
    }[kind]()
    torch.compiler.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    for n in (8, 12, 20, 40):
        x = torch.randn((B, 1, n, 12) if kind == "vit" else (B, n, D), dtype=torch.float64)
        assert_close(results(module, x, compiled), results(module, x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_masks_of_both_kinds(variant):
    module, x = attention(variant), torch.randn(B, N, D, dtype=torch.float64)
    mask = torch.arange(N) >= torch.tensor([6, 3, 1, 5])[:, None]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for given in (mask, torch.zeros(B, N).masked_fill(mask, -torch.inf)):
        assert_close(*(results(module, x, lambda t: f(t, t, t, key_padding_mask=given)) for f in (compiled, module)))
    with pytest.raises(RuntimeError, match="neither 0 nor -inf"):
        compiled(x, x, x, key_padding_mask=torch.ones(B, N))


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing(variant):
    module, x = attention(variant), torch.randn(B, N, D, dtype=torch.float64)
    assert_close(results(module, x, lambda t: checkpoint(module, t, use_reentrant=False)), results(module, x))
    model, x = vit(variant), torch.randn(B, 1, 8, 8, dtype=torch.float64)
    expected = results(model, x)
    model.set_grad_checkpointing()
    assert_close(results(model, x), expected)


def cases():
    for variant in VARIANTS:
        yield attention(variant), torch.randn(B, N, D, dtype=torch.float64)
        yield attention(variant, tied=True), torch.randn(B, N, D, dtype=torch.float64)
        yield vit(variant), torch.randn(B, 1, 8, 8, dtype=torch.float64)


def data_parallel(mesh):
    """Each process has half of the batch: DDP averages gradients, rho's too."""
    for module, x in cases():
        expected = results(copy.deepcopy(module), x)
        half = slice(mesh.get_local_rank() * B // WORLD, (mesh.get_local_rank() + 1) * B // WORLD)
        actual = results(module, x[half], nn.parallel.DistributedDataParallel(module))
        assert_close(actual.pop("out"), expected.pop("out")[half])
        assert_close(actual.pop("x"), expected.pop("x")[half])
        assert_close({name: WORLD * grad for name, grad in actual.items()}, expected)


def fully_sharded(mesh):
    """FSDP2: every block, or every attention module, has its parameters sharded on its own."""
    from torch.distributed.fsdp import fully_shard

    for module, x in cases():
        expected = results(copy.deepcopy(module), x)
        half = slice(mesh.get_local_rank() * B // WORLD, (mesh.get_local_rank() + 1) * B // WORLD)
        for part in module.blocks if isinstance(module, InfViT) else ():
            fully_shard(part.attn, mesh=mesh)
            fully_shard(part, mesh=mesh)
        fully_shard(module, mesh=mesh)
        actual = results(module, x[half])
        assert_close(actual.pop("out"), expected.pop("out")[half])
        del actual["x"], expected["x"]
        assert_close({name: WORLD * grad.full_tensor() for name, grad in actual.items()}, expected)


def sharded_heads_and_batch(mesh):
    """Tensor parallelism: projections by heads, rho replicated; and tokens sharded over the batch."""
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    def by_heads(name, part, mesh):
        for key, p in part.named_parameters(recurse=False):
            if name == "out_proj":
                where = Shard(1) if key == "weight" else Replicate()
            else:
                where = Shard(0) if name else Replicate()
            part.register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, [where])))

    for variant in VARIANTS:
        for tied in (False, True):
            for placement, shard_parameters in ((Shard(0), None), (Replicate(), by_heads)):
                x = torch.randn(B, N, D, dtype=torch.float64)
                torch.distributed.broadcast(x, 0)
                module = attention(variant, tied=tied)
                expected = results(copy.deepcopy(module), x)
                distribute_module(module, mesh, shard_parameters)
                actual = results(module, distribute_tensor(x, mesh, [placement]))
                assert_close({name: t.full_tensor() for name, t in actual.items()}, expected)


def on_mesh(check):
    check(torch.distributed.device_mesh.init_device_mesh("cpu", (WORLD,)))


@pytest.mark.sweep
def test_two_processes(tmp_path):
    checks = data_parallel, fully_sharded, sharded_heads_and_batch
    ranks.run([functools.partial(on_mesh, check) for check in checks], WORLD, tmp_path / "store")
