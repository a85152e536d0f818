"""What users of autograd do around an operator: checkpoints, hooks, partial gradients, aliases, in-place writes."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from helpers.calls import OPS, REFERENCE
from helpers.framework_calls import DV, B, D, H, N, RawCalls, make_call
from torch.testing import assert_close
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from infsa_kernels.nn import InfSAAttention

GRADIENTS = ("q", "k", "v", "rho")


@pytest.fixture(params=["head_rho", "tied_masked_one_rho"])
def leaves(request, op, device, backend):
    return make_call(op, request.param, torch.float32, device).leaves()


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def gradients(call, run=None):
    out = (run or type(call).run)(call)
    return out.detach(), torch.autograd.grad(out.square().sum(), list(call.tensors().values()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(leaves, reentrant, device, backend):
    names, tensors = zip(*leaves.tensors().items())

    def block(*tensors):
        for name, t in zip(names, tensors):
            setattr(leaves, name, t)
        return leaves.run()

    expected = block(*tensors)
    expected.square().sum().backward()
    grads = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    with RawCalls() as raw:
        checkpointed = checkpoint(block, *tensors, use_reentrant=reentrant)
        checkpointed.square().sum().backward()
    assert (len(raw.arguments("fwd")), len(raw.arguments("bwd"))) == (2, 1)
    assert torch.equal(checkpointed, expected)
    for t, g in zip(tensors, grads):
        assert torch.equal(t.grad, g)


def save_operators(ctx, op, *args, **kwargs):
    """The policy of docs/nn.md."""
    return CheckpointPolicy.MUST_SAVE if op.namespace == "infsa" else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("variant", ["linear_infsa", "pure_infsa"])
def test_selective_checkpointing_keeps_the_operators_results(variant, device, backend):
    attention = InfSAAttention(16, 2, batch_first=True, variant=variant, device=device)
    x = torch.randn(B, N, 16, device=device, requires_grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, save_operators)

    def run(x):
        return checkpoint(lambda x: attention(x)[0], x, use_reentrant=False, context_fn=contexts)

    expected = torch.autograd.grad(attention(x)[0].square().sum(), [x, *attention.parameters()])
    with RawCalls() as raw:
        found = torch.autograd.grad(run(x).square().sum(), [x, *attention.parameters()])
    forwards = [direction for direction, suffix, _ in raw.calls if "bwd" not in direction + suffix]
    assert forwards == (["fwd"] if variant == "pure_infsa" else ["query", "pool"])
    assert_close(found, expected)


def test_saved_tensor_hooks(leaves, device, backend):
    """All that is kept for backward goes through the hooks: inputs by reference, and statistics of O(N) at most."""
    packed = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t.clone())[1], lambda t: t)
    expected = gradients(leaves)
    for context in (hooks, torch.autograd.graph.save_on_cpu(), torch.autograd.graph.save_on_cpu(pin_memory=False)):
        with context:
            out = leaves.run()
        grads = torch.autograd.grad(out.square().sum(), list(leaves.tensors().values()))
        assert_close((out.detach(), grads), expected, rtol=0, atol=0)
    inputs = {t.data_ptr() for t in (leaves.q, leaves.k, leaves.v) if t is not None}
    assert inputs <= {t.data_ptr() for t in packed}
    assert max(t.numel() for t in packed) <= B * H * N * max(D, DV)


def test_graph_walked_twice_and_freed(leaves, device, backend):
    tensors = list(leaves.tensors().values())
    out = leaves.run()
    first = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    assert_close(torch.autograd.grad(out.sum(), tensors), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), tensors)


@pytest.mark.one_in(2)
def test_graph_leaves_no_cycle(leaves, device, backend):
    """Memory goes when the output goes, not when Python next looks for cycles."""
    gc.collect()
    gc.disable()
    try:
        saved = leaves.run().grad_fn
        while saved.next_functions and "Forward" not in saved.name():
            saved = saved.next_functions[0][0]
        kept = saved.saved_tensors[-1]
        alive = weakref.ref(saved)
        del saved, kept
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "wanted", [[n for i, n in enumerate(GRADIENTS) if bits >> i & 1] for bits in range(1, 16)], ids="-".join
)
def test_only_wanted_gradients_are_computed(op, wanted, device, backend):
    call = make_call(op, "head_rho", torch.float32, device).leaves()
    everything = dict(zip(GRADIENTS, gradients(call)[1]))
    for name, t in call.tensors().items():
        t.requires_grad_(name in wanted)
    with RawCalls() as raw:
        call.run().square().sum().backward()
    (arguments,) = raw.arguments("bwd")
    assert arguments[-1] == [name in wanted for name in GRADIENTS]
    for name, t in call.tensors().items():
        assert (t.grad is not None) == (name in wanted)
        if name in wanted:
            assert_close(t.grad, everything[name])


def test_nothing_is_recorded_without_grad(leaves, device, backend):
    expected = leaves.run()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = leaves.run()
        assert not out.requires_grad
        assert torch.equal(out, expected)
        assert out.is_inference() == (context is torch.inference_mode)
    with torch.inference_mode():
        frozen = make_call(leaves.op, "head_rho", torch.float32, device)
        frozen.run()
    assert frozen.run().shape == expected.shape


def test_shared_storage_with_different_identity(op, device, backend):
    """k = q.detach() has the data of q and not its gradient: only the same tensor is tied."""
    q = torch.randn(B, H, N, D, dtype=torch.float64, device=device, requires_grad=True)
    v = torch.randn(B, H, N, DV, dtype=torch.float64, device=device)
    fused, truth = getattr(torch.ops.infsa, op), REFERENCE[op]

    def grads_of(function, *tensors):
        return torch.autograd.grad(function(*tensors).square().sum(), [t for t in tensors if t.requires_grad])

    leaf_on_same_storage = q.detach().requires_grad_()
    ways = [(q, q, v), (q, q.detach(), v), (q.detach(), q, v), (q, q.view(q.shape), v), (q, leaf_on_same_storage, v)]
    for tensors in ways:
        assert_close(grads_of(fused, *tensors), grads_of(truth, *tensors))
    assert not torch.equal(grads_of(fused, *ways[0])[0], grads_of(fused, *ways[1])[0])


def test_q_k_and_v_of_one_buffer(op, device, backend):
    """A fused projection: q, k, v are views of one tensor, and its gradient collects all three."""
    qkv = torch.randn(B, N, 3, H, D, dtype=torch.float64, device=device, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    results = []
    for function in (getattr(torch.ops.infsa, op), REFERENCE[op]):
        results += torch.autograd.grad(function(q, k, v).square().sum(), qkv, retain_graph=True)
    assert_close(*results)


def test_write_after_forward_is_noticed(leaves, device, backend):
    for name in leaves.tensors():
        call = make_call(leaves.op, "head_rho", torch.float32, device).leaves()
        changed = getattr(call, name) if getattr(call, name) is not None else call.q
        held = changed * 1
        setattr(call, name, held)
        out = call.run()
        held.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            out.sum().backward()


def test_hooks_and_retained_gradients(leaves, device, backend):
    expected = gradients(leaves)[1]
    seen = []
    leaves.q.register_hook(lambda g: seen.append(g) or g * 2)
    out = leaves.run()
    out.retain_grad()
    out.square().sum().backward()
    assert_close(out.grad, 2 * out.detach())
    assert_close(seen[0], expected[0])
    assert_close(leaves.q.grad, 2 * expected[0])


def test_module_with_rho_is_copied_and_trained(op, device, backend):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rho = torch.nn.Parameter(torch.ones(H, device=device))

        def forward(self, q, v):
            return getattr(torch.ops.infsa, op)(q, q, v, 1e-6, self.rho)

    q, v = torch.randn(B, H, N, D, device=device), torch.randn(B, H, N, DV, device=device)
    block = Block()
    twin = copy.deepcopy(block)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    block(q, v).square().sum().backward()
    optimizer.step()
    assert not torch.equal(block.rho, twin.rho)
    assert_close(twin(q, v) * block.rho.detach().view(H, *[1] * (block(q, v).dim() - 2)), block(q, v))
    block.rho.data.fill_(1)
    assert torch.equal(twin(q, v), block(q, v))
