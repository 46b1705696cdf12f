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
# # First look at a run
#
# Any run directory will do, finished or not: `make run` makes `runs/quickstart`. The environment variable
# `FRUGALMOE_RUN` names another one. Everything here is a call of `frugalmoe.analysis`; each measure's docstring has
# its formula and what chance alone would give.

# %%
# %matplotlib inline
import os

from frugalmoe.analysis import evenness, load_run, plots, summary_table

run = load_run(os.environ.get("FRUGALMOE_RUN", "../runs/quickstart"))
summary_table(run)

# %% [markdown]
# ## Did it learn?
#
# Grey: the training batches. Dots: whole held-out documents, one colour per domain. Domains differ in how predictable
# they are, so compare a domain with itself over time, not with another.

# %%
plots.loss_curves(run)

# %% [markdown]
# A series is two arrays, for whatever you want to do with it; `tail` is the mean of the last tenth.

# %%
loss = run.series("loss/ce")
loss.steps[-1], loss.tail()

# %% [markdown]
# ## Are all experts used?
#
# One row per expert. White is the load that perfect balance would give, orange is more, purple is less. Early stripes
# are usual; a row that stays purple is a dying expert.

# %%
plots.expert_load(run.loads)

# %% [markdown]
# The busiest expert of one step is above the mean even if the router is perfectly uniform. The dashed line is that
# noise; a curve near it is balanced. Entropy tells how undecided the router is about a single token.

# %%
plots.balance(run)

# %% [markdown]
# In numbers, per MoE layer, over all logged steps: the load of how many experts is really used, and how unequal it is.

# %%
total_LE = run.loads.counts_SLE.sum(0)
{"effective experts": evenness.effective_experts(total_LE), "Gini": evenness.gini(total_LE)}

# %% [markdown]
# ## How fast was it?

# %%
plots.speed(run)

# %% [markdown]
# ## What next
#
# `frugalmoe report RUN` writes all this as one page. What the experts do is the subject of
# `03_expert_specialisation`.
