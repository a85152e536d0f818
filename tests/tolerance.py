"""The tolerance rule, under the name that the tests know it by: infsa_kernels/testing.py."""

from infsa_kernels.testing import *  # noqa: F403
