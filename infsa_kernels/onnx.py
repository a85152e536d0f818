"""ONNX: what the raw operators become in a graph that torch.onnx.export makes.

Public operators are composite: an exported program holds the raw forward operators of the backend that the export chose. One
translation serves every backend. It writes an operator out in ONNX's standard operators, opset 18, step by step as
`infsa_kernels.reference` does, and accumulates as the operators do: in float32, or in float64 for float64 input.
"""

from collections.abc import Callable

import torch

from .ops import central_query, linear, linear_floor, pure, score_pool, score_pool_floor
from .torch_private import OpOverload


def translation_table() -> dict[OpOverload, Callable]:
    """The operators in ONNX: ``torch.onnx.export(..., dynamo=True, custom_translation_table=translation_table())``.

    Both operators and the pooled layer, hence infsa_kernels.nn and converted models; in float32, bfloat16, float16 and
    float64, with masks, and with one tensor as q and k; forward only. B, H, N and M may be dynamic, d may not. The model
    holds standard operators of ONNX only, from opset 18 on.

    What differs from the operators: Pure InfSA holds its N x M scores, since nothing in ONNX streams them, and 16-bit
    tokens, weights and products are converted to float32.

    Raises:
        ImportError: onnxscript is not installed.

    Example::

        >>> attention = InfSAAttention(64, 4, batch_first=True).eval()
        >>> program = torch.onnx.export(
        ...     attention, (torch.randn(2, 197, 64),), "attention.onnx", dynamo=True,
        ...     dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},),
        ...     custom_translation_table=infsa_kernels.onnx.translation_table(),
        ... )
    """
    _onnxscript()
    translations = {
        linear.raw: _linear,
        linear_floor.raw: _linear_floor,
        pure.raw: _pure,
        central_query.raw: _central_query,
        score_pool.raw: _score_pool,
        score_pool_floor.raw: _score_pool_floor,
    }
    return {forward: translation for raw, translation in translations.items() for forward in raw.ops.values()}


def _onnxscript():
    try:
        import onnxscript
    except ImportError as error:
        raise ImportError(
            f"infsa_kernels.onnx: onnxscript does not import ({error}); torch.onnx.export needs it too: "
            "`pip install onnx onnxscript`"
        ) from error
    return onnxscript


class _Opset:
    """onnxscript's opset, imported with the first operator that is asked for."""

    def __getattr__(self, name):
        return getattr(_onnxscript().opset18, name)


op = _Opset()


# The translations: arguments and results of the raw operators, of which None and numbers are Python's.


def _linear(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    return _linear_floor(q, k, v, eps, None, rho, head_rho, key_padding_mask, query_padding_mask)[:5]


def _linear_floor(q, k, v, eps, score_floor, rho, head_rho, key_padding_mask, query_padding_mask):
    acc = _accumulation(q)
    s = _number(_scale(_static("infsa::linear", q, 3)), acc)
    u = op.Mul(_keep(op.Cast(q, to=acc), _of_rows(query_padding_mask), acc), s)  # (B, H, N, d)
    kappa = op.Mul(_keep(op.Cast(q if k is None else k, to=acc), _of_rows(key_padding_mask), acc), s)
    v = _keep(op.Cast(v, to=acc), _of_rows(key_padding_mask), acc)

    energy = op.ReduceL2(u, [3], keepdims=0)  # (B, H, N)
    qbar, energy_sum = _centre(u, energy, eps, acc)  # (B, H, d), (B, H)
    products = op.MatMul(kappa, op.Unsqueeze(qbar, [3]))  # (B, H, M, 1)
    products = _keep(products, _of_rows(key_padding_mask), acc)
    weights, score_sum, absolute_sum, shares = _weights(
        products, [2, 3], _of_rows(key_padding_mask), eps, score_floor, acc
    )
    context = op.Squeeze(op.MatMul(op.Transpose(weights, perm=[0, 1, 3, 2]), v), [2])  # (B, H, dv)
    out = op.Mul(context, _effective_rho(rho, head_rho, [2], acc))
    mean = shares and op.Squeeze(op.MatMul(op.Transpose(shares, perm=[0, 1, 3, 2]), v), [2])
    return op.Cast(out, to=q.dtype), context, qbar, energy_sum, score_sum, absolute_sum, mean


def _pure(q, k, v, eps, rho, head_rho, key_padding_mask, query_padding_mask):
    acc = _accumulation(q)
    s = _number(_scale(_static("infsa::pure", q, 3)), acc)
    eps = _number(eps, acc)
    q_acc = _keep(op.Cast(q, to=acc), _of_rows(query_padding_mask), acc)
    k = _keep(op.Cast(q if k is None else k, to=acc), _of_rows(key_padding_mask), acc)
    v = _keep(op.Cast(v, to=acc), _of_rows(key_padding_mask), acc)

    # Scores of large q and k have squares beyond the largest number: these scores, their norm and eps are 1/(a b) of what
    # they are, with a and b the largest elements of q and k where these are above 1.
    a, b = _largest(q_acc, acc), _largest(k, acc)  # (B, H, 1, 1)
    u, kappa = op.Mul(q_acc, op.Div(s, a)), op.Mul(k, op.Div(s, b))
    eps = op.Max(op.Div(op.Div(eps, a), b), _number(torch.finfo(_torch_dtype(acc)).tiny, acc))

    scores = op.Relu(op.MatMul(u, op.Transpose(kappa, perm=[0, 1, 3, 2])))  # (B, H, N, M)
    # Removed rows are 0, but 0 times an Inf is NaN.
    scores = _keep(scores, _of_pairs(query_padding_mask, key_padding_mask), acc)
    # Row by row and then over the rows: a float32 sum of N M squares in one go loses digits.
    norm = op.ReduceL2(op.ReduceL2(scores, [3], keepdims=1), [2], keepdims=1)  # (B, H, 1, 1)
    gain = op.Div(_effective_rho(rho, head_rho, [2, 3], acc), op.Add(norm, eps))
    # Once more: 0 times a value or a norm that is no number is none either.
    out = _keep(op.Mul(op.MatMul(scores, v), gain), _of_rows(query_padding_mask), acc)
    return op.Cast(out, to=q.dtype), op.Squeeze(op.Mul(op.Mul(norm, a), b), [2, 3])


def _central_query(x, weight, bias, norm_eps, eps, padding_mask):
    acc = _accumulation(x)
    H, d, D = (_static("infsa::central_query", weight, axis) for axis in range(3))
    s = _number(_scale(d), acc)
    rows = _normalise(x, norm_eps, padding_mask, acc)
    # (B, N, D) @ (D, H d), one product for all heads
    q = op.MatMul(rows, op.Transpose(op.Reshape(op.Cast(weight, to=acc), [H * d, D]), perm=[1, 0]))
    q = op.Reshape(q, [0, 0, H, d])
    u = op.Transpose(op.Mul(q if bias is None else op.Add(q, bias), s), perm=[0, 2, 1, 3])  # (B, H, N, d)
    energy = op.ReduceL2(u, [3], keepdims=0)
    if padding_mask is not None:
        energy = _keep(energy, op.Unsqueeze(padding_mask, [1]), acc)
    return _centre(u, energy, eps, acc)


def _score_pool(x, keys, key_bias, norm_eps, eps, padding_mask):
    return _score_pool_floor(x, keys, key_bias, norm_eps, eps, None, padding_mask)[:3]


def _score_pool_floor(x, keys, key_bias, norm_eps, eps, score_floor, padding_mask):
    acc = _accumulation(x)
    rows = _normalise(x, norm_eps, padding_mask, acc)
    products = op.MatMul(keys, op.Transpose(rows, perm=[0, 2, 1]))  # (B, H, N)
    products = products if key_bias is None else op.Add(products, op.Unsqueeze(key_bias, [2]))
    mask = None if padding_mask is None else op.Unsqueeze(padding_mask, [1])
    products = _keep(products, mask, acc)
    weights, score_sum, absolute_sum, shares = _weights(products, [2], mask, eps, score_floor, acc)
    mass = op.ReduceSum(weights, [2], keepdims=0)
    mean = shares and op.ReduceMean(op.MatMul(shares, rows), [1], keepdims=0)  # the heads have equal rows
    return op.MatMul(weights, rows), mass, score_sum, absolute_sum, mean


def _weights(products, axes, mask, eps, score_floor, acc):
    """ReLU(products), with a floor unless that is None, over their sum + eps; their sums, and what each key has of a mean."""
    scores = op.Relu(products)
    score_sum = op.ReduceSum(scores, axes, keepdims=0)
    norm, absolute_sum, shares = score_sum, None, None
    if score_floor is not None:
        absolute_sum = op.ReduceSum(op.Abs(products), axes, keepdims=0)
        ones = _keep(op.Expand(_number(1.0, acc), op.Shape(products)), mask, acc)
        shares = op.Div(ones, op.Max(op.ReduceSum(ones, axes, keepdims=1), _number(1.0, acc)))
        floor = op.Mul(absolute_sum, _number(score_floor, acc))
        scores = op.Add(scores, op.Mul(op.Unsqueeze(floor, axes), shares))
        norm = op.Add(score_sum, floor)
    return op.Div(scores, op.Unsqueeze(op.Add(norm, _number(eps, acc)), axes)), score_sum, absolute_sum, shares


def _centre(u, energy, eps, acc):
    """sum_i e_i u_i / (sum_i e_i + eps), (B, H, d), and sum_i e_i, (B, H)."""
    energy_sum = op.ReduceSum(energy, [2], keepdims=0)
    weights = op.Div(energy, op.Unsqueeze(op.Add(energy_sum, _number(eps, acc)), [2]))
    return op.Squeeze(op.MatMul(op.Unsqueeze(weights, [2]), u), [2]), energy_sum


def _normalise(x, norm_eps, padding_mask, acc):
    """Tokens (B, N, D) with mean 0 and variance 1, without an affine part, if norm_eps is given; ignored ones 0.

    Not by LayerNormalization, which runtimes may compute from the mean of squares: that loses a large mean's digits.
    """
    mask = None if padding_mask is None else op.Unsqueeze(padding_mask, [2])
    rows = _keep(op.Cast(x, to=acc), mask, acc)
    if norm_eps is None:
        return rows
    for _ in range(2):  # the first mean is rounded to its own digits
        rows = op.Sub(rows, op.ReduceMean(rows, [2]))
    variance = op.ReduceMean(op.Mul(rows, rows), [2])
    return _keep(op.Div(rows, op.Sqrt(op.Add(variance, _number(norm_eps, acc)))), mask, acc)


def _keep(x, mask, acc):
    """x, 0 where the mask says so, whatever it held."""
    return x if mask is None else op.Where(mask, _number(0.0, acc), x)


def _of_rows(mask):
    """A mask (B, L) for rows (B, H, L, .)."""
    return None if mask is None else op.Unsqueeze(mask, [1, 3])


def _of_pairs(queries, keys):
    """Masks (B, N) and (B, M) for scores (B, H, N, M)."""
    queries = None if queries is None else op.Unsqueeze(queries, [1, 3])
    keys = None if keys is None else op.Unsqueeze(keys, [1, 2])
    if queries is None or keys is None:
        return keys if queries is None else queries
    return op.Or(queries, keys)


def _largest(x, acc):
    """The largest absolute value of each head, if above 1, else 1: (B, H, 1, 1). Finite, and so Inf and NaN stay in x."""
    bound = _number(1e300 if _torch_dtype(acc) == torch.float64 else 1e36, acc)
    largest = op.ReduceMax(op.Abs(x), [2, 3])
    return op.Where(op.LessOrEqual(largest, bound), op.Max(largest, _number(1.0, acc)), bound)


def _effective_rho(rho, head_rho, axes, acc):
    rho = _number(rho, acc)
    return rho if head_rho is None else op.Mul(op.Unsqueeze(head_rho, axes), rho)


def _scale(d: int) -> float:
    return d**-0.5 if d else 1.0


def _static(name, x, axis) -> int:
    size = x.shape[axis]
    if not isinstance(size, int):
        raise ValueError(
            f"{name}: {x.name} has shape {list(x.shape)}, whose dimension {axis} is dynamic, expected a number; "
            "leave it out of dynamic_shapes: only B, H, N and M may be there"
        )
    return size


def _number(value, dtype):
    return op.Constant(value=_onnxscript().ir.tensor(value, dtype=dtype))


def _accumulation(x):
    dtypes = _onnxscript().ir.DataType
    return dtypes.DOUBLE if x.dtype == dtypes.DOUBLE else dtypes.FLOAT


def _torch_dtype(acc) -> torch.dtype:
    return torch.float64 if acc.name == "DOUBLE" else torch.float32
