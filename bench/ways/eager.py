"""The paper's equations in plain torch: infsa_kernels.reference in the dtype of the input."""

from infsa_kernels import reference

from ..cases import EPS, RHO

LABEL = "eager"
EXPONENT = {"linear": 1, "pure": 2}
HOLDS_SCORES = True
SAME_FUNCTION = True


def prepare(op: str):
    function = getattr(reference, op)
    return lambda q, k, v: function(q, k, v, RHO, EPS)
