"""What tests of launches share."""

import pytest


@pytest.fixture
def by_triton(monkeypatch):
    """The names of kernels whose launches went Triton's own way."""
    from triton.runtime.jit import JITFunction

    run, seen = JITFunction.run, []

    def counted(kernel, *args, **options):
        seen.append(kernel.fn.__name__)
        return run(kernel, *args, **options)

    monkeypatch.setattr(JITFunction, "run", counted)
    return seen
