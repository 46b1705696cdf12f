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
# # What do the experts specialise in?
#
# The four analyses of OLMoE (Muennighoff et al., arXiv 2409.02060, section 5): router saturation, co-activation, domain
# and vocabulary specialisation, as the paper defines them. Each comes with what chance alone would give and an interval
# over documents. Then what correlations cannot say: does the loss depend on it?
#
# `write_trace` (on the command line `frugalmoe trace RUN`) routes the same held-out tokens through every checkpoint;
# what is traced already is skipped. Checkpoints are kept with `checkpoint.every_steps` and `checkpoint.keep_last`.

# %%
# %matplotlib inline
import os

from frugalmoe.analysis import (
    Demote,
    Mask,
    RandomChoice,
    coactivation,
    effects_table,
    gradients,
    information,
    intervene,
    load_experts,
    load_gradients,
    load_run,
    load_trace,
    plots,
    similarity,
    specialisation,
    try_swaps,
    vocabulary,
    write_trace,
)

path = os.environ.get("FRUGALMOE_RUN", "../runs/quickstart")
tokens = int(os.environ.get("FRUGALMOE_TOKENS", "65536"))
write_trace(path, tokens=tokens, progress=False)
run, trace = load_run(path), load_trace(path)
probe = trace.probe()  # the newest checkpoint
trace.steps_S, probe.token_ids_N.size, trace.domains

# %% [markdown]
# ## When does routing settle?
#
# Saturation: of a token's experts at the last checkpoint, how many it had before. Dashed is what routing that ignores
# the token would give at the same loads: a collapsed router looks saturated without it. Churn compares successive
# checkpoints.

# %%
plots.saturation(trace)

# %% [markdown]
# ## Domains
#
# The share of a domain's tokens that an expert gets, over chance, K / E.

# %%
units = specialisation.group_units(probe.selected_LNE, probe.domain_ids_N, probe.unit_ids_N)
found = specialisation.specialise(units, len(trace.domains))
plots.domain_heatmaps(found, probe.layers_L, trace.domains)

# %% [markdown]
# The layer of the most specialised pair, with intervals over documents. Documents differ within a domain, and where a
# domain has few of them the intervals are wide: tokens of one document are no independent evidence.

# %%
plots.domain_intervals(found, probe.layers_L, trace.domains)

# %% [markdown]
# Information between domain and expert per layer, in nats; what shuffled labels of whole documents give; and the
# p-value of that.

# %%
found.information_L, found.shuffled_L, found.p_L

# %% [markdown]
# ## Words
#
# Is it the domain, or just its words? The favourite expert of a token id gets this share of its occurrences. The three
# views are OLMoE's: the token that is read, the one that follows, the one that the model predicts.

# %%
plots.vocabulary_specialisation(probe)

# %% [markdown]
# How like a table of ids is each layer? The share of a token's experts that a table counted on half of the documents
# gets right on the other half, and what always guessing the busiest experts gets.

# %%
[vocabulary.predictability(s, probe.token_ids_N, probe.unit_ids_N) for s in probe.selected_LNE]

# %% [markdown]
# Classes of tokens (letters, digits, punctuation, ...) are a coarser view. Information in nats, first layer and last;
# `raw` is to be compared with `shuffled`, `corrected` with 0.

# %%
classes_V = vocabulary.token_classes(run.tokenizer.decode([i]) for i in range(run.tokenizer.size))
[information.label_information(s, classes_V[probe.token_ids_N], probe.unit_ids_N) for s in probe.selected_LNE[[0, -1]]]

# %% [markdown]
# And the place in the document: is there an expert of first tokens?

# %%
buckets_N = information.position_buckets(probe.positions_N)
[information.label_information(s, buckets_N, probe.unit_ids_N) for s in probe.selected_LNE[[0, -1]]]

# %% [markdown]
# ## Which experts work together?
#
# How often expert j gets a token of expert i, over what independent choices at the same loads would give.

# %%
plots.co_activation(probe)

# %% [markdown]
# Do layers follow each other? Information between the experts of successive layers, and how many different paths
# through all layers the tokens take: (all, those that cover 90% of the tokens, effective number).

# %%
coactivation.path_information(probe.selected_LNE), coactivation.paths(probe.selected_LNE)

# %% [markdown]
# ## Are the experts different at all?
#
# Means over pairs of experts of the last layer, each beside what unrelated experts would give: cosine of the router's
# columns, cosine of neurons after the best matching, linear CKA of outputs, and cosine of outputs on the same input.

# %%
experts = load_experts(path)
outputs_ENO = experts.outputs(-1)
{
    "router rows": (
        similarity.off_diagonal_mean(similarity.router_similarity(experts.router_LDE[-1])),
        similarity.cosine_floor(experts.router_LDE.shape[1]),
    ),
    "matched neurons": (
        similarity.off_diagonal_mean(similarity.weight_similarity(experts.neurons(-1))),
        similarity.matched_floor(*experts.neurons(-1).shape[1:]),
    ),
    "linear CKA": (
        similarity.off_diagonal_mean(similarity.linear_cka(outputs_ENO)),
        similarity.off_diagonal_mean(similarity.cka_floor(outputs_ENO)),
    ),
    "outputs (PES)": (similarity.off_diagonal_mean(similarity.pairwise_output_similarity(outputs_ENO)), 0.0),
}

# %% [markdown]
# ## Does the loss depend on it?
#
# Take the most specialised expert away: without a replacement; with its weight given to the token's other experts; with
# re-routing to the router's next best. Then send tokens to their second choice, and to random experts. If re-routing
# costs little, the expert is replaceable, whatever the heatmaps say.

# %%
layer, expert = int(probe.layers_L[found.top[0]]), found.top[2]
effects = intervene(
    path,
    Mask(layer, expert),
    Mask(layer, expert, "rest"),
    Mask(layer, expert, "next"),
    Demote(layer, "next"),
    RandomChoice(layer),
    RandomChoice(),
    tokens=tokens,
    progress=False,
)
plots.effects(effects)

# %%
effects_table(effects)

# %% [markdown]
# ## Was the choice a good one?
#
# With hindsight: what a token's loss would have been with one of its slots given to another expert of that layer. The
# gain of the best single swap, the same for each slot, and for a slot whose expert was drawn: a router that always
# takes the best has a ratio of 0, one that draws has 1. `better_K` is the share of the other experts that would have
# been better than the one it took, 1/2 by chance. Nats, with intervals over documents.

# %%
try_swaps(path, layer, tokens=tokens // 4, progress=False)

# %% [markdown]
# ## Who moves the router?
#
# Gradients of 16 training batches at the newest checkpoint. The language-model loss's share of the router's gradient
# per layer (1: no auxiliary loss acts), and the cosine between the two: below 0 they pull against each other.

# %%
moved = load_gradients(path, progress=False)
(
    gradients.language_share(moved.language_SL, moved.auxiliary_SL),
    gradients.agreement(moved.language_SL, moved.auxiliary_SL, moved.product_SL),
)

# %% [markdown]
# And which experts learn: an expert's share of the gradient's norm, beside its share of the tokens, in the last layer.
#
# Two more questions need a run that has the thing asked about: `train_causal_gap` says what a rule that looks ahead is
# worth to the loss, `load_drops` whom a capacity drops.

# %%
counts_E = moved.counts_SLE[:, -1].sum(0)
gradients.expert_share(moved.expert_SLE).value[-1], counts_E / counts_E.sum()
