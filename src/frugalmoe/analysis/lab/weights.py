"""The experts and routers of a checkpoint as arrays, for `similarity`.

Letters: L MoE layers, N tokens, E experts, D model, F expert hidden; 2 = (gate, up).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from frugalmoe.errors import UserError
from frugalmoe.experts import ACTIVATIONS, Biases
from frugalmoe.model import pattern
from frugalmoe.train.weights import load_model


@dataclasses.dataclass(frozen=True)
class Experts:
    layers_L: np.ndarray  # index in the whole network
    router: str  # its name
    columns_LDE: np.ndarray | None  # as `router_columns`
    norm_LD: np.ndarray  # scale of the norm before the layer; ones where there is none
    gate_up_LED2F: np.ndarray
    down_LEFD: np.ndarray
    biases_L: Biases | None  # with a leading axis of layers, where experts have some
    activation: str

    @property
    def router_LDE(self) -> np.ndarray:
        """The direction of the layer's input that each expert's logit follows; `UserError` where there is none."""
        if self.columns_LDE is None:
            rule = "its logits are not the layer's input times a learned matrix, so experts have no columns to compare"
            raise UserError(f"router {self.router!r}: {rule}")
        return self.columns_LDE

    def neurons(self, l: int) -> np.ndarray:
        """All weights of each hidden unit of MoE layer l: gate, up and down [E, F, 3 D]."""
        gate_EFD, up_EFD = np.moveaxis(self.gate_up_LED2F[l], (2, 3, 1), (0, 2, 3))
        return np.concatenate([gate_EFD, up_EFD, self.down_LEFD[l]], axis=-1)

    def outputs(self, l: int, tokens: int = 512, seed: int = 0) -> np.ndarray:
        """What each expert of MoE layer l gives for the same random inputs [E, N, D], without combine weights.

        The inputs are Gaussian directions of the size that the layer's norm lets through: every direction counts the
        same, whether text uses it or not.
        """
        x_ND = np.random.default_rng(seed).standard_normal((tokens, self.norm_LD.shape[1]))
        x_ND *= self.norm_LD[l] / np.sqrt(np.mean(x_ND**2, axis=-1, keepdims=True))
        h_ENF2 = np.einsum("nd,edgf->genf", x_ND, self.gate_up_LED2F[l], optimize=True)
        if self.biases_L is not None:
            h_ENF2 += np.moveaxis(self.biases_L.gate_up_E2F[l], 1, 0)[:, :, None]
        hidden_ENF = np.asarray(ACTIVATIONS[self.activation].value(*h_ENF2.astype(np.float32)))
        y_END = np.einsum("enf,efd->end", hidden_ENF, self.down_LEFD[l])
        return y_END if self.biases_L is None else y_END + self.biases_L.down_ED[l][:, None]


def load_experts(run: str | Path, checkpoint: int | None = None) -> Experts:
    """Returns the experts of a run directory's checkpoint, the newest by default. Raises `UserError` for a run without
    MoE layers.
    """
    config, weights, _, _ = load_model(Path(run), checkpoint)
    if "moe_blocks" not in weights.params:
        raise UserError(f"{run}: a dense model, which has no experts")
    blocks, layers = weights.params["moe_blocks"], np.array(pattern.moe_layers(config.model))
    scale_LD = np.asarray(blocks["ffn_norm"]["scale"])
    moe, shared = blocks["moe"], weights.params.get("shared_router", {})
    router = {name: np.asarray(value) for name, value in moe.get("router", {}).items()}
    router |= {name: np.stack([value] * len(layers)) for name, value in shared.items()}
    biases = moe.get("gate_up_bias_E2F"), moe.get("down_bias_ED")
    return Experts(
        layers_L=layers,
        router=config.model.moe.router,
        columns_LDE=router_columns(router, config.model.moe.num_experts),
        norm_LD=scale_LD if config.model.norm_position == "before" else np.ones_like(scale_LD),
        gate_up_LED2F=np.asarray(moe["gate_up_ED2F"]),
        down_LEFD=np.asarray(moe["down_EFD"]),
        biases_L=Biases(*map(np.asarray, biases)) if all(a is not None for a in biases) else None,
        activation=config.model.moe.activation,
    )


def router_columns(params: Mapping[str, np.ndarray], num_experts: int) -> np.ndarray | None:
    """W [L, D, E] of logits x W from a router's parameters [L, ...], or None.

    Of a gate that has choices which are no experts (X of them in all) the experts' columns, which are the first.
    """
    kernel_LDX = params.get("kernel_DE", params.get("kernel_DX"))
    if kernel_LDX is None:
        return None
    scale_LD = params.get("scale_D", np.ones(kernel_LDX.shape[:2]))  # of the input's channels (Gemma 4)
    return scale_LD[..., None] * kernel_LDX[..., :num_experts]
