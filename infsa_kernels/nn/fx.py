"""torch.fx, by which torchvision and timm extract features: modules of ours are leaves of its graphs, as torch's own are."""

from torch import nn
from torch.fx import Proxy


class Leaf(nn.Module):
    """A module whose call is one node of a graph, whoever traces; but not as the root."""

    def __call__(self, *args, **kwargs):
        tracer = next((a.tracer for a in (*args, *kwargs.values()) if isinstance(a, Proxy)), None)
        if tracer is None:
            return super().__call__(*args, **kwargs)

        def node(*args, **kwargs):
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        # Before the hooks: they run when the graph does.
        return tracer.call_module(self, node, args, kwargs)
