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
# # How does a published model route?
#
# Give the directory of a published mixture of experts, as it was downloaded (config.json, safetensors, tokenizer): the
# environment variable `FRUGALMOE_PUBLISHED` names it. Its weights stay where they are, and a layer of them is in memory
# at one time, so that a model need not fit. `FRUGALMOE_TEXT` names the text to look at, by default the project's own
# corpus, whose four domains are labelled.
#
# As rendered here it is a small model of our own, published in that layout: `frugalmoe train --config=study
# --workdir=runs/study` and `frugalmoe convert to-hf runs/study published/study`, a Qwen3-MoE.

# %%
# %matplotlib inline
import os

import numpy as np

from frugalmoe.analysis import (
    coactivation,
    evenness,
    load_trace,
    open_published,
    plots,
    specialisation,
    write_trace,
)

published = os.environ.get("FRUGALMOE_PUBLISHED", "../published/study")
text = os.environ.get("FRUGALMOE_TEXT", "quickstart")
tokens = int(os.environ.get("FRUGALMOE_TOKENS", "65536"))
run = open_published(published, os.environ.get("FRUGALMOE_LINKED", f"{published}-linked"), path=text)
write_trace(run, tokens=tokens, progress=False)
trace = load_trace(run)
probe = trace.probe()
{"tokens": probe.token_ids_N.size, "experts": trace.num_experts, "layers": trace.layers_L.tolist()}

# %% [markdown]
# ## Does it know the text?
#
# Mean loss of a token in nats, by domain. A model is at home where it is low; one that has never seen a domain routes
# it as it can.

# %%
{d: float(np.nanmean(probe.loss_N[probe.domain_ids_N == i])) for i, d in enumerate(trace.domains)}

# %% [markdown]
# ## Are all experts used, and how sure is the router?
#
# Per layer: the load of how many experts is really used, how unequal it is, and the mean entropy of the router's
# probabilities in nats (`log` of the number of experts is a router that does not care; not every router has it).

# %%
counts_LE = probe.selected_LNE.sum(1)
{
    "effective experts": evenness.effective_experts(counts_LE),
    "Gini": evenness.gini(counts_LE),
    "entropy": trace.router.get("entropy", [None])[-1],
}

# %% [markdown]
# ## Do experts have domains?
#
# The share of a domain's tokens that an expert gets, over chance; then the most specialised pair, with intervals over
# documents.

# %%
units = specialisation.group_units(probe.selected_LNE, probe.domain_ids_N, probe.unit_ids_N)
found = specialisation.specialise(units, len(trace.domains))
plots.domain_heatmaps(found, probe.layers_L, trace.domains)

# %%
plots.domain_intervals(found, probe.layers_L, trace.domains)

# %% [markdown]
# ## Or just words?
#
# The favourite expert of a token id gets this share of its occurrences.

# %%
plots.vocabulary_specialisation(probe)

# %% [markdown]
# ## Which experts work together?
#
# How often expert j gets a token of expert i, over what independent choices at the same loads would give. Below: the
# different paths through all layers that the tokens take (all, those that cover 90% of the tokens, effective number).

# %%
plots.co_activation(probe)

# %%
coactivation.paths(probe.selected_LNE)
