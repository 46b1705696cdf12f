"""How many runs of a study one process trains at once, under one `jax.vmap`.

On CPUs one. Three seeds on two cores, milliseconds per step of all three (median of interleaved rounds,
`benchmarks/seeds.py`): MEASURED

On an accelerator a small model leaves most of the chip idle, and one program of S runs costs little more than one run:
there as many as memory holds.
"""

import dataclasses

import jax

from frugalmoe.ablate.plan import Pair, Plan
from frugalmoe.config import Config
from frugalmoe.model.transformer import structure
from frugalmoe.train.step import without_knobs

SHARE_OF_MEMORY = 0.6  # the estimate is rough, and XLA needs room to work
LARGEST = 16  # beyond it a program gains little and takes long to compile


def groups(plan: Plan, at_once: int | None = None) -> list[list[Pair]]:
    """The plan's runs in groups that share a program: equal configs up to name, seed and loss coefficients."""
    by_program: dict[Config, list[Pair]] = {}
    for pair in plan.pairs:
        by_program.setdefault(without_knobs(plan.config(pair)), []).append(pair)
    found = []
    for config, pairs in by_program.items():
        size = at_once or fit(config)
        found += [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return sorted(found, key=lambda group: plan.pairs.index(group[0]))


def fit(config: Config) -> int:
    """How many runs of a config to train at once on this machine's first device."""
    if jax.default_backend() == "cpu":
        return 1
    free = jax.devices()[0].memory_stats()["bytes_limit"] * SHARE_OF_MEMORY
    return max(1, min(LARGEST, int(free // bytes_of_run(config))))


def bytes_of_run(config: Config) -> int:
    """An estimate from shapes: parameters, gradients and Adam's two moments, and what the backward pass keeps.

    Per token and layer about 16 rows of the model's width (residuals, norms, queries, keys, values) and, for each
    active expert, 6 of the expert's (gate, up, their product, and gradients); logits of `loss_chunk` tokens twice.
    """
    m, t = config.model, config.train
    vocab = m.vocab_size or int(config.data.tokenizer.partition(":")[2] or 320)
    settled = dataclasses.replace(m, vocab_size=vocab)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(structure(settled)[1]))
    tokens = t.batch_size // t.accumulate_steps * config.data.sequence_length
    active = (m.moe.num_experts_per_token + m.moe.num_shared_experts) * m.moe.expert_dim
    per_token = m.num_layers * (16 * m.dim + 6 * max(active, m.dense_dim))
    return 4 * (4 * parameters + tokens * per_token + 2 * t.loss_chunk * vocab)
