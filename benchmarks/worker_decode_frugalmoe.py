"""A worker that decodes a published model with frugalmoe: arguments SIZE_JSON DTYPE:EXECUTOR:MODEL_DIR."""

import dataclasses
from pathlib import Path

import flax
import jax
import numpy as np
import sizes
from serve import Action, serve

from frugalmoe import sharding
from frugalmoe.convert import from_hf
from frugalmoe.evaluate import scoring
from frugalmoe.evaluate.scoring import Asked
from frugalmoe.generate import Decoding, Sampling
from frugalmoe.generate.sampling import Chooser
from frugalmoe.train.weights import Weights


def main() -> None:
    size, name = sizes.from_arguments()
    dtype, executor, directory = name.split(":", 2)
    found = from_hf.look(Path(directory), Path(directory) / "run", tokenizer="bytes")
    moe = dataclasses.replace(found.config.model.moe, executor=executor)
    config = dataclasses.replace(found.config.model, compute_dtype=dtype, moe=moe)
    train = dataclasses.replace(found.config.train, batch_size=size.sequences)
    data = dataclasses.replace(found.config.data, sequence_length=size.time)
    whole = dataclasses.replace(found.config, model=config, train=train, data=data)
    rng, mesh = np.random.default_rng(0), sharding.make_mesh(dict.fromkeys(sharding.AXES, 1))
    rows, live = size.sequences, np.ones(size.sequences, bool)
    with jax.set_mesh(mesh):
        weights = Weights(*jax.tree.map(jax.device_put, from_hf.read_arrays(found)))
        choose = Chooser(Sampling(temperature=0.0), np.arange(config.vocab_size) < size.vocabulary)
        numbers = np.arange(rows), np.full(rows, size.time)

        def prompts() -> list[np.ndarray]:
            return list(rng.integers(0, size.vocabulary, (rows, size.time)).astype(np.int32))

        def prefill(tokens: list[np.ndarray]):
            decoding = Decoding(config, weights, size.time + sizes.NEW + 1, rows)
            token = choose(decoding.feed(tokens), *numbers)
            return jax.block_until_ready(token), decoding

        def decode(state) -> dict[str, float]:
            token, decoding = state
            for _ in range(sizes.NEW):
                token = choose(decoding.advance(token, live), *numbers)
                token.tolist()  # a caller looks at each
            return {}

        def texts() -> list[Asked]:
            return [Asked(ids, 1) for ids in rng.integers(0, size.vocabulary, (rows, size.time + 1)).astype(np.int32)]

        def score(asked: list[Asked]) -> dict[str, float]:
            return {"nats": -sum(one.log_probability for one in scoring.score(whole, weights, mesh, asked))}

        about = {
            "parameters": sum(a.size for a in jax.tree.leaves(weights.params)),
            "versions": {"jax": jax.__version__, "flax": flax.__version__},
        }
        prefilled = lambda tokens: {"token": float(prefill(tokens)[0][0])}
        decoding = Action(lambda: prefill(prompts()), decode)
        serve(about, {"prefill": Action(prompts, prefilled), "decode": decoding, "score": Action(texts, score)})


if __name__ == "__main__":
    main()
