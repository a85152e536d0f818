"""Calls that are wrong in one way, and the words in which they are refused."""

import warnings

import torch

B, H, N, M, D, DV = 2, 3, 5, 6, 4, 7

DTYPES = "torch.float32, torch.bfloat16, torch.float16 or torch.float64"


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def boolean(*shape, **options):
    return zeros(*shape, dtype=torch.bool, **options)


def good() -> dict:
    return {"q": zeros(B, H, N, D), "k": zeros(B, H, M, D), "v": zeros(B, H, M, DV)}


def shape(argument, got, letters, expected):
    return (
        ValueError,
        f"{argument} has shape {got}, expected {letters} = {expected}; broadcasting is not implied, use .expand()",
    )


def rank(argument, got, letters):
    return ValueError, f"{argument} has shape {got}, expected {letters}; view it with 4 dimensions"


def dtype(argument, got, expected="torch.float32"):
    return TypeError, f"{argument} has dtype {got}, expected {expected}; convert it with .to({expected})"


def device(argument, got="meta"):
    return ValueError, f"{argument} is on {got}, expected cpu, where q is; move it with .to(q.device)"


def layout(argument, kind):
    return TypeError, f"{argument} is a {kind}, expected a dense strided one; densify it first"


def number(argument, got, expected):
    return ValueError, f"{argument} is {got}, expected {expected}"


EPS, RHO = "a finite number above 0; the paper's is 1e-6", "a finite number; the paper's is 0.95"
LETTERS_K, LETTERS_V = "(B, H, M, d)", "(B, H, M, dv)"

# Wrong in the public and in the raw ops alike: the arguments that differ from good(), the exception and its words.
EVERYWHERE = [
    *(
        ({"q": zeros(B, H, N, D, dtype=t)}, (TypeError, f"q has dtype {t}, expected {DTYPES}; convert it with .to()"))
        for t in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn)
    ),
    ({"k": zeros(B, H, M, D).half()}, dtype("k", "torch.float16")),
    ({"v": zeros(B, H, M, DV).double()}, dtype("v", "torch.float64")),
    ({"q": zeros(B, H, N, D).bfloat16()}, dtype("k", "torch.float32", "torch.bfloat16")),
    ({"q": zeros()}, rank("q", "[]", "(B, H, N, d)")),
    ({"q": zeros(N, D)}, rank("q", "[5, 4]", "(B, H, N, d)")),
    ({"q": zeros(H, N, D)}, rank("q", "[3, 5, 4]", "(B, H, N, d)")),
    ({"q": zeros(1, B, H, N, D)}, rank("q", "[1, 2, 3, 5, 4]", "(B, H, N, d)")),
    ({"k": zeros(H, M, D)}, rank("k", "[3, 6, 4]", LETTERS_K)),
    ({"v": zeros(B, M, DV)}, rank("v", "[2, 6, 7]", LETTERS_V)),
    ({"k": zeros(B, H, M, D + 1)}, shape("k", "[2, 3, 6, 5]", LETTERS_K, "[2, 3, 6, 4]")),
    ({"k": zeros(1, H, M, D)}, shape("k", "[1, 3, 6, 4]", LETTERS_K, "[2, 3, 6, 4]")),
    ({"k": zeros(B, 1, M, D)}, shape("k", "[2, 1, 6, 4]", LETTERS_K, "[2, 3, 6, 4]")),
    ({"v": zeros(B, H, N, DV)}, shape("v", "[2, 3, 5, 7]", LETTERS_V, "[2, 3, 6, 7]")),
    ({"v": zeros(1, H, M, DV)}, shape("v", "[1, 3, 6, 7]", LETTERS_V, "[2, 3, 6, 7]")),
    ({"v": zeros(B, 1, M, DV)}, shape("v", "[2, 1, 6, 7]", LETTERS_V, "[2, 3, 6, 7]")),
    ({"k": zeros(B, H, M, D, device="meta")}, device("k")),
    ({"v": zeros(B, H, M, DV, device="meta")}, device("v")),
    ({"key_padding_mask": zeros(B, M)}, dtype("key_padding_mask", "torch.float32", "torch.bool")),
    ({"query_padding_mask": zeros(B, N, dtype=torch.uint8)}, dtype("query_padding_mask", "torch.uint8", "torch.bool")),
    ({"key_padding_mask": boolean(M)}, shape("key_padding_mask", "[6]", "(B, M)", "[2, 6]")),
    ({"key_padding_mask": boolean(1, M)}, shape("key_padding_mask", "[1, 6]", "(B, M)", "[2, 6]")),
    ({"key_padding_mask": boolean(B, N)}, shape("key_padding_mask", "[2, 5]", "(B, M)", "[2, 6]")),
    ({"key_padding_mask": boolean(B, 1, 1, M)}, shape("key_padding_mask", "[2, 1, 1, 6]", "(B, M)", "[2, 6]")),
    ({"query_padding_mask": boolean(B, M)}, shape("query_padding_mask", "[2, 6]", "(B, N)", "[2, 5]")),
    ({"query_padding_mask": boolean(B, 1)}, shape("query_padding_mask", "[2, 1]", "(B, N)", "[2, 5]")),
    ({"key_padding_mask": boolean(B, M, device="meta")}, device("key_padding_mask")),
    ({"query_padding_mask": boolean(B, N, device="meta")}, device("query_padding_mask")),
    ({"eps": 0.0}, number("eps", "0", EPS)),
    ({"eps": -1e-6}, number("eps", "-1e-06", EPS)),
    ({"eps": -0.125}, number("eps", "-0.125", EPS)),
    ({"eps": float("nan")}, number("eps", "nan", EPS)),
    ({"eps": float("inf")}, number("eps", "inf", EPS)),
    ({"rho": float("nan")}, number("rho", "nan", RHO)),
    ({"rho": float("-inf")}, number("rho", "-inf", RHO)),
]

# rho as a tensor, three dimensions and layouts are matters of the public ops.
PUBLIC = [
    (
        {"rho": zeros(H, dtype=torch.int64)},
        (TypeError, "rho has dtype torch.int64, expected a floating dtype; convert it"),
    ),
    *(
        (
            {"rho": zeros(*s)},
            (ValueError, f"rho has shape {list(s)}, expected [], [1] or (H,) = [3]; give one value, or one per head"),
        )
        for s in ((2,), (H, 1), (B, H), (0,))
    ),
    ({"rho": zeros(H, device="meta")}, device("rho")),
    (
        {"q": zeros(H, N, D), "k": zeros(B, M, D), "v": zeros(H, M, DV)},
        shape("k", "[2, 6, 4]", "(B*H, M, d)", "[3, 6, 4]"),
    ),
    (
        {"q": zeros(H, N, D), "k": zeros(H, M, D), "v": zeros(H, N, DV)},
        shape("v", "[3, 5, 7]", "(B*H, M, dv)", "[3, 6, 7]"),
    ),
    (
        {"q": zeros(H, N, D), "k": zeros(H, M, D), "v": zeros(H, M, DV), "key_padding_mask": boolean(1, M)},
        shape("key_padding_mask", "[1, 6]", "(B, M)", "[3, 6]"),
    ),
    (
        {"q": zeros(H, N, D), "k": zeros(H, M, D), "v": zeros(H, M, DV), "rho": zeros(B)},
        (ValueError, "rho has shape [2], expected [], [1] or (B*H,) = [3]; give one value, or one per head"),
    ),
]
# torch warns about layouts that it means to change.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    LAYOUTS = [
        ({"q": zeros(B, H, N, D).to_sparse()}, layout("q", "torch.sparse_coo tensor")),
        ({"k": zeros(M, D).to_sparse_csr()}, layout("k", "torch.sparse_csr tensor")),
        ({"v": zeros(B, H, M, DV).to_mkldnn()}, layout("v", "torch._mkldnn tensor")),
        ({"q": torch.quantize_per_tensor(zeros(B, H, N, D), 0.1, 0, torch.quint8)}, layout("q", "quantized tensor")),
        ({"k": torch.nested.nested_tensor([zeros(H, M, D), zeros(H, 2, D)])}, layout("k", "nested tensor")),
        (
            {"v": torch.nested.nested_tensor([zeros(M, DV), zeros(2, DV)], layout=torch.jagged)},
            layout("v", "nested tensor"),
        ),
        ({"key_padding_mask": boolean(B, M).to_sparse()}, layout("key_padding_mask", "torch.sparse_coo tensor")),
        ({"rho": zeros(H).to_sparse()}, layout("rho", "torch.sparse_coo tensor")),
    ]
RAW = [
    ({"head_rho": zeros(B, H).double()}, dtype("head_rho", "torch.float64")),
    ({"head_rho": zeros(H)}, shape("head_rho", "[3]", "(B, H)", "[2, 3]")),
    ({"head_rho": zeros(B, 1)}, shape("head_rho", "[2, 1]", "(B, H)", "[2, 3]")),
    ({"head_rho": zeros(B, H, device="meta")}, device("head_rho")),
    ({"k": None}, shape("v", "[2, 3, 6, 7]", LETTERS_V, "[2, 3, 5, 7]")),
]
# What torch.ops itself refuses, in its own words, the functions refuse in ours.
PYTHON_TYPES = [
    ({"q": [1.0]}, "q is a list, expected a Tensor"),
    ({"k": None}, "k is a NoneType, expected a Tensor"),
    ({"v": zeros(B, H, M, DV).numpy()}, "v is a ndarray, expected a Tensor"),
    ({"key_padding_mask": [[True]]}, "key_padding_mask is a list, expected a Tensor of torch.bool or None"),
    ({"query_padding_mask": 3}, "query_padding_mask is a int, expected a Tensor of torch.bool or None"),
    ({"rho": "0.95"}, "rho is a str, expected a number or a Tensor"),
    ({"rho": None}, "rho is a NoneType, expected a number or a Tensor"),
    ({"rho": 1j}, "rho is a complex, expected a number or a Tensor"),
    ({"rho": [0.9]}, "rho is a list, expected a number or a Tensor"),
    ({"eps": "1e-6"}, "eps is a str, expected a number"),
    ({"eps": None}, "eps is a NoneType, expected a number"),
    (
        {"eps": zeros().add(1e-6).requires_grad_()},
        "eps is a tensor that requires a gradient, expected a number: it gets none; give float(eps)",
    ),
    ({"eps": zeros(H)}, "eps is a tensor of shape [3], expected a number; give one for all heads"),
]
