"""DTensor: the raw operators run on shards of the batch or of the heads; other placements are redistributed first.

The cheapest redistribution is DTensor's to find: a sharded sequence becomes sharded heads where their number allows.
torch.distributed.tensor takes longer to import than all of this package, so the rules wait until somebody imports it.
"""

import sys
from dataclasses import replace

_waiting: list = []


def shard(*ops) -> None:
    """Gives these raw operators their sharding rules, as soon as there can be DTensors."""
    _waiting.extend(ops)


def register_waiting() -> None:
    """Called before every operator call, so cheap."""
    if _waiting and "torch.distributed.tensor" in sys.modules:
        _register(_waiting)
        _waiting.clear()


def _register(ops) -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    infos = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for op in ops:
        register_sharding(op)(_rule(op))
        # The cache of placements would else ignore which tensors are None and which gradients are wanted.
        infos[op] = replace(infos[op], static_argnum=0)


def _rule(op):
    from torch.distributed.tensor import Replicate, Shard

    names = [argument.name for argument in op._schema.arguments]

    def rule(*args):
        given = dict(zip(names, args))
        exists = [True] * len(op._schema.returns)
        if "output_mask" in given:
            possible = (True, given["k"] is not None, True, given["head_rho"] is not None)
            exists = [wanted and tensor for wanted, tensor in zip(given["output_mask"], possible)]

        def placed(rest, of_mask):
            inputs = [
                (of_mask if name.endswith("_padding_mask") else rest) if hasattr(arg, "placements") else None
                for name, arg in given.items()
            ]
            return [rest if e else Replicate() for e in exists], inputs

        return [
            placed(Replicate(), of_mask=Replicate()),
            placed(Shard(0), of_mask=Shard(0)),  # batch
            placed(Shard(1), of_mask=Replicate()),  # heads
        ]

    return rule
