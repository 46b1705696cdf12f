"""A published model is traced from its files, a layer at a time: as one that was loaded, in less memory."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as hf
from published import COMMON, randomized, save
from runs import write_text

from frugalmoe.cli import main
from frugalmoe.convert import from_hf

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("streamed")
    write_text(root / "text")
    return root


def opened(place, theirs, run, *flags) -> None:
    fields = ["data.sequence_length=32", f"data.path={place / 'text'}", f"data.cache_dir={place / 'cache'}"]
    line = ["convert", "from-hf", str(theirs), str(run), "--tokenizer=bytes", *flags]
    assert main([*line, *(f"--config.{field}" for field in fields)]) == 0


def columns(run) -> dict[str, np.ndarray]:
    assert main(["trace", str(run), "--tokens=300"]) == 0
    with np.load(run / "trace" / "step_00000000.npz") as file:
        return dict(file)


OTHERS = (
    "mixtral window, tied",
    "gpt_oss",
    "phimoe",
    "llama4_text every other layer, no norm, no temperature",
)


# Dense layers first and state of routers; the embedding as head; two kinds of attention; a bias on logits; dense layers
# between those with experts.
@pytest.mark.parametrize("case", ["deepseek_v3", *(pytest.param(c, marks=pytest.mark.slow) for c in OTHERS)])
def test_a_trace_from_the_files_is_that_of_the_loaded_model(place, case, capsys):
    root = place / case.replace(" ", "_")
    theirs = save(randomized(case), root / "theirs")
    opened(place, theirs, root / "loaded")
    opened(place, theirs, root / "linked", "--link")
    assert "its weights stay in" in capsys.readouterr().out
    loaded, linked = columns(root / "loaded"), columns(root / "linked")
    assert loaded.keys() == linked.keys()
    for name, array in loaded.items():
        if array.dtype.kind == "f":
            np.testing.assert_allclose(linked[name], array, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(linked[name], array, err_msg=name)
    assert main(["report", str(root / "linked")]) == 0
    assert main(["generate", str(root / "linked"), "--prompt=a"]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_files_that_have_changed_since_are_refused(place, capsys):
    theirs = save(randomized("olmoe"), place / "changing" / "theirs")
    opened(place, theirs, place / "changing" / "run", "--link")
    capsys.readouterr()
    config = (theirs / "config.json").read_text()
    (theirs / "config.json").write_text(re.sub(r'"rms_norm_eps": [^,]*', '"rms_norm_eps": 0.5', config))
    assert main(["trace", str(place / "changing" / "run")]) == 2
    line = capsys.readouterr().err
    assert "has changed: model.norm_eps=0.5" in line and line.count("\n") == 1
    (theirs / "config.json").write_text(config)
    weights = theirs / "model.safetensors"
    whole, times = weights.read_bytes(), weights.stat()
    weights.write_bytes(whole[:-4] + b"\0\0\0\0")  # a number, in a file as large and as old as before
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(["trace", str(place / "changing" / "run")]) == 2
    line = capsys.readouterr().err
    assert "has changed: model.safetensors: its weights are others" in line and line.count("\n") == 1
    weights.write_bytes(whole)
    assert from_hf.linked(place / "changing" / "run").family.name == "olmoe", "written anew, and the same"
    shutil.rmtree(theirs)
    assert main(["trace", str(place / "changing" / "run")]) == 2
    assert "no such directory" in capsys.readouterr().err


MEASURED = """
import resource, sys
from frugalmoe.cli import main
from frugalmoe.analysis.lab import record

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

assert main(["trace", sys.argv[1], "--tokens=64"]) == 0  # a small model: what the program itself takes
before = peak()
assert main(["trace", sys.argv[2], "--tokens=64"]) == 0
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_layer(place):
    """A model of 16 layers, 25 MB each as bfloat16, takes less than three of them."""
    sizes = COMMON | dict(hidden_size=256, moe_intermediate_size=512, num_experts=32, mlp_only_layers=[], head_dim=16)
    runs = []
    for layers in (1, 16):
        config = hf.Qwen3MoeConfig(**sizes | {"num_hidden_layers": layers})
        theirs = save(hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), place / f"of_{layers}" / "hf")
        runs.append(place / f"of_{layers}" / "run")
        opened(place, theirs, runs[-1], "--link", "--config.model.compute_dtype=bfloat16")
    whole = sum(path.stat().st_size for path in (place / "of_16" / "hf").glob("*.safetensors"))
    done = subprocess.run([sys.executable, "-c", MEASURED, *map(str, runs)], capture_output=True, text=True, check=True)
    grown, layer = int(done.stdout.split()[-1]), whole / 16
    assert whole > 400e6
    assert grown < 3 * layer, f"{grown / 1e6:.0f} MB for a layer of {layer / 1e6:.0f} MB"
