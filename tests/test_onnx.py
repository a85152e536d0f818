"""What torch.onnx.export makes of the operators, layers and models, run by onnxruntime, is right by infsa_kernels/testing.py."""

import copy
import importlib
import re
import sys
import warnings
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torchvision
import transformers
from helpers.calls import DTYPES, OPS, Call, expected, plain
from torch import Tensor, nn

import infsa_kernels
from infsa_kernels.nn import InfSAAttention, InfViT, convert
from infsa_kernels.nn.transformers import register
from infsa_kernels.onnx import translation_table
from infsa_kernels.testing import FORWARD, assert_within, error_of_eager

ANY = torch.export.Dim.DYNAMIC
ROWS, TOKENS = {0: ANY, 2: ANY}, {0: ANY, 1: ANY}  # (B, H, N, d) and (B, N, ...)
DOCS = Path(__file__).parent.parent / "docs" / "onnx.md"


class Exported:
    """A module as an ONNX model in onnxruntime, from and to tensors."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...], *dynamic_shapes, opset: int | None = None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            program = torch.onnx.export(
                module.eval(), inputs, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False, opset_version=opset,
                custom_translation_table=translation_table(),
            )  # fmt: skip
        self.model = program.model_proto
        onnx.checker.check_model(self.model, full_check=True)
        self.session = onnxruntime.InferenceSession(self.model.SerializeToString(), providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        names = [i.name for i in self.session.get_inputs()]
        assert len(names) == len(inputs)
        arrays = {name: t.numpy() for name, t in zip(names, inputs)}
        return [torch.from_numpy(array) for array in self.session.run(None, arrays)]


def calls(q, k, v, rho, keys_out, queries_out) -> dict[str, Call]:
    """Both operators in every form, by name."""
    made = {}
    for op in OPS:
        for dtype in DTYPES:
            low = [t.to(dtype) for t in (q, k, v)]
            made[f"{op}, {dtype}, masked"] = Call(op, *low, rho, 1e-6, keys_out, queries_out)
            made[f"{op}, {dtype}, tied"] = Call(op, low[0], None, low[0], 0.5, 1e-3)
        flat = q.flatten(0, 1)
        made[f"{op}, (B*H, N, d), tied"] = Call(op, flat, None, flat)
    masks = keys_out, queries_out
    made["linear, with a floor and masks"] = Call("linear", q, k, v, rho, 1e-6, *masks, score_floor=0.1)
    made["linear, with a floor, tied"] = Call("linear", q.half(), None, q.half(), 0.5, 1e-3, score_floor=0.1)
    return made


class Operators(nn.Module):
    def forward(self, *inputs):
        outputs = [call.run() for call in calls(*inputs).values()]
        return [out.float() if out.dtype == torch.bfloat16 else out for out in outputs]  # numpy has no bfloat16


def operator_inputs(B=2, N=20, M=30):
    q, k, v = torch.randn(B, 3, N, 4), torch.randn(B, 3, M, 4), torch.randn(B, 3, M, 5)
    return [q, k, v, torch.rand(3), torch.rand(B, M) > 0.7, torch.rand(B, N) > 0.7]


@pytest.fixture(scope="module")
def operators():
    return Exported(Operators(), tuple(operator_inputs(2, 7, 9)), (ROWS, ROWS, ROWS, {}, TOKENS, TOKENS))


def test_the_table_has_every_raw_forward_operator():
    # Calls over several ranks, the parts that they are made of, and packed sequences (docs/onnx.md) ONNX has not.
    without = r"infsa::(?!sharded_|.*_(steps|blocks|varlen)_).*_fwd"
    names = {n for n in torch._C._dispatch_get_all_op_names() if re.match(without, n)}
    assert len(names) >= 12 and {op.name() for op in translation_table()} == names


@pytest.mark.parametrize("B, N, M", [(3, 50, 61), (1, 1, 1), (1, 300, 400), (2, 0, 5), (2, 5, 0), (0, 5, 7)])
@pytest.mark.one_in(3)
def test_operators_at_other_sizes(operators, B, N, M):
    hold_to_the_rule(operators, operator_inputs(B, N, M))


@pytest.mark.parametrize("size", [1e-20, 1e-9, 1e9, 1e15])
def test_operators_at_other_magnitudes(operators, size):
    q, k, *rest = operator_inputs()
    hold_to_the_rule(operators, [q * size, k * size, *rest])


def test_where_no_score_is_positive_the_result_is_zero(operators):
    q, k, *rest = operator_inputs()
    hold_to_the_rule(operators, [q.abs(), -k.abs(), *rest])
    for size in (1, 1e20):  # of which the products with each other, and eps over them, leave the range of float32
        for name, out in both(operators, q.abs() * size, -k.abs() * size, *rest):
            if "masked" in name and (size == 1 or ("pure" in name and "float16" not in name.replace("bfloat16", ""))):
                assert not out.any(), name


def test_ignored_tokens_do_not_leak(operators):
    q, k, v, rho, keys_out, queries_out = operator_inputs()
    keys_out[:, 3:5], queries_out[:, 5] = True, True
    intact = q.clone(), k.clone(), v.clone()
    k[:, :, 3], v[:, :, 4], q[:, :, 5] = torch.nan, torch.inf, torch.nan
    masked = [out for name, out in both(operators, q, k, v, rho, keys_out, queries_out) if "masked" in name]
    clean = [out for name, out in both(operators, *intact, rho, keys_out, queries_out) if "masked" in name]
    assert len(masked) == 2 * len(DTYPES) and all(map(torch.equal, masked, clean))
    keys_out[0], queries_out[1] = True, True
    hold_to_the_rule(operators, [*intact, rho, keys_out, queries_out])
    intact[0][0] = torch.nan  # queries without a key
    hold_to_the_rule(operators, [*intact, rho, keys_out, queries_out])


@pytest.mark.parametrize("argument", range(3), ids="qkv")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_propagate_as_in_torch(operators, argument, value):
    inputs = operator_inputs()
    inputs[argument][0, 0, 3, 1] = value
    inputs[-2][:, 3], inputs[-1][:, 3] = False, False
    hold_to_the_rule(operators, inputs)


def both(operators, *inputs):
    return zip(calls(*inputs), operators(*inputs))


def hold_to_the_rule(operators, inputs):
    for (name, call), out in zip(calls(*inputs).items(), operators(*inputs)):
        wanted = expected(call, draws=4)["out"]
        assert_within(out.to(call.q.dtype), wanted.truth, wanted.eager_error, FORWARD, name)


class Raw(nn.Module):
    """The raw operators of a backend, all that they return, for tokens in several dtypes."""

    def __init__(self, suffix=""):
        super().__init__()
        self.suffix = suffix

    def forward(self, mask, bias, *tokens_and_weights):
        x = tokens_and_weights[0]
        q = x.unflatten(-1, (4, 6)).transpose(1, 2)
        outputs = [*self.op("linear_fwd", q, None, q, 1e-6, 0.5, None, None, None)]
        outputs += self.op("linear_floor_fwd", q, None, q, 1e-6, 0.1, 0.5, None, mask, mask)
        outputs += self.op("pure_fwd", 9 * q, None, q, 1e-6, 1.0, None, mask, mask)
        outputs += self.of_tokens(*tokens_and_weights[:2], None, None, None)
        for x, weight in zip(tokens_and_weights[::2], tokens_and_weights[1::2]):
            outputs += self.of_tokens(x, weight, bias, 1e-5, mask)
        return outputs

    def of_tokens(self, x, weight, bias, norm_eps, mask):
        acc = torch.promote_types(x.dtype, torch.float32)
        bias = None if bias is None else bias.to(acc)
        keys = weight.to(acc).sum(1).expand(len(x), -1, -1)
        key_bias = None if bias is None else bias.sum(1).expand(len(x), -1)
        queries = self.op("central_query_fwd", x, weight, bias, norm_eps, 1e-6, mask)
        pooled = self.op("score_pool_fwd", x, keys, key_bias, norm_eps, 1e-6, mask)
        return *queries, *pooled, *self.op("score_pool_floor_fwd", x, keys, key_bias, norm_eps, 1e-6, 0.1, mask)

    def op(self, name, *arguments):
        return getattr(torch.ops.infsa, name + self.suffix)(*arguments)


def test_raw_operators_give_their_statistics():
    def inputs(B, N):
        made = [torch.rand(B, N) > 0.7, torch.randn(4, 6)]
        # An offset of 3000 leaves half of a float32's digits to what is normalised.
        for dtype, offset in ((torch.float32, 0), (torch.float32, 3e3), (torch.float64, 3e3), (torch.float16, 3)):
            made += [(torch.randn(B, N, 24) + offset).to(dtype), (torch.randn(4, 6, 24) / 5).to(dtype)]
        return made

    exported = Exported(Raw(), tuple(inputs(2, 5)), TOKENS, {}, (TOKENS, {}) * 4)
    compare(exported, Raw("_eager"), lambda: inputs(3, 40))


def compare(exported, module, draw):
    """One draw of inputs by the rule; the error of plain code is the largest over this draw and three more."""

    def outputs(module, inputs, cast):
        with torch.no_grad():
            return module(*(cast(t) if t.is_floating_point() else t for t in inputs))

    draws = [draw() for _ in range(4)]
    truths = [outputs(copy.deepcopy(module).double(), inputs, torch.Tensor.double) for inputs in draws]
    lows = [outputs(module, inputs, lambda t: t.to(plain(t.dtype))) for inputs in draws]
    results = exported(*draws[0])
    assert len(results) == len(truths[0])
    for i, (result, truth) in enumerate(zip(results, truths[0])):
        error = max(error_of_eager(low[i], t[i], result.dtype) for low, t in zip(lows, truths))
        assert_within(result, truth, error, FORWARD, f"output {i}")


class Together(nn.Module):
    """Several models of the same inputs: an export has a price of its own."""

    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *inputs):
        return [model(*inputs) for model in self.models]


class Layers(nn.Module):
    """InfSAAttention in its forms, with and without padding, and behind a LayerNorm that the pooled layer takes in."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.layers = nn.ModuleList(
            InfSAAttention(24, 3, batch_first=True, variant=variant, tied=tied, rho_per_head=tied)
            for variant in ("linear_infsa", "pure_infsa")
            for tied in (False, True)
        )
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)

    def forward(self, x, context, padding):
        linear, linear_tied, pure, pure_tied = self.layers
        padded = [layer(x, key_padding_mask=padding, norm=self.norm) for layer in (linear, linear_tied, pure_tied)]
        return [out for out, _ in (*padded, linear(context, x), pure(context, x))]


@pytest.mark.sweep
def test_attention_layers_with_padding_and_norm():
    def inputs(B, N, L):
        return torch.randn(B, N, 24), torch.randn(B, L, 24), torch.rand(B, N) > 0.6

    layers = Layers()
    exported = Exported(layers, inputs(2, 9, 4), TOKENS, TOKENS, TOKENS, opset=18)
    compare(exported, layers, lambda: inputs(3, 40, 70))


def vit(variant, **arguments):
    model = InfViT(16, 4, 3, 5, 32, 1, 4, variant=variant, **arguments)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.sweep
def test_vit_with_any_picture():
    model = Together(vit("linear_infsa")).eval()
    exported = Exported(model, (torch.randn(2, 3, 24, 32),), ({0: ANY, 2: ANY, 3: ANY},))
    compare(exported, model, lambda: [torch.randn(3, 3, 40, 20)])


def test_models_with_any_batch():
    torchvision_vit = torchvision.models.VisionTransformer(16, 4, 2, 4, 32, 64, num_classes=5)
    nn.init.normal_(torchvision_vit.heads[0].weight)
    converted = convert(torchvision_vit, variant="linear_infsa").model
    models = Together(converted, vit("pure_infsa", neumann="head", tied=True)).eval()
    exported = Exported(models, (torch.randn(2, 3, 16, 16),), ({0: ANY},))
    compare(exported, models, lambda: [torch.randn(5, 3, 16, 16)])


class Bert(nn.Module):
    def __init__(self, implementation):
        super().__init__()
        register()
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=50, attn_implementation=implementation, **sizes)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, ids, mask):
        return self.bert(ids, attention_mask=mask).last_hidden_state


@pytest.mark.sweep
def test_bert_with_padding():
    def inputs(B, N):
        return torch.randint(50, (B, N)), (torch.arange(N) < torch.randint(1, N + 1, (B, 1))).long()

    berts = Together(Bert("infsa_linear"), Bert("infsa_pure")).eval()
    exported = Exported(berts, inputs(2, 9), (TOKENS, TOKENS))
    compare(exported, berts, lambda: inputs(3, 20))


def test_a_dynamic_head_dimension_is_refused():
    class Operator(nn.Module):
        def forward(self, q):
            return torch.ops.infsa.pure(q, q, q)

    with pytest.raises(Exception, match=r"infsa::pure: q has shape .* dimension 3 is dynamic, .* only B, H, N and M"):
        Exported(Operator(), (torch.randn(2, 3, 5, 4),), {3: ANY})


def test_onnxscript_is_needed_for_the_table_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    module = importlib.reload(infsa_kernels.onnx)
    with pytest.raises(ImportError, match=r"onnxscript does not import .* `pip install onnx onnxscript`"):
        module.translation_table()


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    namespace = {}
    exec(compile(code, str(DOCS), "exec"), namespace)
    x = namespace["x"]
    torch.testing.assert_close(torch.from_numpy(namespace["y"]), namespace["attention"](x)[0])
