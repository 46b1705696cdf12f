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
# # What can I train for 1,000 dollars?
#
# `bought` plans each config on each kind of device: the fewest devices that hold the model and spend the money within
# 30 days, and how many tokens they see, failures and all. Prices, peaks and bandwidths are those of the device
# catalogue, each with its source and date; `read_catalogue(FILE)` puts yours over them. How far the planner's hours are
# from those of published runs is in [docs/planner.md](../docs/planner.md).

# %%
# %matplotlib inline
import os

from frugalmoe.analysis import bought, load_planned, plots, read_catalogue, read_fit

money = float(os.environ.get("FRUGALMOE_MONEY", "1000"))
devices = ["h100", "a100", "h20", "mi300x", "rtx4090", "v5e"]
names = os.environ.get("FRUGALMOE_CONFIGS", "quickstart,small,moonlight,ling_2:mini,gpt_oss").split(",")
catalogue = read_catalogue()
{
    name: [
        catalogue.get(name).title,
        *(f"{cell.value:g} ({cell.date})" for cell in [catalogue.get(name).cells["price_per_hour"]]),
    ]
    for name in devices
}

# %% [markdown]
# ## How many tokens?
#
# A line for each kind of device, over the size of the model. Small models leave a device idle, so that there the
# cheapest one sees the most tokens; large ones want memory, and fewer, larger devices that wait less for each other.

# %%
fit = read_fit(os.environ.get("FRUGALMOE_FIT", "../experiments/isoflop/fit.json"))
rows = bought([load_planned(name) for name in names], devices, money, catalogue, fit)
plots.tokens_for_money(rows)

# %%
[
    (row.config, row.device, row.count, f"{row.hours:.0f} h", f"{row.tokens:.2e} tokens", f"{row.mfu:.0%} of the peak")
    for row in rows
]

# %% [markdown]
# ## To which loss?
#
# By a fit of one's own study, here the smallest one that there is: `experiments/isoflop.py`, four sizes on a laptop.
# Bars are its 90% bands. Its losses are those of its text under its tokenizer, of a thousand words.
#
# It is shown for what it is: all bands overlap, for the fit has seen nothing within a hundred thousand times of these
# runs, as the lines below say; it cannot choose between the models. Of a run 2.6 times as large as those that it was
# made from it foretold 3.1% too high a loss, outside of its band. With `frugalmoe report STUDY --fit` a study of your
# own, within ten times of what you will train, takes its place (`FRUGALMOE_FIT`).

# %%
plots.loss_for_money(rows)

# %%
{
    f"{row.config} on {row.device}": f"{row.loss.loss:.2f} ({row.loss.low:.2f} to {row.loss.high:.2f}); {row.distance}"
    for row in rows
}

# %% [markdown]
# ## On what, then?
#
# Of each config the device that sees the most tokens, and what a billion of them costs there.

# %%
most = {row.config: row for row in sorted(rows, key=lambda row: row.tokens)}
{name: (f"{row.count} {row.device}", f"{1e9 * money / row.tokens:,.2f} dollars") for name, row in most.items()}
