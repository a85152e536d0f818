"""`monitor`: how the attention layers of a model fare in training, from statistics that the operators make anyway.

A raw operator returns, beside its output, what its backward needs: Linear-InfSA the sum of the positive scores of every image and
head, Pure InfSA the norm of its scores. Where that is 0 a head has no positive score: its output and all gradients are 0.
Nothing is computed for them a second time, and no score is held.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..ops.register import RAW_OPS
from ..torch_private import has_compiled, in_functorch

# Statistics of raw operators that are 0 without a positive score, by what their schemas call them, and what they are called here.
_TAGS = {"score_sum": "score_sum", "norm": "score_norm"}


@contextlib.contextmanager
def monitor(model: nn.Module) -> Iterator[dict[str, float]]:
    """Records what the InfSA layers of ``model`` do inside the context, as numbers for a log.

    The dict is filled at the end of the context. Its keys are tags of TensorBoard, a group per quantity, NAME being the layer's
    name in ``model.named_modules()``:

    * ``dead_pairs/NAME``: which part of the pairs (image, head) has no positive score. With a score_floor of 0 their output and
      all their gradients are 0; with one they are mean pooling.
    * ``dead_heads/NAME``: which part of the heads has none on any image.
    * ``score_sum/NAME``: the median over the other pairs of the sum of positive scores, sum_j ReLU(qbar . kappa_j); of Pure
      and multi-hop InfSA ``score_norm/NAME``, that of ||P||_F. NaN if there is no such pair.
    * ``least_score_sum/NAME``, ``least_score_norm/NAME``: the smallest of these. Gradients grow as its inverse.
    * ``rho/NAME``: rho, the mean over the heads.
    * ``gradient_norm/NAME``: the norm of all gradients of the layer's parameters as they are at the end; and
      ``gradient_norm/model``, of all of the model's. Missing where there is none; scaled if a GradScaler has not unscaled them.

    All calls inside the context count together, as those of several small batches. A process counts its own images. Parts that
    torch.compile has compiled run uncompiled meanwhile: what is inside a compiled graph cannot be seen. Not seen, and so without
    scores among the tags: a layer that drops scores (its dropout is active) or has another activation than ReLU, and calls inside
    torch.func's transforms.

    Raises:
        ValueError: the model has no InfSA layer.

    Example::

        >>> with monitor(model) as found:
        ...     F.cross_entropy(model(images), classes).backward()
        >>> for tag, value in found.items():
        ...     writer.add_scalar(tag, value, step)
    """
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "rho_logit")}
    if not layers:
        raise ValueError(
            f"monitor: model is a {type(model).__name__} without a layer that has rho_logit, expected one with InfSA layers; "
            "infsa_kernels.nn.convert makes them of softmax attention"
        )
    calls, found = _Calls(), {}
    handles = []
    for name, module in layers.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: calls.enter(name)))
        handles.append(module.register_forward_hook(lambda *_: calls.leave(), always_call=True))
    try:
        uncompiled = torch.compiler.set_stance("force_eager") if has_compiled() else None
        with uncompiled or contextlib.nullcontext(), contextlib.ExitStack() as observed:
            for raw in RAW_OPS:
                if not _TAGS.keys().isdisjoint(raw.forward.results):
                    observed.enter_context(raw.observed(calls.observe))
            yield found
    finally:
        for handle in handles:
            handle.remove()
    found.update(_numbers(model, layers, calls.seen))


def _numbers(
    model: nn.Module, layers: dict[str, nn.Module], seen: dict[tuple[str, str], list[Tensor]]
) -> dict[str, float]:
    values = {}
    for (name, tag), statistics in seen.items():
        sums = torch.cat(statistics)
        dead = sums == 0
        values[f"dead_pairs/{name}"] = dead.float().mean()
        values[f"dead_heads/{name}"] = dead.all(0).float().mean()
        values[f"{tag}/{name}"] = sums.masked_fill(dead, torch.nan).nanmedian()
        least = sums.masked_fill(dead, torch.inf).amin()
        values[f"least_{tag}/{name}"] = torch.where(least.isinf(), torch.nan, least)
    for name, layer in layers.items():
        values[f"rho/{name}"] = layer.rho_logit.detach().float().sigmoid().mean()
    for name, module in (layers | {"model": model}).items():
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            values[f"gradient_norm/{name}"] = nn.utils.get_total_norm(gradients)
    values = {tag: value.full_tensor() if hasattr(value, "full_tensor") else value for tag, value in values.items()}
    device = next(iter(values.values())).device
    # One transfer, for which a GPU is waited for once.
    return dict(zip(values, torch.stack([value.float().to(device) for value in values.values()]).tolist()))


class _Calls:
    """What the raw operators return while a layer runs."""

    def __init__(self):
        self.seen: dict[tuple[str, str], list[Tensor]] = {}  # by layer and tag; (B, H) each
        self._running = threading.local()  # with layers, the innermost last: other threads may run other models

    def enter(self, name: str) -> None:
        self._running.__dict__.setdefault("layers", []).append(name)

    def leave(self) -> None:
        self._running.layers.pop()

    def observe(self, results: dict[str, Tensor]) -> None:
        layers = self._running.__dict__.get("layers")
        if not layers or in_functorch():
            return
        for result in _TAGS.keys() & results:
            statistic = results[result].detach()
            statistic = statistic.to_local() if hasattr(statistic, "to_local") else statistic
            self.seen.setdefault((layers[-1], _TAGS[result]), []).append(statistic)
