"""Memory and time of tracing a published model from its files: `python benchmarks/streamed_trace.py [--layers=27]`.

Writes a model of the shapes of Moonlight-16B-A3B (2502.16982; DeepSeek-V3's layout, bfloat16) as a sparse file: norms,
embedding and routers are random, other weights are zeros that take no room on the disk. Then it runs the two commands
of the README, in processes of their own, and prints what each took. With all 27 layers it reads 32 GB twice, once to
hash them.

2026-11-30, two cores shared with other programs, 15.96 B parameters, 2,048 tokens: to link the model 0.27 GB, 35 s of
CPU time; to trace it 6.36 GB, 273 s of CPU time.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from frugalmoe.config import default, override, resolve
from frugalmoe.convert import families, plan, settings

CONFIG = {
    "model_type": "deepseek_v3",
    "vocab_size": 163_840,
    "hidden_size": 2048,
    "intermediate_size": 11_264,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "max_position_embeddings": 8192,
    "rope_theta": 50_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
PIECE = 2**20  # numbers that are in memory at one time: a process begins with the memory of the one that starts it
RANDOM = ("mlp.gate.weight", "embed_tokens", "norm")


def write_model(directory: Path, layers: int) -> int:
    """Writes config.json and a sparse model.safetensors; returns how many parameters there are."""
    config, family = CONFIG | {"num_hidden_layers": layers}, families.get("deepseek_v3")
    fields = settings.to_ours(family, config, "CONFIG") | {"model.vocab_size": config["vocab_size"]}
    tensors = plan.make(family, resolve(override(default(), fields)).model).tensors
    header, end = {}, 0
    for tensor in tensors:
        begin, end = end, end + 2 * math.prod(tensor.shape)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        numbers = file.tell()
        file.truncate(numbers + end)
        for name, info in header.items():
            if any(part in name for part in RANDOM):
                file.seek(numbers + info["data_offsets"][0])
                for left in range(math.prod(info["shape"]), 0, -PIECE):
                    file.write(rng.normal(size=min(left, PIECE)).astype(ml_dtypes.bfloat16).tobytes())
    return end // 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "text").mkdir()
        for i in range(40):
            (place / "text" / f"{i}.txt").write_text(
                f"The {i}th queen holds the river and the moon calls a sword.\n" * 9
            )
        print(f"{write_model(place / 'model', args.layers) / 1e9:.2f} B parameters")
        fields = {"data.path": place / "text", "data.cache_dir": place / "cache", "model.compute_dtype": "bfloat16"}
        for line in (
            ["convert", "from-hf", place / "model", place / "run", "--link", "--tokenizer=bytes"]
            + [f"--config.{name}={value}" for name, value in fields.items()],
            ["trace", place / "run", f"--tokens={args.tokens}"],
        ):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([sys.executable, "-m", "frugalmoe", *map(str, line)], check=True)
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
            wall = time.perf_counter() - start
            print(f"{line[0]}: {used.ru_maxrss / 1e6:.2f} GB at most, {cpu:.0f} s of CPU time, {wall:.0f} s")


if __name__ == "__main__":
    main()
