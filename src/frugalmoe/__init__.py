"""frugalmoe: train, ablate and cost mixture-of-experts language models on the hardware a team can afford."""

__version__ = "0.1.0"
