"""What a row measures, built: a mechanism on one of three levels, its inputs, and what calls it.

    operator    q, k, v (B, H, N, d) given       -> the core
    layer       x (B, N, D)                      -> x + layer(LayerNorm(x))
    model       a picture                        -> class scores of a Vision Transformer of 4 or 24 layers

The model is InfViT with any mechanism in the place of its attention, pooled by the mean of its tokens: half of the mechanisms
need tokens on a grid, so there is no class token.
"""

import time
from functools import lru_cache

import torch
from torch import Tensor, nn

import infsa_kernels
from infsa_kernels.nn.vit import Block, InfViT

from . import peers
from .image import PATCH, D, inputs
from .peers.mechanism import DTYPES
from .timer import capture, on_capture_stream

# The paper's two depths, with the heads that its Linear-InfSA has there.
HEADS = {4: 64, 24: 16}


class Subject:
    """A mechanism in a case: level, dtype, layout, batch, dim, depth, pixels, phase and way by name; heads, if not its own."""

    def __init__(self, case: dict, name: str, device: torch.device):
        self.case, self.name, self.device, self.dtype = case, name, device, DTYPES[case["dtype"]]
        self.parts: dict[str, float] = {}
        level, pixels, dim = (case[f] for f in ("level", "pixels", "dim"))
        grid = (pixels // PATCH,) * 2
        self.tokens = grid[0] * grid[1]
        torch.manual_seed(0)
        if level == "model":
            self.module = model(name, case["depth"], pixels, dim)
            if device.type == "cpu":
                watch(self.module, self.parts)
        else:
            self.module = peers.build(name, dim, grid, case.get("heads"))
        if level == "layer":
            self.module.add_module("sublayer_norm", nn.LayerNorm(dim))
        self.module = self.module.to(device, self.dtype).eval()
        self.inputs = list(given(level, pixels, case["batch"], dim, self.dtype, device))
        if level == "operator":
            self.inputs = [self.module.heads(t) for t in self.inputs]
            if case["layout"] == "bhnd":
                self.inputs = [t.contiguous() for t in self.inputs]

    def at(self, **changes) -> "Subject":
        """The same otherwise."""
        return Subject(self.case | changes, self.name, self.device)

    @property
    def mechanism(self) -> peers.Mechanism | None:
        return self.module if isinstance(self.module, peers.Mechanism) else None

    def function(self):
        """What is called: inputs -> output, on the backend that the name asks for."""
        module, level = self.module, self.case["level"]
        run = module if level == "model" else module.core if level == "operator" else self._sublayer
        if self.case["way"] == "compile":
            torch._dynamo.reset()
            return torch.compile(run, dynamic=False)
        return self.on_backend(run)

    def _sublayer(self, x: Tensor) -> Tensor:
        return self.module.sublayer(x, self.module.sublayer_norm)

    def on_backend(self, run):
        backend = self.name.partition("@")[2]
        if not backend:
            return run

        def on_backend(*inputs):
            with infsa_kernels.backend(backend):
                return run(*inputs)

        return on_backend

    def parameters(self) -> list[nn.Parameter]:
        return [p for n, p in self.module.named_parameters() if not n.startswith("sublayer_norm")]

    def action(self, function):
        if self.case["phase"] == "fwd" or isinstance(self.module, peers.Limit):
            self.module.eval()

            def forward(lap):
                with torch.no_grad():
                    out = function(*self.inputs)
                return list(out) if isinstance(out, list) else [out]

            return self._graphed(lambda: forward(None)) if self.case["way"] == "graph" else forward
        self.module.train()
        leaves = [t.detach().requires_grad_() for t in self.inputs]
        wanted, dout = [*leaves, *self.module.parameters()], []

        def gradients(out, **keep):
            if not dout:
                dout.append(torch.randn_like(out))
            return [g for g in torch.autograd.grad(out, wanted, dout[0], allow_unused=True, **keep) if g is not None]

        def train(lap):
            out = function(*leaves)
            lap()
            return [out.detach(), *gradients(out)]

        if self.case["way"] != "graph":
            return train
        # The backward pass alone, of a graph of autograd kept between calls.
        with on_capture_stream(self.device):
            kept = function(*leaves)
            gradients(kept, retain_graph=True)
        return self._graphed(lambda: gradients(kept, retain_graph=True))

    def _graphed(self, run):
        """Replays of a CUDA graph: the host's launches, the same for everybody, do not hide the kernels."""
        if self.device.type == "cpu":
            return lambda lap: run()
        graph, results = capture(run)

        def replay(lap):
            graph.replay()
            return results

        return replay


class PeerBlock(Block):
    """A block whose attention is a mechanism."""

    def __init__(self, mechanism: peers.Mechanism):
        super().__init__(mechanism.dim, mechanism.num_heads, 4.0, "softmax")
        self.attn = mechanism

    def _attend(self, x, first_only):
        return self.attn(self.norm1(x))


def heads_of_model(name: str, depth: int, dim: int) -> int:
    return max(1, (HEADS[depth] if name.startswith("linear_infsa") else 16) * dim // D)


def model(name: str, depth: int, pixels: int, dim: int = D) -> InfViT:
    """4 or 24 layers of a mechanism for pictures of a size; its head starts at random, so that outputs can be compared."""
    H = heads_of_model(name, depth, dim)
    if name in ("linear_infsa", "pure_infsa"):
        net = InfViT(pixels, depth=depth, embed_dim=dim, num_heads=H, variant=name, tied=True, pool="mean")
    else:
        net = InfViT(pixels, depth=0, embed_dim=dim, variant="softmax", pool="mean")
        grid = (pixels // PATCH,) * 2
        net.blocks = nn.ModuleList(PeerBlock(peers.build(name, dim, grid, H)) for _ in range(depth))
    nn.init.normal_(net.head.weight, std=dim**-0.5)
    return net


def watch(net: InfViT, seconds: dict[str, float]) -> None:
    """Fills in the seconds of patch embedding, attention and MLP in a model's last call."""

    def part(module: nn.Module, name: str):
        def start(*_):
            if name == "patches":
                seconds.update(patches=0.0, attention=0.0, MLP=0.0)
            seconds[name] -= time.perf_counter()

        def stop(*_):
            seconds[name] += time.perf_counter()

        module.register_forward_pre_hook(start)
        module.register_forward_hook(stop)

    part(net.patch_embed, "patches")
    for block in net.blocks:
        part(block.attn, "attention")
        part(block.mlp, "MLP")


@lru_cache(maxsize=2)
def given(level: str, pixels: int, batch: int, dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """What a level starts from: pictures, x (B, N, D), or q, k and v of that shape. The batch is the picture, rolled."""
    pictures = [torch.cat([t.roll(i, -2) for i in range(batch)]) for t in inputs(level, pixels)]
    return [(t if level == "model" else t[..., :dim]).to(device, dtype) for t in pictures]
