"""DTensor: the raw operators run on shards of the batch or of the heads; other placements are redistributed first.

Public operators see a sharded sequence before that and hand it to infsa_kernels.distributed, which leaves it where it is.
torch.distributed.tensor takes longer to import than all of this package, so the rules wait until somebody imports it.
"""

import sys

from torch import Tensor

from ..torch_private import sharding_depends_on_all_arguments

_waiting: list = []


def shard(op, shardings) -> None:
    """Gives a raw operator its sharding rule, as soon as there can be DTensors.

    Args:
        shardings: ([(dimensions of the arguments, of the results)], exists). A dimension is where the sharded letter lies
            in that tensor, -1 if nowhere: then an argument is replicated and a result is a partial sum; None stands for
            arguments that are no tensors, and for results that are the same on every shard. exists(args) tells which
            results have elements.
    """
    _waiting.append((op, *shardings))


def register_waiting() -> None:
    """Called before every operator call, so cheap."""
    if _waiting and "torch.distributed.tensor" in sys.modules:
        _register(_waiting)
        _waiting.clear()


def over_sequence(dim: int, *tensors) -> bool:
    """Whether one of these is a DTensor whose tokens, its dimension ``dim``, are sharded. Called before every operator call."""
    return any(
        type(t) is not Tensor and hasattr(t, "placements") and any(p.is_shard(dim) for p in t.placements)
        for t in tensors
    )


def _register(rules) -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for op, dimensions, exists in rules:
        register_sharding(op)(_rule(dimensions, exists))
        sharding_depends_on_all_arguments(op)


def _rule(dimensions, exists):
    from torch.distributed.tensor import Partial, Replicate, Shard

    def rule(*args):
        present = exists(args)
        given = [hasattr(arg, "placements") for arg in args]

        def placed(of_arguments, of_results):
            inputs = [
                (Shard(dim) if dim >= 0 else Replicate()) if is_tensor else None
                for dim, is_tensor in zip(of_arguments, given)
            ]
            outputs = [
                Replicate() if not there or dim is None else Shard(dim) if dim >= 0 else Partial()
                for dim, there in zip(of_results, present)
            ]
            return outputs, inputs

        replicated = (
            [Replicate()] * len(present),
            [Replicate() if is_tensor else None for is_tensor in given],
        )
        return [replicated, *(placed(*sharding) for sharding in dimensions)]

    return rule
