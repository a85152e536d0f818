"""variant="multi_hop_infsa": sums over walks of `hops` steps, or of any length, in layers, models and converted models."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.sweep import swept
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from infsa_kernels import infsa_attention, reference
from infsa_kernels.nn import InfSAAttention, InfViT, convert, replace_attention
from infsa_kernels.nn.timm import MultiHopInfSAAttention
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within, error_of_eager

B, N, D, H = 2, 9, 24, 4
HOPS = pytest.mark.parametrize("hops", [1, 3, None])


def module(hops, dtype=torch.float64, **arguments):
    attention = InfSAAttention(D, H, batch_first=True, variant="multi_hop_infsa", hops=hops, dtype=dtype, **arguments)
    for p in attention.parameters():
        if p.dim() < 2:
            nn.init.normal_(p)
    return attention


def padding(*lengths):
    return torch.arange(N) >= torch.tensor(lengths)[:, None]


def powers(A, hops):
    """sum of A^t for t = 1 .. hops, or of all."""
    if hops is None:
        one = torch.eye(A.shape[-1], dtype=A.dtype)
        return torch.linalg.inv(one - A) - one
    return sum(torch.linalg.matrix_power(A, t) for t in range(1, hops + 1))


def by_hand(attention, x, mask=None):
    """The layer with dense powers of rho A, a sample at a time without its padding."""
    k_proj = attention.q_proj if attention.tied else attention.k_proj
    out = []
    for b in range(len(x)):
        kept = ~mask[b] if mask is not None else torch.ones(x.shape[1], dtype=torch.bool)
        q, k, v = (
            F.linear(x[b][kept], p.weight, p.bias).unflatten(-1, (H, -1)).transpose(0, 1)
            for p in (attention.q_proj, k_proj, attention.v_proj)
        )
        scores = torch.relu(q @ k.mT / q.shape[-1])
        rho = torch.sigmoid(attention.rho_logit)[:, None, None]
        scores = scores.to(v.dtype)
        A = rho.to(v.dtype) * scores / (scores.norm(dim=(-2, -1), keepdim=True) + attention.eps)
        context = powers(A, attention.hops) @ v
        rows = F.linear(context.transpose(0, 1).flatten(1), attention.out_proj.weight, attention.out_proj.bias)
        out.append(rows.new_zeros(x.shape[1], D).index_put((kept.nonzero()[:, 0],), rows))
    return torch.stack(out)


def gradients(function, attention, x, dout):
    x = x.detach().requires_grad_()
    out = function(x)
    return out, *torch.autograd.grad(out, [x, *attention.parameters()], dout)


@HOPS
@pytest.mark.parametrize("form", [{}, {"tied": True}, {"rho_per_head": True}])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_equals_dense_powers(hops, form, masked):
    attention, mask = module(hops, **form), padding(5, 9) if masked else None
    x, dout = torch.randn(2, B, N, D, dtype=torch.float64).unbind()
    given = x if mask is None else x.masked_fill(mask[..., None], 1e3)
    actual = gradients(lambda x: attention(x, key_padding_mask=mask)[0], attention, given, dout)
    expected = gradients(lambda x: by_hand(attention, x, mask), attention, x, dout)
    names = ["out", "dx", *(name for name, _ in attention.named_parameters())]
    for name, got, truth in zip(names, actual, expected, strict=True):
        assert_close(got, truth, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@HOPS
def test_gradcheck(hops):
    attention = InfSAAttention(4, 2, variant="multi_hop_infsa", hops=hops, rho_per_head=True, dtype=torch.float64)
    x = torch.randn(4, 1, 4, dtype=torch.float64, requires_grad=True)

    def call(x, rho_logit):
        return torch.func.functional_call(attention, {"rho_logit": rho_logit}, (x,))[0]

    rho_logit = torch.tensor([0.3, 1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, rho_logit))
    assert torch.autograd.gradgradcheck(call, (x, rho_logit), atol=1e-4)


@HOPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_by_the_rule(hops, dtype):
    q, k, v, dout = torch.randn(4, B, H, 33, 8).to(dtype).unbind()

    def results(function, *tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))]

    def formula(q, k, v):
        # Plain code holds rho in the dtype of q; solve has no kernel for half precision.
        return reference.multi_hop(q, k, v, 0.75, hops=hops)

    eager_dtype = torch.float32 if hops is None else dtype
    truths, errors = None, None
    for near in range(8):
        moved = [(t * (1 + near * (torch.rand(8) - 0.5) / 32)).to(dtype) for t in (q, k, v)]
        truth = results(formula, *(t.double() for t in moved))
        low = results(formula, *(t.to(eager_dtype) for t in moved))
        truths = truths or truth
        # As rounding the result to its dtype is all that the solver, in float32, must not be blamed for.
        found = [error_of_eager(a.to(dtype), t, dtype) for a, t in zip(low, truth)]
        errors = list(map(max, errors, found)) if errors else found
    actual = results(lambda q, k, v: infsa_attention(q, k, v, "multi_hop_infsa", 0.75, hops=hops), q, k, v)
    for name, got, truth, error in zip(("out", "dq", "dk", "dv"), actual, truths, errors, strict=True):
        assert got.dtype == dtype
        assert_within(got, truth, error, FORWARD if name == "out" else GRADIENT, name)


def test_one_hop_is_pure_infsa_and_checkpoints_are_shared():
    """The same parameters: a model trained with Pure InfSA goes on with more hops."""
    pure = InfSAAttention(D, H, batch_first=True, variant="pure_infsa", rho_per_head=True)
    nn.init.normal_(pure.rho_logit)
    x = torch.randn(B, N, D)
    for hops in (1, 2, None):
        attention = module(hops, torch.float32, rho_per_head=True)
        attention.load_state_dict(pure.state_dict())
        assert torch.equal(attention(x)[0], pure(x)[0]) == (hops == 1)
        again = copy.deepcopy(attention)
        assert torch.equal(again(x)[0], attention(x)[0]) and again.hops == hops
        again.load_state_dict(nn.MultiheadAttention(D, H).state_dict())


@HOPS
def test_weights_are_the_sum_of_powers(hops):
    attention, mask = module(hops, rho_per_head=True), padding(5, 9)
    x = torch.randn(B, N, D, dtype=torch.float64)
    out, weights = attention(x, key_padding_mask=mask, need_weights=True, average_attn_weights=False)
    assert_close(out, attention(x, key_padding_mask=mask)[0])
    q, k = (p(x).unflatten(-1, (H, -1)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    A = reference.pure_scores(q, k, attention.rho, attention.eps, mask, mask)
    assert_close(weights, powers(A, hops), rtol=1e-9, atol=1e-10)
    assert (weights[0, :, 5:] == 0).all() and (weights[0, :, :, 5:] == 0).all()
    assert_close(attention(x, key_padding_mask=mask, need_weights=True)[1], weights.mean(1))


@HOPS
def test_a_value_whose_key_is_ignored_may_be_anything(hops):
    q, k, v = torch.randn(3, B, H, N, 6, dtype=torch.float64).unbind()
    keys = padding(5, 9)
    v = v.masked_fill(keys[:, None, :, None], torch.nan)
    out = infsa_attention(q, k, v, "multi_hop_infsa", 0.9, hops=hops, key_padding_mask=keys)
    assert_close(out, reference.multi_hop(q, k, v, 0.9, 1e-6, keys, hops=hops), rtol=1e-9, atol=1e-10)


@HOPS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(hops, dtype):
    """The products run in the dtype of autocast, a solver in float32, on projections that autocast has rounded."""
    attention, x = module(hops, torch.float32), torch.randn(B, 33, D)
    truth = copy.deepcopy(attention).double()(x.double())[0]
    with torch.autocast("cpu", dtype):
        out, _ = attention(x)
        low = by_hand(attention, x) if hops is not None else None
    assert out.dtype == dtype
    error = (out - truth).norm() / truth.norm()
    assert error < (3 * (low - truth).norm() / truth.norm() if hops is not None else 8 * torch.finfo(dtype).eps)
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


def test_rho_stays_below_one_in_low_precision():
    """sigmoid(6.3) is 0.9982, and 1 in bfloat16: no discount at all."""
    attention = module(None, torch.bfloat16)
    nn.init.constant_(attention.rho_logit, 6.3)
    assert attention.rho.dtype == torch.float32 and 0 < attention.rho < 1
    attention(torch.randn(B, N, D, dtype=torch.bfloat16))[0].sum().backward()
    assert attention.rho_logit.grad.isfinite().all()


@HOPS
def test_rho_learns(hops):
    """Towards the discount that made the target."""
    attention, x = module(hops), torch.randn(B, 5, D, dtype=torch.float64)
    with torch.no_grad():
        attention.rho_logit.fill_(1.5)
        target = attention(x)[0]
        attention.rho_logit.fill_(-1.0)
    optimizer = torch.optim.LBFGS([attention.rho_logit], max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        loss = (attention(x)[0] - target).square().sum()
        loss.backward()
        return loss

    optimizer.step(loss)
    assert_close(attention.rho_logit.item(), 1.5, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("hops", [2, swept(None)])
def test_compile_and_checkpointing(hops):
    """A number of hops is one graph for all sizes. All hops are found by iteration: a break in the graph, right all the same."""
    attention = module(hops, torch.float32)
    parameters = list(attention.parameters())
    compiled = torch.compile(attention, fullgraph=hops is not None, backend="aot_eager", dynamic=True)
    for length in (N, 13) if hops else (N,):
        x = torch.randn(B, length, D)
        functions = (
            lambda x: attention(x)[0],
            lambda x: compiled(x)[0],
            lambda x: checkpoint(attention, x, use_reentrant=False)[0],
        )
        expected, *others = ([f(x), *torch.autograd.grad(f(x).square().sum(), parameters)] for f in functions)
        for actual in others:
            assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if hops is None:
        with pytest.raises(Exception, match=r"marked as skipped|disable"):
            torch.compile(module(None), fullgraph=True, backend="aot_eager")(torch.randn(B, N, D, dtype=torch.float64))


@pytest.mark.parametrize("hops", [2, None])
@pytest.mark.parametrize("form", [{}, {"pool": "mean", "neumann": "head", "tied": True}])
def test_infvit(hops, form):
    model = InfViT(16, 4, 3, 5, 32, 2, 4, variant="multi_hop_infsa", hops=hops, rho_per_head=True, **form)
    nn.init.normal_(model.head.weight)
    x = torch.randn(2, 3, 16, 20)
    out = model(x)
    out.square().sum().backward()
    assert all(block.attn.hops == hops and block.attn.rho_logit.grad.abs().min() > 0 for block in model.blocks)
    gradient = model.patch_embed.weight.grad
    model.zero_grad()
    model.set_grad_checkpointing()
    model(x).square().sum().backward()
    assert_close(model.patch_embed.weight.grad, gradient)
    with torch.no_grad():
        assert_close(model.eval()(x), out)
    pure = InfViT(16, 4, 3, 5, 32, 2, 4, variant="pure_infsa", rho_per_head=True, **form)
    pure.load_state_dict(model.state_dict())
    assert not torch.allclose(pure(x), out)


@pytest.mark.parametrize("hops", [2, None])
def test_converted_models_have_the_hops(hops):
    vit = timm.create_model("vit_tiny_patch16_224", embed_dim=32, num_heads=4, depth=1, img_size=32).eval()
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.0, batch_first=True).eval()
    for model, x in ((vit, torch.randn(2, 3, 32, 32)), (layer, torch.randn(2, 7, 32))):
        found = {}
        for variant, many in (("multi_hop_infsa", hops), ("multi_hop_infsa", 1), ("pure_infsa", None)):
            converted = convert(model, variant, hops=many).model
            found[many if "hop" in variant else "pure"] = converted(x)
        assert_close(found[1], found["pure"])
        assert not torch.allclose(found[hops], found["pure"])
    assert type(convert(vit, "multi_hop_infsa").model.blocks[0].attn) is MultiHopInfSAAttention


def test_what_has_no_form_is_refused():
    x = torch.randn(B, N, D)
    multi = dict(variant="multi_hop_infsa")
    with pytest.raises(
        NotImplementedError, match=r"InfSAAttention: dropout is 0\.1, expected 0: .*all hops go through"
    ):
        InfSAAttention(D, H, dropout=0.1, **multi)
    with pytest.raises(NotImplementedError, match=r"infsa_attention: dropout is 0\.1"):
        infsa_attention(*torch.randn(3, 1, 2, 5, 4), "multi_hop_infsa", dropout_p=0.1, training=True)
    later = module(2, torch.float32)
    later.dropout = 0.5
    with pytest.raises(NotImplementedError, match=r"dropout is 0\.5"):
        later(x)
    later.eval()(x)
    for name in ("add_bias_kv", "add_zero_attn"):
        with pytest.raises(NotImplementedError, match=f"{name} is True, expected False .* is no query"):
            InfSAAttention(D, H, **{name: True}, **multi)
    for hops in (1, 3, None):
        with pytest.raises(ValueError, match="9 queries and 5 keys, expected as many"):
            module(hops, torch.float32)(x, x[:, :5])
    with pytest.raises(NotImplementedError, match="expected 'linear_infsa'"):
        module(2, torch.float32).pooled(x)
    for dropped in (nn.MultiheadAttention(D, H, 0.1), timm.layers.Attention(D, H, attn_drop=0.1)):
        with pytest.raises(NotImplementedError, match=r"cannot be converted: .*0\.1.* all hops go through"):
            replace_attention(dropped, "multi_hop_infsa")


@pytest.mark.parametrize("make", [
    lambda **a: InfSAAttention(D, H, **a), lambda **a: InfViT(8, 4, 3, 5, 8, 1, 2, **a),
    lambda **a: convert(nn.Linear(2, 2), **a), lambda **a: infsa_attention(*torch.randn(3, 1, 2, 5, 4), **a),
])  # fmt: skip
def test_wrong_hops(make):
    for variant in ("linear_infsa", "pure_infsa"):
        with pytest.raises(ValueError, match=f"hops is 3, expected None with variant='{variant}'"):
            make(variant=variant, hops=3)
    with pytest.raises(ValueError, match="hops is 0, expected at least 1"):
        make(variant="multi_hop_infsa", hops=0)
    with pytest.raises(TypeError, match=r"hops is 2\.5, a float, expected an int"):
        make(variant="multi_hop_infsa", hops=2.5)


def test_softmax_has_no_hops():
    with pytest.raises(ValueError, match="hops is 2, expected None with variant='softmax'"):
        InfViT(8, 4, 3, 5, 8, 1, 2, variant="softmax", hops=2)
