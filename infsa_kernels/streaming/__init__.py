"""Models on pictures larger than memory: read in strips, their tokens in a file. Described in docs/streaming.md."""

from .plan import Plan, plan
from .predict import Prediction, predict_file

__all__ = ["Plan", "Prediction", "plan", "predict_file"]
