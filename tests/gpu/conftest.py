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


@pytest.fixture
def planned_gpu(monkeypatch):
    """An H100 on which nothing runs: to the package, that is where CPU tensors are. Calls have plans, and none from before."""
    from helpers.triton_target import starting

    from infsa_kernels.ops import backends, plans
    from infsa_kernels.triton import first_use

    monkeypatch.setattr(backends, "_why_not_triton", lambda *arguments: None)
    monkeypatch.setattr(plans, "PLANNED", ("cpu",))
    monkeypatch.setattr(first_use, "CHECKED", ())
    plans.forget()
    with starting("sm_90") as gpu:
        yield gpu
    plans.forget()
