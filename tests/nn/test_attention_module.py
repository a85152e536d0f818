"""InfSAAttention against an evaluation of its own in float64, and its interface against nn.MultiheadAttention's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.calls import REFERENCE
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from infsa_kernels.nn import InfSAAttention
from infsa_kernels.testing import FORWARD, GRADIENT, assert_within, error_of_eager

VARIANTS = ("linear_infsa", "pure_infsa")
B, N, M, D, H = 2, 7, 5, 24, 4
KDIM, VDIM = 10, 9


def module(variant, dtype=torch.float64, **arguments):
    """With biases and rho that are not their initial constants."""
    attention = InfSAAttention(D, H, batch_first=True, variant=variant, dtype=dtype, **arguments)
    for p in attention.parameters():
        if p.dim() < 2:
            nn.init.normal_(p)
    return attention


def padding(*lengths, size):
    return torch.arange(size) >= torch.tensor(lengths)[:, None]


def by_hand(attention, query, key, value, key_mask=None, query_mask=None):
    """The same layer from F.linear and infsa_kernels.reference, a sample at a time without its padding; 0 at padding."""
    q_proj, v_proj, out_proj = attention.q_proj, attention.v_proj, attention.out_proj
    k_proj = q_proj if attention.tied else attention.k_proj
    out = []
    for b in range(len(query)):
        kept_keys = ~key_mask[b] if key_mask is not None else torch.ones(key.shape[1], dtype=torch.bool)
        kept_queries = ~query_mask[b] if query_mask is not None else torch.ones(query.shape[1], dtype=torch.bool)
        tokens = query[b][kept_queries], key[b][kept_keys], value[b][kept_keys]
        q, k, v = (F.linear(t, p.weight, p.bias) for t, p in zip(tokens, (q_proj, k_proj, v_proj)))
        if attention.bias_k is not None:
            k, v = torch.cat([k, attention.bias_k[0]]), torch.cat([v, attention.bias_v[0]])
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(0, 1)[None] for t in (q, k, v))
        rho = torch.sigmoid(attention.rho_logit)
        context = REFERENCE[attention.variant.split("_")[0]](q, k, v, rho, attention.eps)
        if attention.variant == "linear_infsa":
            context = context[:, :, None].expand(-1, -1, q.shape[2], -1)
        rows = F.linear(context[0].transpose(0, 1).flatten(1), out_proj.weight, out_proj.bias)
        out.append(query.new_zeros(query.shape[1], D).index_put((kept_queries.nonzero()[:, 0],), rows))
    return torch.stack(out)


def gradients(function, attention, tensors, dout):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out, torch.autograd.grad(out, [*leaves, *attention.parameters()], dout)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["self", "self_tied", "per_head", "no_bias", "cross", "cross_tied", "kdim", "bias_kv"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_equals_an_evaluation_by_hand(variant, form, masked):
    sizes = {"kdim": KDIM, "vdim": VDIM} if form == "kdim" else {}
    attention = module(
        variant, tied="tied" in form, rho_per_head=form == "per_head", bias=form != "no_bias",
        add_bias_kv=form == "bias_kv", **sizes,
    )  # fmt: skip
    query = torch.randn(B, N, D, dtype=torch.float64)
    if form in ("self", "self_tied", "per_head", "no_bias", "bias_kv"):
        tensors, masks = [query], [padding(4, 7, size=N) if masked else None] * 2

        def call(x):
            return attention(x, key_padding_mask=masks[0])[0]

        def expected(x):
            return by_hand(attention, x, x, x, *masks)
    else:
        key, value = (torch.randn(B, M, sizes.get(n, D), dtype=torch.float64) for n in ("kdim", "vdim"))
        tensors = [query, key, value]
        masks = [padding(3, 5, size=M), padding(7, 2, size=N)] if masked else [None, None]

        def call(q, k, v):
            return attention(q, k, v, key_padding_mask=masks[0], query_padding_mask=masks[1])[0]

        def expected(q, k, v):
            return by_hand(attention, q, k, v, *masks)

    dout = torch.randn_like(query)
    for actual, truth in zip(*(gradients(f, attention, tensors, dout) for f in (call, expected))):
        assert_close(actual, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_by_the_rule(variant, dtype):
    attention, exact = module(variant, dtype), module(variant)
    exact.load_state_dict({name: t.double() for name, t in attention.state_dict().items()})
    x, dout = torch.randn(2, B, 33, D, dtype=dtype).unbind()
    truths, errors = None, None
    # As tests/calls.py: the error of plain code is its largest over a few nearby inputs.
    for near in [x, *(x * (1 + (torch.rand(D) - 0.5) / 32).to(dtype) for _ in range(7))]:
        (out, grads), (low_out, low_grads) = (
            gradients(lambda t: by_hand(twin, t, t, t), twin, [near.to(kind)], dout.to(kind))
            for twin, kind in ((exact, torch.float64), (attention, dtype))
        )
        truths = truths or [out, *grads]
        found = [error_of_eager(low, truth, dtype) for low, truth in zip([low_out, *low_grads], [out, *grads])]
        errors = list(map(max, errors, found)) if errors else found

    out, grads = gradients(lambda t: attention(t)[0], attention, [x], dout)
    names = ["out", "dx", *(f"d{name}" for name, _ in attention.named_parameters())]
    for name, actual, truth, error in zip(names, [out, *grads], truths, errors, strict=True):
        assert_within(actual, truth, error, FORWARD if name == "out" else GRADIENT, name)


def test_padding_may_hold_anything():
    mask = padding(4, 7, size=N)
    for variant in VARIANTS:
        attention = module(variant)
        x = torch.randn(B, N, D, dtype=torch.float64)
        junk = x.masked_fill(mask[..., None], 1e6)
        actual, expected = attention(junk, key_padding_mask=mask)[0], attention(x, key_padding_mask=mask)[0]
        assert_close(actual, expected)
        assert (actual[mask] == 0).all()
        # As nn.TransformerEncoder hands it on, and as torch's masks of one sample are.
        additive = torch.zeros(B, N, dtype=torch.float64).masked_fill(mask, -torch.inf)
        assert torch.equal(attention(x, key_padding_mask=additive)[0], expected)
        assert_close(attention(x[0], key_padding_mask=mask[0])[0], expected[0])


INTERFACE = [*itertools.product((False, True), (False, True), (False, True), ({}, {"kdim": KDIM, "vdim": VDIM}))]


@pytest.mark.parametrize("batch_first, batched, average, sizes", INTERFACE)
def test_shapes_are_those_of_multihead_attention(batch_first, batched, average, sizes):
    for extra, variant in itertools.product(("add_bias_kv", "add_zero_attn"), VARIANTS):
        arguments = {"batch_first": batch_first, extra: True, **sizes}
        theirs = nn.MultiheadAttention(D, H, **arguments)
        ours = InfSAAttention(D, H, **arguments, variant=variant)
        lengths = ((B, N), (B, M)) if batch_first else ((N, B), (M, B))
        lengths = lengths if batched else ((N,), (M,))
        q, k, v = (torch.randn(*lengths[i > 0], s) for i, s in enumerate((D, ours.kdim, ours.vdim)))
        mask = padding(3, 4, size=M) if batched else padding(3, size=M)[0]
        for need_weights in (False, True):
            options = {"key_padding_mask": mask, "need_weights": need_weights, "average_attn_weights": average}
            expected, actual = theirs(q, k, v, **options), ours(q, k, v, **options)
            assert actual[0].shape == expected[0].shape
            assert [w.shape for w in actual[1:] if w is not None] == [w.shape for w in expected[1:] if w is not None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_are_those_that_were_used(variant):
    x, mask = torch.randn(B, N, D, dtype=torch.float64), padding(4, 7, size=N)
    for attention in (module(variant), module(variant, dropout=0.5), module(variant, add_zero_attn=True)):
        out, weights = attention(x, key_padding_mask=mask, need_weights=True, average_attn_weights=False)
        v = attention.v_proj(x).unflatten(-1, (H, -1)).transpose(1, 2)
        v = F.pad(v, (0, 0, 0, weights.shape[-1] - N))
        rows = attention.out_proj((weights @ v).transpose(1, 2).flatten(2))
        assert_close(out, rows.masked_fill(mask[..., None], 0))
        if attention.dropout:
            assert (weights[1] == 0).any()
            torch.manual_seed(1)
            dropped = attention(x)[0]
            torch.manual_seed(1)
            assert_close(attention(x, need_weights=True)[0], dropped)
            assert not torch.equal(attention.eval()(x)[0], dropped)
        attention.eval()
        out, average = attention(x, need_weights=True)
        weights = attention(x, need_weights=True, average_attn_weights=False)[1]
        assert_close(average, weights.mean(1))
        assert_close(attention(x)[0], out)


class Operators(TorchDispatchMode):
    """Records the names of our operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "infsa":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


class Adapted(nn.Linear):
    """What an adapter makes of a projection: more than its weight."""

    def forward(self, x):
        return super().forward(x) + 1


def test_the_pooled_layer_runs_where_it_is_the_same():
    x, norm = torch.randn(B, N, D, dtype=torch.float64), nn.LayerNorm(D, dtype=torch.float64)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    mask = padding(4, 7, size=N)

    def adapt(attention):
        attention.v_proj.__class__ = Adapted

    def hook(attention):
        attention.q_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))

    forms = {"plain": {}, "tied": {"tied": True}, "dropout": {"dropout": 0.1}, "bias_kv": {"add_bias_kv": True}}
    for form, change in [(form, None) for form in forms] + [("plain", adapt), ("plain", hook)]:
        attention = module("linear_infsa", **forms[form])
        if change:
            change(attention)
        for training in (True, False):
            attention.train(training)
            with Operators() as used:
                out = attention.pooled(x, norm, mask)
            pooled = change is None and (form in ("plain", "tied") or (form == "dropout" and not training))
            assert any(name.startswith("score_pool") for name in used.names) == pooled
            if form == "dropout" and training:
                continue
            expected = attention(norm(x), key_padding_mask=mask, need_weights=True)[0]
            assert_close(out[:, None].expand_as(expected).masked_fill(mask[..., None], 0), expected)


def test_transformer_encoder_runs_it_in_training_and_evaluation():
    x, mask = torch.randn(B, N, D), padding(4, 7, size=N)
    for variant in VARIANTS:
        layer = nn.TransformerEncoderLayer(D, H, 32, 0.0, batch_first=True)
        layer.self_attn = InfSAAttention(D, H, batch_first=True, variant=variant)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        expected = encoder(x, src_key_padding_mask=mask)
        encoder.eval()
        with torch.no_grad():
            assert_close(encoder(x, src_key_padding_mask=mask), expected)
