# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own router, and find out whether it is any good
#
# A routing strategy is a function and a statement of what it claims. Here one is written in a notebook, looked at,
# checked for causality, and compared with the usual gate over paired seeds. No file of the package is edited.
#
# The idea to try: **half hash**. A token's first expert is fixed by its id (as in hash layers, Roller et al., arXiv
# 2106.04426), the others are learned. Does a fixed half make the rest easier to learn?

# %%
# %matplotlib inline
import os

import jax
import jax.numpy as jnp

from frugalmoe.ablate import Study, load_comparison, plots, run_study
from frugalmoe.routing import gate, select
from frugalmoe.routing.contract import About, Inputs, Router, arrays, linear_init, linear_logits
from frugalmoe.routing.strategies import hash as hash_strategy
from frugalmoe.schema import MoE

# %% [markdown]
# ## The function
#
# `inputs` holds all that a router may look at: activations, token ids, segments, positions, a key for noise. It returns
# a plan (which experts, with which weights), losses and statistics; `gate.routing` makes all three from a choice.
# Letters: B batch, T time, E experts, K choices.


# %%
def route(params, state, inputs, config):
    logits_BTE = linear_logits(params, inputs)
    ticket_BTE = hash_strategy.tickets(inputs.token_ids_BT, inputs.layer, 0, config.num_experts)
    hashed_BTE = ticket_BTE == ticket_BTE.max(axis=-1, keepdims=True)
    choice = select.top_k(jnp.where(hashed_BTE, jnp.inf, logits_BTE), config.num_experts_per_token)
    weight_BTK = jax.nn.softmax(select.at(logits_BTE, choice.expert_BTK), axis=-1)
    return gate.routing(logits_BTE, jax.nn.softmax(logits_BTE), choice, weight_BTK, inputs, config)


half_hash = Router(
    name="half_hash",
    about=About(
        year=2026,
        paper="this notebook",
        score="softmax",
        selection="one expert by token id, the others by the largest logits",
        weights="softmax over the chosen",
        balance="auxiliary loss",
        weight_sum=1.0,
        losses=("load_balance", "z"),
    ),
    route=route,
    init=linear_init,
)

# %% [markdown]
# ## Look at what it does
#
# Eight random tokens, four experts, two per token. The first column must depend on the token id alone.

# %%
config = MoE(num_experts=4, num_experts_per_token=2)
key = jax.random.key(0)
x_BTD = jax.random.normal(key, (1, 8, 16))
ids_BT = jnp.array([[5, 3, 5, 9, 3, 5, 1, 9]])
ones_BT, positions_BT = jnp.ones_like(ids_BT), jnp.arange(8)[None]
inputs = Inputs(x_BTD, ids_BT, ones_BT, positions_BT, jax.random.split(key, 1), jnp.int32(0), jnp.int32(0), train=True)
params = arrays(half_hash.init(key, 16, config))
plan = route(params, {}, inputs, config).plan
dict(ids=ids_BT[0].tolist(), first=plan.expert_NK[:, 0].tolist(), second=plan.expert_NK[:, 1].tolist())

# %% [markdown]
# ## Can it see the future?
#
# A router for language models must not. Change the last token: nothing may change before it. (The package's laws check
# this, and the gradient, ties, padding and much else, for every file in `routing/strategies`; see the end.)

# %%
changed = inputs._replace(x_BTD=x_BTD.at[0, -1].add(100.0), token_ids_BT=ids_BT.at[0, -1].set(7))
after = route(params, {}, changed, config).plan
bool(jnp.array_equal(plan.expert_NK[:-1], after.expert_NK[:-1]))

# %% [markdown]
# ## Ablate it
#
# The router itself is the value of `model.moe.router`. Seed s means the same start and the same batches in each arm;
# what is done already is not trained again. The laptop mode trains a run in half a minute on one core. The
# environment variable `FRUGALMOE_TEXT` names a folder of your own text.

# %%
text = {"data.path": os.environ["FRUGALMOE_TEXT"]} if "FRUGALMOE_TEXT" in os.environ else {}
steps = int(os.environ.get("FRUGALMOE_STEPS", "100"))
workdir = os.environ.get("FRUGALMOE_WORKDIR", "../runs/half_hash")
study = Study(
    name="half_hash",
    question="Does a first expert that is fixed by the token id help the learned one?",
    expectation="Hash layers alone are behind a learned router (2401.06066: 1.932 against 1.881).",
    base="../configs/study.py:laptop",
    overrides={"train.steps": steps, "train.eval_every": steps // 4, **text},
    arms={"learned": {}, "half_hash": {"model.moe.router": half_hash}},
    baseline="learned",
    varies=("model.moe.router",),
)
run_study(study, workdir)

# %%
comparison = load_comparison(workdir)
{arm: comparison.verdict(arm) for arm in comparison.arms}

# %% [markdown]
# Dots: the mean paired difference; bars: the t interval that decides, corrected for the number of arms; ticks: single
# seeds. An interval that touches the line says that these runs cannot tell.

# %%
plots.differences(comparison)

# %%
plots.learning_curves(comparison)

# %% [markdown]
# ## Keep it
#
# Save the function with its `ROUTER = Router(...)` as `src/frugalmoe/routing/strategies/half_hash.py`, without a name
# (the file is its name). Configs and the command line find it, and the laws hold it to its claims:
#
#     frugalmoe laws half_hash
#
# How studies of a strategy are read is the subject of `02_compare_routers`.
