# hub/layout.py puts this behind infsa_kernels/__init__.py.
_ATTENTION = ("infsa_linear", "infsa_pure", "infsa_multi_hop")


def __getattr__(name: str):
    """What transformers asks of a kernel for attn_implementation="<kernel>:infsa_pure"; adapters are imported only then."""
    if name in _ATTENTION:
        from .nn.transformers import attention_function

        return attention_function(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def flash_attn_forward(*arguments, **by_name):
    """transformers takes only kernels that have a function of this name, and then the one that is named; it calls that alone."""
    raise NotImplementedError(
        f"this kernel has no softmax attention: set attn_implementation to <kernel>:{_ATTENTION[0]}"
    )
