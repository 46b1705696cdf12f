"""`settle`: the one place that decides what a config leaves to the tokenizer and to the devices."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from frugalmoe.config.checks import ROUNDED_TO, check_devices
from frugalmoe.errors import UserError
from frugalmoe.schema import Config, Mesh

VOCABULARY = "model.vocab_size"


def settle(config: Config, tokenizer_size: int | None, num_devices: int | None) -> Config:
    """Returns the config with the vocabulary and the mesh sizes that it runs with.

    A `model.vocab_size` of 0 becomes the tokenizer's number of tokens, rounded up to a multiple of `ROUNDED_TO`. The
    mesh axis that is -1 becomes the number of devices that the other axes leave. What follows from an argument that is
    None is not known yet and stays open. A settled config settles to itself.

    Raises `UserError` for a vocabulary that is smaller than the tokenizer's, and for a mesh that these devices do not
    fill, or an axis of it that does not divide what is spread over it.
    """
    if tokenizer_size is not None:
        size = config.model.vocab_size
        if size and size < tokenizer_size:
            raise UserError(
                f"{VOCABULARY}={size}: smaller than the {tokenizer_size} tokens of "
                f"data.tokenizer={config.data.tokenizer!r}; give at least that, or 0"
            )
        size = size or -(-tokenizer_size // ROUNDED_TO) * ROUNDED_TO
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))
    if num_devices is not None:
        config = dataclasses.replace(config, mesh=Mesh(**check_devices(config, num_devices)))
    return config


def left_open(config: Mapping[str, Any]) -> list[str]:
    """Returns the fields, dotted, that a config leaves to the tokenizer and to the devices."""
    axes = [f"mesh.{name}" for name, size in config["mesh"].items() if size == -1]
    return [VOCABULARY] * (not config["model"]["vocab_size"]) + axes


def open_again(config: Mapping[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """Returns the config with these fields, which `left_open` named before it was settled, open as they were."""
    model, mesh = dict(config["model"]), dict(config["mesh"])
    model |= {"vocab_size": 0} if VOCABULARY in fields else {}
    mesh |= {name: -1 for name in mesh if f"mesh.{name}" in fields}
    return {**config, "model": model, "mesh": mesh}
