"""What is measured of a published model beside `transformers`, and the page that says it: `make parity`.

Letters: B batch, T time, V vocabulary, L MoE layers, E experts, K choices of a token.
"""

import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import conftest  # noqa: F401  its environment of JAX, for the command too
import jax
import jax.numpy as jnp
import numpy as np
import routers
import torch
import transformers as hf
from flax import nnx
from published import CASES, B, E, T, V, gradients_in_place, randomized, save, tokens

from frugalmoe import sharding
from frugalmoe.convert import from_hf, to_hf
from frugalmoe.files import write_atomically
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import structure
from frugalmoe.train.weights import Weights

torch.set_num_threads(1)  # for models as small as these more threads are slower
PAGE = Path(__file__).parents[1] / "docs/parity.md"


class Row(NamedTuple):
    """Errors are the largest difference over the largest number of theirs; of gradients, that of the worst array."""

    case: str  # a name of `published.CASES`
    logits: float
    kl: float  # nats per token
    gradients: float
    tokens: int  # of all MoE layers, 0 in a dense model
    misrouted: int  # of them, those whose experts are not theirs
    weights: float  # of the chosen experts
    exported: float  # largest difference of a weight after import and export
    again: float  # error of the logits that `transformers` computes from what was exported


# Of what depends on the machine.
BOUNDS = {"logits": 1e-5, "kl": 1e-8, "gradients": 1e-5, "weights": 1e-5, "again": 1e-6}


def faults(row: Row) -> list[str]:
    """What keeps a model from being the same: nothing, if the row passes."""
    found = [f"{name} {getattr(row, name):.1e}" for name, bound in BOUNDS.items() if not getattr(row, name) < bound]
    found += [f"{row.misrouted} tokens of {row.tokens} misrouted"] if row.misrouted else []
    return found + ([f"exported {row.exported:.1e}"] if row.exported else [])


def measure(case: str, place: Path) -> Row:
    """A row: a model of `transformers` is saved in `place`, imported, compared, exported and loaded there again."""
    theirs = randomized(case)
    found, weights = opened(save(theirs, place / "theirs"), place / "run")
    logits, loss, g_LBTE, gradients = _theirs(theirs, place)
    ours, our_loss, our_g_LBTE, our_gradients = _ours(found, weights)
    assert abs(float(our_loss) - loss) < 1e-5 * loss and (our_g_LBTE is None) == (g_LBTE is None)
    errors = jax.tree.leaves(jax.tree.map(relative_error, our_gradients, gradients))
    count = wrong = worst = 0
    if g_LBTE is not None:
        count, wrong = g_LBTE[..., 0].size, int(((our_g_LBTE != 0) != (g_LBTE != 0)).any(-1).sum())
        worst = relative_error(our_g_LBTE, g_LBTE)
    back = _exported(theirs, logits, found, weights, place)
    return Row(case, relative_error(ours, logits), kl(logits, ours), max(errors), count, wrong, worst, *back)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def kl(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Mean over tokens of KL(theirs, ours), nats, in float64."""
    log = lambda logits: logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    p, q = log(theirs.astype(np.float64)), log(np.asarray(ours, np.float64))
    return abs(float((np.exp(p) * (p - q)).sum(-1).mean()))


def opened(directory: Path, run: Path) -> tuple[from_hf.Found, Weights]:
    found = from_hf.look(directory, run, tokenizer="bytes")
    assert not found.faults
    return found, Weights(*from_hf.read_arrays(found))


def _theirs(model: hf.PreTrainedModel, place: Path) -> tuple[np.ndarray, float, np.ndarray | None, dict]:
    """Logits [B, T, V], loss, combine matrices [L, B, T, E], and gradients as our arrays; all of transformers."""
    ids, chosen = torch.from_numpy(tokens()).long(), {}
    of_experts = {int(name.split(".")[2]): part for name, part in model.named_modules() if name.endswith(".experts")}
    hooks = [
        module.register_forward_hook(lambda _, args, out, layer=layer: chosen.update({layer: args}))
        for layer, module in of_experts.items()
    ]
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
    loss.backward()
    with gradients_in_place(model):
        _, gradients = opened(save(model, place / "gradients"), place / "run")
    g_LBTE = np.zeros((len(chosen), B * T, E), np.float32)
    for row, layer in enumerate(sorted(chosen)):
        if len(chosen[layer]) == 1:  # Llama 4: inputs of each expert in turn, zeros but of the tokens that chose it
            g_LBTE[row] = (chosen[layer][0] != 0).any(-1).reshape(E, B * T).T
            continue
        expert_NK, weight_NK = (array.detach().numpy() for array in chosen[layer][1:3])
        np.put_along_axis(g_LBTE[row], expert_NK, weight_NK, axis=1)
    return logits.detach().numpy(), loss.item(), g_LBTE.reshape(-1, B, T, E) if chosen else None, gradients.params


def _ours(found: from_hf.Found, weights: Weights) -> tuple[np.ndarray, float, np.ndarray | None, dict]:
    """As `_theirs`, of one program."""
    graphdef, _, _ = structure(found.config.model)
    with jax.set_mesh(mesh := on_one_device()):
        inputs = context(mesh, trace=True)

        @jax.jit
        def run(weights: Weights):
            def loss(params):
                net = nnx.merge(graphdef, params, weights.router_state)
                out = net(inputs)
                logits_BTV = net.logits(out.hidden_BTD)
                logp = jax.nn.log_softmax(logits_BTV[:, :-1])
                nll_BT1 = -jnp.take_along_axis(logp, inputs.token_ids_BT[:, 1:, None], axis=-1)
                return nll_BT1.mean(), (logits_BTV, out.routed and out.routed.plan)

            return jax.value_and_grad(loss, has_aux=True)(weights.params)

        (loss, (logits_BTV, plan)), gradients = jax.device_get(run(weights))
    if plan is None:
        return logits_BTV, loss, None, gradients
    g_LBTE = np.zeros((*plan.ids.shape[:-1], E), np.float32)
    np.put_along_axis(g_LBTE, plan.ids, plan.weights, axis=-1)
    return logits_BTV, loss, g_LBTE, gradients


def context(mesh: jax.sharding.Mesh, trace: bool = False) -> Context:
    ids_BT = sharding.put(mesh, tokens(), "BT")
    positions_BT = sharding.put(mesh, np.tile(np.arange(T, dtype=np.int32), (B, 1)), "BT")
    keys_B = sharding.put(mesh, jax.random.split(jax.random.key(0), B), "B")
    return Context(ids_BT, jnp.ones_like(ids_BT), positions_BT, keys_B, jnp.int32(0), trace=trace)


def on_one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1})


def _exported(
    theirs: hf.PreTrainedModel, logits: np.ndarray, found: from_hf.Found, weights: Weights, place: Path
) -> tuple[float, float]:
    """(the largest difference of a tensor, the error of the logits): `transformers` loads what was exported."""
    made = to_hf.look(place / "run", found.config, found.family.name)
    to_hf.convert(place / "run", made, weights, place / "ours", largest=20_000)
    again = hf.AutoModelForCausalLM.from_pretrained(
        place / "ours", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    with torch.no_grad():
        back = again(input_ids=torch.from_numpy(tokens()).long(), use_cache=False).logits
    differences = [float((tensor.double() - after[name].double()).abs().max()) for name, tensor in before.items()]
    return max(differences), relative_error(back, logits)


# The page. Figures are rounded up to a power of ten, so that it is the same on other machines as far as may be.

HEAD = """\
# Parity with transformers

Written by `make parity`. In each run of the tests `tests/test_parity_transformers.py` measures every row anew; it fails
where a figure reaches its bound and where this page says something else. All is computed in float32 on a CPU, beside
transformers {transformers} with torch {torch}.

## Models

`transformers` makes a tiny model with random weights from the family's own config class and saves it. It is imported,
compared, exported, and loaded by `transformers` again.

| column | what it says | bound |
| --- | --- | --- |
| logits | largest difference of a logit over the largest logit | {logits} |
| KL | KL(theirs, ours) of the next token, nats per token | {kl} |
| gradients | of the cross-entropy: largest difference over the largest gradient, in the worst array | {gradients} |
| experts | tokens that get the same experts, of those of all MoE layers | all |
| weights | largest difference of a chosen expert's weight over the largest weight | {weights} |
| export | largest difference of a weight after import and export; the logits then differ by less than {again} | 0 |

Figures are rounded up to a power of ten. torchtitan publishes such a table (`MODEL_COMPATIBILITY.md` at b5bcd76, read
in August 2026: one layer, 8 experts; KL below 1e-6 passes, from 1e-3 fails): 2.6e-7 to 5.3e-7 for Qwen3, OLMoE and
DeepSeek-V2-Lite, 4.6e-5 to 3.7e-4 for Mixtral, GLM-4.7, GLM-5 and DeepSeek-V3, and 4.2e-3 for Gemma 4, a failure.

"""
COLUMNS = ("family", "setting", "logits", "KL", "gradients", "experts", "weights", "export", "verdict")


def names(case: str) -> tuple[str, str]:
    """Family and setting."""
    family, _, setting = case.partition(" ")
    return family, setting or "plain"


def line(row: Row) -> str:
    """A row of the page."""
    family, setting = names(row.case)
    dense = not row.tokens
    cells = [f"`{family}`", setting, *(_rounded(error) for error in (row.logits, row.kl, row.gradients))]
    cells += [
        "dense" if dense else f"{row.tokens - row.misrouted} of {row.tokens}",
        "" if dense else _rounded(row.weights),
    ]
    return _line(*cells, _short(row.exported) if row.exported else "0", "; ".join(faults(row)) or "pass")


def _rounded(error: float) -> str:
    if not error or not math.isfinite(error):
        return f"{error:.0f}"
    return _short(10.0 ** math.ceil(math.log10(error)))


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head() -> str:
    return HEAD.format(
        transformers=hf.__version__, torch=torch.__version__.split("+")[0], **{k: _short(v) for k, v in BOUNDS.items()}
    )


def page(rows: Iterable[Row]) -> str:
    lines = [_line(*COLUMNS), _line(*("---" for _ in COLUMNS)), *map(line, rows)]
    return head() + "\n".join(lines) + "\n\n" + page_of_routers()


ROUTERS = """\
## Routers

Every learned router in the source of transformers {transformers}: {families} families, of which {ours} are ours. In
each run of the tests `tests/test_router_oracles.py` gives `transformers`' own module and our strategy the same logits,
also such of +-100 and such with ties, with a bias where they have one: experts and weights are the same. torch keeps no
order among ties: which one of equal scores its `topk` takes depends on the number of experts, and here the lower id is
taken, so that with ties both have to choose K largest, with equal weights. Experts: their number, and of a token, in
the config class by default. Options of ours stand with their value, or with the key of config.json that has it.

"""


def page_of_routers() -> str:
    rows = routers.rows()
    missing = {row[0] for row in rows if row[-1].startswith("no: ")}
    families = {row[0].split()[0]: [] for row in rows}
    ours = [family for family in families if any(row[0].split()[0] == family and row[0] not in missing for row in rows)]
    text = ROUTERS.format(transformers=hf.__version__, families=len(families), ours=len(ours))
    lines = [_line(*routers.COLUMNS), _line(*("---" for _ in routers.COLUMNS)), *(_line(*row) for row in rows)]
    return text + "\n".join(lines) + "\n"


def rows_of_models() -> list[str]:
    """The rows that the page has now, in its order."""
    part = PAGE.read_text(encoding="utf-8").split("\n## Models\n")[1].split("\n## ")[0]
    return [row for row in part.splitlines() if row.startswith("| `")]


def main() -> int:
    """Writes the page; 1 if a row does not pass."""
    hf.utils.logging.disable_progress_bar()
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as place:
            rows.append(measure(case, Path(place)))
        print(line(rows[-1]), file=sys.stderr)
    write_atomically(PAGE, page(rows).encode())
    return 1 if any(map(faults, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
