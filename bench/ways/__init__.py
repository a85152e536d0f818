"""Ways to compute the two operators, and softmax on the same inputs: one file each, with

LABEL          its name in tables and plots
EXPONENT       how its time and memory grow with N on each operator's inputs: 1 or 2
SAME_FUNCTION  whether it computes what the operator computes, so that its error against float64 means something
HOLDS_SCORES   whether it holds the N x N scores of Pure in memory
prepare(op)    a function f(q, k, v), or an exception that says why there is none
"""

from . import compiled, eager, infsa, sdpa

WAYS = {"infsa": infsa, "eager": eager, "compile": compiled, "sdpa": sdpa}
