"""How well a trained run does: on held-out text, on the suite that is ours, on tasks of lm-eval."""

from frugalmoe.evaluate.text import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
