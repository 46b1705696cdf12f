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
# # Compare routers
#
# A study trains arms that differ in declared fields only, over paired seeds. `frugalmoe ablate experiments/NAME.py`
# runs one; what it found is published in `experiments/NAME`, with the data, and read here. The environment variable
# `FRUGALMOE_STUDY` names another study's directory.

# %%
# %matplotlib inline
import os

import numpy as np

from frugalmoe.ablate import load_comparison, plots

study = load_comparison(os.environ.get("FRUGALMOE_STUDY", "../experiments/balance"))
print(study.study["question"], study.study["expectation"], sep="\n\n")

# %% [markdown]
# ## What was found
#
# Differences are paired: the spread between seeds cancels, because seed s has the same start and the same batches in
# each arm. A verdict of better or worse holds at 5% over all arms together (paired t tests, Holm's correction); the
# interval is the one that decides, and the seeds are those with which a difference like this would be found.

# %%
{arm: study.verdict(arm) for arm in study.arms}

# %%
plots.differences(study)

# %% [markdown]
# ## How much the pairing buys
#
# The standard deviation over seeds of a loss, and of a paired difference. With n seeds an unpaired comparison needs
# about twice the square of their ratio as many runs for the same interval.

# %%
base = study.final(study.metric, study.arms[0])
paired = {arm: [v - base[s] for s, v in study.final(study.metric, arm).items()] for arm in study.arms[1:]}
{
    "of a loss": round(float(np.std(list(base.values()), ddof=1)), 4),
    "of a paired difference": {arm: round(float(np.std(d, ddof=1)), 4) for arm, d in paired.items()},
}

# %% [markdown]
# ## In the course of training
#
# An arm may lead early and not at the end. The second picture is the paired difference; bands are the range over seeds.

# %%
plots.learning_curves(study)

# %%
plots.balance(study)

# %% [markdown]
# ## What it costs
#
# How much of the baseline's training an arm needs to reach the baseline's final loss, in steps and in active FLOPs;
# `nan` where it never gets there.

# %%
for arm in study.arms[1:]:
    share = study.cost_to_target(arm)
    print(arm, {what: np.round(values, 2).tolist() for what, values in share.items()})

# %% [markdown]
# ## Anything else
#
# All results are one table: arm, seed, metric, step, final, value. Any tool reads it.

# %%
study.table.filter(study.table["final"]).group_by(["arm", "metric"]).aggregate([("value", "mean")]).to_pylist()[:3]

# %% [markdown]
# ## What next
#
# `frugalmoe report STUDY` writes this as a page. Your own router joins a study in `04_write_your_own_router`.
