"""Is a mixture of experts better upcycled from a trained dense model, or trained from scratch, at equal extra compute?

Command:   for s in 0 1 2; do
             frugalmoe train --config=study --config.model.num_dense_layers=4 --config.train.seed=10$s \
               --workdir=runs/upcycling_from/dense_$s
             for how in "" "redrawn=0.5" "noise=0.1"; do
               frugalmoe upcycle runs/upcycling_from/dense_$s runs/upcycling_from/parts${how%=*}_$s ${how:+--$how} \
                 --experts=16 --per-token=2 --granularity=2 --config.model.num_dense_layers=1
             done
           done
           frugalmoe ablate experiments/upcycling.py --jobs=2
Cost:      3 dense runs and 15 runs of 0.61 M tokens.
Found:     as expected of scratch: with as much extra compute as the dense model had, all that began with it are 0.31 to
           0.33 nats ahead, and need 0.3 of the extra steps to be where scratch ends. The experts have little of it: the
           dense model that goes on is 0.014 nats behind copies (paired, 95%: 0.010 to 0.018), in every seed. Redrawing
           half of each expert costs 0.008 nats against copies (0.000 to 0.016), noise nothing that shows: what is
           redrawn begins behind and has not caught up after 300 steps. Loads are even from the start.
"""

from frugalmoe.ablate import Study

FROM = "runs/upcycling_from"

STUDY = Study(
    question=(
        "Is a mixture of experts better upcycled from a trained dense model, or trained from scratch, at equal extra "
        "compute?"
    ),
    expectation=(
        "Sparse upcycling (2212.05055) is ahead of a model from scratch until the extra compute passes about 120% of "
        "the dense model's; OLMoE (2409.02060) sees scratch pass after 25% of it, Skywork-MoE (2406.06563) once the "
        "budget is twice the dense one. Here extra and dense compute are equal, and 0.6 M tokens are a small part of "
        "the text: upcycled models should be far ahead of scratch, and the question is whether they are ahead of the "
        "dense model that goes on. Drop-upcycling (2502.19261) gains over copies in the long run, and begins worse."
    ),
    base="configs/study.py",
    arms={
        "scratch": {},
        "dense_on": {"model.num_dense_layers": 4},  # the dense model itself, of equal active FLOPs
        "parts": {},  # 8 copies of the feed-forward, each as two experts
        "parts_redrawn": {},  # half of each expert's hidden units drawn anew
        "parts_noise": {},  # a tenth of the weights' deviation added
    },
    origins={
        "dense_on": f"{FROM}/dense_{{seed}}",
        "parts": f"{FROM}/parts_{{seed}}",
        "parts_redrawn": f"{FROM}/partsredrawn_{{seed}}",
        "parts_noise": f"{FROM}/partsnoise_{{seed}}",
    },
    baseline="scratch",
    varies=("model.num_dense_layers",),
    tolerance=0.05,  # the router's own product
)
