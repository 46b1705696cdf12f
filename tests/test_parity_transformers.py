"""Published models are what they are in `transformers`: logits, routing, gradients, and the way back.

GLM-4-MoE is Ling 2.0 after renaming; Granite-MoE-shared with unit multipliers is Ling 1 without NormHead.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from flax import nnx
from published import CASES, FIRST, B, E, T, V, gradients_in_place, randomized, save, tokens

from frugalmoe import sharding
from frugalmoe.convert import from_hf, to_hf
from frugalmoe.model.moe import Context
from frugalmoe.model.transformer import structure
from frugalmoe.train.weights import Weights

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def kl(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Mean over tokens of KL(theirs, ours), nats, in float64."""
    log = lambda logits: logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    p, q = log(theirs.astype(np.float64)), log(np.asarray(ours, np.float64))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def opened(directory, run) -> tuple[from_hf.Found, Weights]:
    found = from_hf.look(directory, run, tokenizer="bytes")
    assert not found.faults
    return found, Weights(*from_hf.read_arrays(found))


def context(mesh: jax.sharding.Mesh, trace: bool = False) -> Context:
    ids_BT = sharding.put(mesh, tokens(), "BT")
    positions_BT = sharding.put(mesh, np.tile(np.arange(T, dtype=np.int32), (B, 1)), "BT")
    keys_B = sharding.put(mesh, jax.random.split(jax.random.key(0), B), "B")
    return Context(ids_BT, jnp.ones_like(ids_BT), positions_BT, keys_B, jnp.int32(0), trace=trace)


def on_one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1})


def forward(found: from_hf.Found, weights: Weights):
    """Logits [B, T, V], and which expert got which token [L, B, T, E]; None without experts."""
    graphdef, _, _ = structure(found.config.model)
    with jax.set_mesh(mesh := on_one_device()):
        inputs = context(mesh, trace=True)

        def run(weights: Weights):
            net = nnx.merge(graphdef, *weights)
            out = net(inputs)
            return net.logits(out.hidden_BTD), out.routed and out.routed.selected_BTE

        return jax.device_get(jax.jit(run)(weights))


def their_choices(model: hf.PreTrainedModel) -> dict[int, np.ndarray]:
    """Layer -> which expert gets which token [B T, E], filled by the next forward pass."""
    chosen = {}

    def keep(module, args, out, layer: int) -> None:
        chosen[layer] = np.zeros((B * T, E), bool)
        np.put_along_axis(chosen[layer], args[1].detach().numpy(), True, axis=1)

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            layer = int(name.split(".")[2])
            module.register_forward_hook(lambda *args, layer=layer: keep(*args, layer))
    return chosen


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "mixtral" else pytest.mark.slow) for c in CASES])
def test_same_logits_and_routing_and_the_same_model_comes_back(case, tmp_path):
    theirs = randomized(case)
    found, weights = opened(save(theirs, tmp_path / "theirs"), tmp_path / "run")
    chosen = their_choices(theirs)
    expected = theirs(input_ids=torch.from_numpy(tokens()).long(), use_cache=False).logits.detach().numpy()
    logits_BTV, selected_LBTE = forward(found, weights)
    assert relative_error(logits_BTV, expected) < 1e-5
    assert abs(kl(expected, logits_BTV)) < 1e-8
    for row, layer in enumerate(sorted(chosen)):
        np.testing.assert_array_equal(selected_LBTE[row].reshape(B * T, E), chosen[layer])
    assert (selected_LBTE is None) == (not chosen)

    made = to_hf.look(tmp_path / "run", found.config, found.family.name)
    to_hf.convert(tmp_path / "run", made, weights, tmp_path / "ours", largest=20_000)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    same = again.state_dict()
    assert same.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, same[name]), name
    again.set_attn_implementation("eager")
    back = again(input_ids=torch.from_numpy(tokens()).long(), use_cache=False).logits.detach().numpy()
    assert relative_error(back, expected) < 1e-6  # so config.json says the same


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c == "mixtral" else pytest.mark.slow) for c in FIRST])
def test_same_gradients(case, tmp_path):
    theirs, ids = randomized(case), torch.from_numpy(tokens()).long()
    found, weights = opened(save(theirs, tmp_path / "theirs"), tmp_path / "run")
    theirs.zero_grad()
    logits = theirs(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1))
    loss.backward()
    with gradients_in_place(theirs):
        _, expected = opened(save(theirs, tmp_path / "gradients"), tmp_path / "run")
    graphdef, _, _ = structure(found.config.model)
    with jax.set_mesh(mesh := on_one_device()):
        inputs = context(mesh)

        @jax.jit
        @jax.value_and_grad
        def run(params):
            net = nnx.merge(graphdef, params, weights.router_state)
            logp = jax.nn.log_softmax(net.logits(net(inputs).hidden_BTD)[:, :-1])
            return -jnp.mean(jnp.take_along_axis(logp, inputs.token_ids_BT[:, 1:, None], axis=-1))

        our_loss, gradients = run(weights.params)
    assert abs(float(our_loss) - loss.item()) < 1e-5 * loss.item()
    errors = jax.tree.map(relative_error, gradients, expected.params)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors
