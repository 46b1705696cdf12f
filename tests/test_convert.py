"""`frugalmoe convert`: what is written, what comes back, and what is refused before anything is written."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers as hf
from published import CASES, randomized, save, tokens
from runs import write_text
from safetensors.torch import load_file, save_file

from frugalmoe.analysis import load_run
from frugalmoe.cli import main
from frugalmoe.config import default, override, resolve
from frugalmoe.convert import families, from_hf, output, settings, to_hf
from frugalmoe.convert import plan as plans
from frugalmoe.data.tokenizer import train_bpe
from frugalmoe.errors import UserError
from frugalmoe.train.checkpoint import on_disk
from frugalmoe.train.weights import load_model

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own
LLAMA4 = {"model_type": "llama4_text", "intermediate_size_mlp": 24}
QWEN3_MOE = {"model_type": "qwen3_moe", "moe_intermediate_size": 16, "router_jitter_noise": None}
NOT_OF_OLMO = dict.fromkeys(("rms_norm_eps", "num_local_experts", "num_experts_per_tok", "router_jitter_noise"))
STRETCHED = {"rope_type": "yarn", "factor": 4.0}
LATENT_KEYS = dict.fromkeys(
    ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "intermediate_size"), 8
) | {"moe_intermediate_size": 8, "n_routed_experts": 8}
WINDOWED = {"use_sliding_window": True, "sliding_window": 4}
HEADER, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`one`: float32 in one file. `many`: bfloat16 in several, with a tokenizer and settings of generation."""
    place = tmp_path_factory.mktemp("models")
    model = randomized("mixtral")
    save(model, place / "one")
    half = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(place / "one" / WEIGHTS).items()}
    many = place / "many"
    many.mkdir()
    names = sorted(half)
    files = {f"model-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, own in files.items():
        save_file({name: half[name] for name in own}, many / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    (many / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in (HEADER, "generation_config.json"):
        shutil.copy(place / "one" / file, many)
    train_bpe(["the moon and the river " * 5], 300).save_into(many)
    (many / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "model_max_length": 64}))
    return place


@pytest.fixture
def copy(models, tmp_path) -> Path:
    """A copy of `one` to spoil."""
    return Path(shutil.copytree(models / "one", tmp_path / "copy"))


def refused(capsys, *arguments: object) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert main(["convert", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


def opened(directory: Path, run: Path) -> None:
    assert main(["convert", "from-hf", str(directory), str(run), "--tokenizer=bytes"]) == 0


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def rewrite(directory: Path, change) -> None:
    """The tensors of a directory after `change`, which gets and edits a dict."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def test_a_directory_in_several_files_comes_back_as_it_was(models, tmp_path, capsys):
    """The same numbers in the same dtype, bit by bit, the same config and the files beside it, from several files."""
    assert main(["convert", "from-hf", str(models / "many"), str(tmp_path / "runs/new")]) == 0
    run = tmp_path / "runs/new"
    record = json.loads((run / "source.json").read_text())
    for name, row in record["files"].items():
        content = (models / "many" / name).read_bytes()
        assert row == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert {"config.json", "tokenizer.json", "model-00002-of-00003.safetensors"} <= record["files"].keys()
    assert set(record["dtypes"].values()) == {"BF16"} and record["family"] == "mixtral"
    config, weights, tokenizer, _ = load_model(run)
    assert tokenizer.size == 270 or tokenizer.size <= config.model.vocab_size
    assert {leaf.dtype for leaf in jax.tree.leaves(weights.params)} == {np.dtype(np.float32)}
    assert load_run(run).config["name"] == "mixtral"
    assert not list(run.glob("assembly")) and sorted(path.name for path in run.parent.iterdir()) == ["new"]

    assert main(["convert", "to-hf", str(run), str(tmp_path / "back")]) == 0
    assert "mixtral" in capsys.readouterr().out
    before = {k: v for path in (models / "many").glob("*.safetensors") for k, v in load_file(path).items()}
    after = load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16 and torch.equal(tensor, after[name]), name
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (models / "many" / file).read_bytes()
    theirs, ours = (json.loads((path / HEADER).read_text()) for path in (models / "many", tmp_path / "back"))
    assert theirs == ours


@pytest.mark.slow
def test_the_commands_of_the_readme(tmp_path, capsys, monkeypatch):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    block = text.split("## Open a published model\n")[1].split("```")[1]
    commands = [line.removeprefix("$ frugalmoe ").split("  #")[0] for line in block.splitlines() if line[:1] == "$"]
    directory = save(randomized("olmoe"), tmp_path / "models/OLMoE-1B-7B")
    train_bpe(["the moon and the river " * 5], 300).save_into(directory)
    write_text(tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRUGALMOE_CACHE", str(tmp_path / "cache"))
    for arguments in commands:
        assert main(shlex.split(arguments)) == 0, arguments
    assert {arguments.split()[0] for arguments in commands} == {"convert", "generate", "trace", "report"}
    assert "1 checkpoints traced" in capsys.readouterr().out
    assert (tmp_path / "runs/olmoe/report/index.html").is_file()
    assert {path.name for path in (tmp_path / "published/olmoe").iterdir()} == {
        path.name for path in directory.iterdir()
    }


def test_a_dry_run_shows_every_tensor_and_array_and_writes_nothing(models, tmp_path, capsys):
    assert main(["convert", "from-hf", str(models / "many"), str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in ("model.layers.*.block_sparse_moe.experts.*.w1.weight (24)", "[16, 32]", "BF16", "[3, 8, 32, 2, 16]"):
        assert part in said
    for path in plans.arrays(settings_of("mixtral").model):
        assert "/".join(path) in said
    assert not list(tmp_path.iterdir())
    opened(models / "one", tmp_path / "run")
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--dry-run"]) == 0
    assert "moe_blocks/moe/router/kernel_DE" in capsys.readouterr().out and not (tmp_path / "out").exists()


def settings_of(case: str):
    """Our config of a case, by its family."""
    family = families.get(case.split()[0])
    fields = settings.to_ours(family, json.loads(CASES[case]().to_json_string()), "config.json")
    return resolve(override(default(), fields))


def test_the_older_config_of_olmo_3_stretches_the_angles_of_layers_without_a_window():
    """As it was released: `rope_theta` and `rope_scaling` at the top."""
    said = json.loads(CASES["olmo3"]().to_json_string())
    parameters = said.pop("rope_parameters")["full_attention"]
    older = said | {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}
    fields = settings.to_ours(families.get("olmo3"), older, "config.json")
    assert resolve(override(default(), fields)) == settings_of("olmo3")


def test_llama_4_as_it_was_released_names_no_layers():
    """Which layers rotate, see a chunk and have experts follows from intervals."""
    for case in ("llama4_text", "llama4_text every other layer, no norm, no temperature"):
        said = json.loads(CASES[case]().to_json_string())
        released = said | {"no_rope_layers": [], "layer_types": None, "moe_layers": None, "for_llm_compressor": False}
        fields = settings.to_ours(families.get("llama4_text"), released, "config.json")
        assert resolve(override(default(), fields)) == settings_of(case)


def test_the_help_names_every_family(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"config.json: {', '.join(families.names())}." in said


def test_a_list_with_the_same_number_for_every_layer_is_that_number():
    said = json.loads(CASES["hunyuan_v1_moe"]().to_json_string())
    listed = said | {"moe_topk": [said["moe_topk"]] * 3, "num_experts": [said["num_experts"]] * 3}
    fields = settings.to_ours(families.get("hunyuan_v1_moe"), listed, "config.json")
    assert resolve(override(default(), fields)) == settings_of("hunyuan_v1_moe")


def test_no_family_is_both_here_and_missing():
    assert not families.MISSING.keys() & set(families.names())


@pytest.mark.parametrize("case", CASES)
def test_config_json_says_in_both_directions_what_a_model_is(case):
    config, family = settings_of(case), families.get(case.split()[0])
    said = settings.to_theirs(family, config.model)
    assert settings.differing(family, said, config.model, "config.json") == []
    other = CASES[case]().__class__(**said)
    before, after = CASES[case]().to_dict(), other.to_dict()
    named = {key for key in said if key in before} - {"architectures", "rope_parameters", "num_nextn_predict_layers"}
    if not config.model.num_dense_layers:
        named -= {"intermediate_size"} if config.model.moe.expert_dim != before["intermediate_size"] else set()
    window = {"sliding_window"} if "window" not in config.model.attention else set()
    unused = {"floor_scale", "attn_temperature_tuning"} if "nope" not in config.model.attention else set()
    for key in named - window - unused:
        assert before[key] is None or after[key] == before[key] or not (after[key] or before[key]), key


@pytest.mark.parametrize(
    "keys, part",
    [
        ({"model_type": "palm"}, "model_type='palm': no such family of models"),
        ({"model_type": "./evil.py"}, "model_type='./evil.py': no such family of models"),
        ({"model_type": None}, "model_type=None: no such family"),
        (
            {"model_type": "phimoe", "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
            "rope_type='longrope': is not implemented; valid: default",
        ),
        ({"model_type": "phimoe", "num_experts_per_tok": 3}, "num_experts_per_tok=3: is not implemented; valid: 2"),
        ({"model_type": "phimoe", "router_jitter_noise": 0.0}, "epsilon=0.0: must be"),
        ({"model_type": "olmo", "clip_qkv": -1.0, **NOT_OF_OLMO}, "clip_qkv=-1.0: must not be negative"),
        ({"model_type": "llama4"}, "model_type='llama4': our model lacks images; its text model by itself"),
        (LLAMA4 | {"moe_layers": [0, 2]}, "moe_layers=[0, 2]: is not implemented: layers with experts must be the"),
        (LLAMA4 | {"moe_layers": [3]}, "moe_layers=[3]: must be a list of layers, from 0 to 2"),
        (LLAMA4 | {"interleave_moe_layer_step": 0}, "interleave_moe_layer_step=0: must be positive"),
        (LLAMA4 | {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0: must be positive"),
        (LLAMA4 | {"no_rope_layers": [1, 1]}, "no_rope_layers=[1, 1]: must have an entry for each of the 3 layers"),
        (LLAMA4 | {"no_rope_layers": [1, 1, []]}, "no_rope_layers=[]: must be 1 for a layer that rotates"),
        (
            LLAMA4 | {"no_rope_layers": [1, 1, 0], "layer_types": ["chunked_attention"] * 3},
            "layer_types='chunked_attention': is not implemented of a layer with no_rope_layers=0",
        ),
        (LLAMA4 | {"layer_types": [{}, [], 1]}, "layer_types={}: is not implemented of a layer with no_rope_layers=1"),
        (LLAMA4 | {"attention_chunk_size": -1}, "model.attention_options.chunked.chunk=-1: must be positive"),
        (LLAMA4 | {"num_experts_per_tok": 2}, "num_experts_per_token=2: must be 1"),
        (LLAMA4 | {"use_qk_norm": 1}, "use_qk_norm=1: must be true or false"),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step=0: must be positive"),
        (QWEN3_MOE | {"mlp_only_layers": [1]}, "mlp_only_layers=[1]: is not implemented: layers with experts must"),
        (QWEN3_MOE | {"mlp_only_layers": [7]}, "mlp_only_layers=[7]: must be a list of layers, from 0 to 2"),
        (
            {"model_type": "hunyuan_v1_moe", "moe_topk": [1, 2, 2]},
            "moe_topk=[1, 2, 2]: is not implemented but as one number for all 3 layers",
        ),
        ({"model_type": "hunyuan_v1_moe", "num_experts": []}, "num_experts=[]: is not implemented but as one number"),
        (
            {"model_type": "hunyuan_v1_moe", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic': is not implemented but with alpha, which makes it static",
        ),
        (
            {"model_type": "hunyuan_v1_moe", "rope_parameters": {"rope_type": "dynamic", "alpha": "8"}},
            "alpha='8': must be a number",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "alpha": 8.0}},
            "rope_type='dynamic': is not implemented; valid: default, linear, yarn, llama3",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': is not implemented; valid: 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method=None: quantized weights are not read"),
        (
            {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
            "quantization_config.quant_method='mxfp4': quantized weights are not read; load the model with",
        ),
        ({"quantization_config": "mxfp4"}, "quantization_config='mxfp4': must be an object"),
        ({"model_type": "gpt_oss", "swiglu_limit": 5.0}, "swiglu_limit=5.0: is not implemented; valid: 7.0"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope': is not implemented"),
        ({"rope_parameters": {"rope_theta": 1e4, "short_factor": [1]}}, "short_factor=[1]: no meaning is known"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta='big': must be a number"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type=['yarn']: is not implemented"),
        ({"model_type": "qwen3", **WINDOWED, "layer_types": [{}, [], 1]}, "layer_types={}: is not"),
        ({"model_type": "qwen3", **WINDOWED, "layer_types": 3}, "layer_types=3: must name a kind for each of the 3"),
        ({"model_type": "qwen3", "use_sliding_window": "no"}, "use_sliding_window='no': must be true or false"),
        ({"rope_parameters": []}, "rope_parameters=[]: must be an object"),
        (
            {"model_type": "olmo3", "rope_parameters": {"sliding_attention": STRETCHED}},
            "sliding_attention: rope_type='yarn': is not implemented; valid: 'default'",
        ),
        (
            {"model_type": "olmo3", "rope_parameters": {"sliding_attention": {"rope_theta": 3.0}}},
            "sliding_attention: rope_theta=3.0: is not implemented; valid: 500000.0",
        ),
        ({"model_type": "olmo3", "rope_parameters": {"rope_theta": 1e4}}, "rope_theta=10000.0: no meaning is known"),
        (
            {"model_type": "granitemoe", "residual_multiplier": -1.0, "router_jitter_noise": None},
            "residual_multiplier=-1.0: must be positive",
        ),
        (
            {"model_type": "glm4_moe_lite", "mlp_layer_types": ["sparse", "dense", "sparse"], **LATENT_KEYS},
            "mlp_layer_types=['sparse', 'dense', 'sparse']: is not implemented but as dense for the first",
        ),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"hidden_size": 2**31 - 1}, "says a model of"),
        ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
        ({"num_attention_heads": 3}, "num_attention_heads=3: must be a multiple of"),
        ({"num_local_experts": 10**9}, "says a model of"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan: must be"),
        ({"vocab_size": 0}, "vocab_size=0: must be positive"),
        ({"vocab_size": 100}, "smaller than the 257 tokens"),
        ({"sliding_window": -3}, "window=-3: must be positive"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be at most"),
        ({"model_type": "qwen3", "num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be a whole number"),
    ],
)
def test_a_config_that_cannot_be_followed_is_one_line(copy, tmp_path, capsys, keys, part):
    edit(copy / HEADER, **keys)
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    line = refused(capsys, "from-hf", copy, tmp_path / "run", "--tokenizer=bytes")
    assert part in line and not (tmp_path / "run").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def no_json(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 5) + b"{{{{{" + b"\0" * 20)


def deep_json(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)


def overlap(path: Path) -> None:
    header = {n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in ("a", "b")}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)


def hidden(path: Path) -> None:
    header = {n: {"dtype": "F32", "shape": [1], "data_offsets": [at, at + 4]} for n, at in (("a", 0), ("b", 8))}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 12)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def negative(path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [-4, -1], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)


def twice(path: Path) -> None:
    text = (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)


def eight_bits(path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)


@pytest.mark.parametrize(
    "damage, part",
    [
        (cut, "cut off or damaged"),
        (lambda path: path.write_bytes(b""), "not a whole safetensors file"),
        (lambda path: path.write_bytes(b"abc"), "not a whole safetensors file"),
        (long_header, "its header would have 4,611,686,018,427,387,904 bytes"),
        (no_json, "its header is no JSON"),
        (deep_json, "not a safetensors file"),
        (overlap, "shares bytes with another"),
        (hidden, "4 bytes before tensor 'b' are of no tensor"),
        (longer, "the last 4 bytes are of no tensor"),
        (negative, "damaged; needs dtype, shape"),
        (twice, "a name stands in it twice"),
        (eight_bits, "dtype F8_E4M3 is not converted; valid: F32, BF16, F16"),
    ],
)
def test_a_damaged_file_is_one_line(copy, tmp_path, capsys, damage, part):
    damage(copy / WEIGHTS)
    assert part in refused(capsys, "from-hf", copy, tmp_path / "run", "--tokenizer=bytes")
    assert not (tmp_path / "run").exists()


def spoil_shape(tensors: dict) -> None:
    for name in tensors:
        if "experts" in name:
            tensors[name] = tensors[name][:-1].clone()


@pytest.mark.parametrize(
    "change, parts",
    [
        (spoil_shape, ["shape: ", "w1.weight [15, 32], not [16, 32]", " and 62 more"]),
        (lambda t: t.pop("model.norm.weight"), ["missing: model.norm.weight"]),
        (lambda t: t.update(extra=torch.zeros(2)), ["no place for: extra"]),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), ["'model.norm.weight'", "not finite"]),
    ],
)
def test_tensors_that_do_not_fit_are_listed(copy, tmp_path, capsys, change, parts):
    rewrite(copy, change)
    line = refused(capsys, "from-hf", copy, tmp_path / "run", "--tokenizer=bytes")
    assert all(part in line for part in parts) and [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_dry_run_shows_the_table_and_then_what_does_not_fit(copy, tmp_path, capsys):
    rewrite(copy, spoil_shape)
    assert main(["convert", "from-hf", str(copy), str(tmp_path / "run"), "--tokenizer=bytes", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "moe_blocks/moe/down_EFD" in said.out and "not [16, 32]" in said.err


def index(directory: Path, change) -> None:
    named = dict.fromkeys(load_file(directory / WEIGHTS), "a.safetensors")
    (directory / WEIGHTS).rename(directory / "a.safetensors")
    change(named)
    (directory / INDEX).write_text(json.dumps({"weight_map": named}))


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda named: named.update({"model.norm.weight": "b.safetensors"}), "names 1 files that are not there: b."),
        (lambda named: named.update({"model.norm.weight": "../a.safetensors"}), "'../a.safetensors': must be the name"),
        (lambda named: named.update({"model.norm.weight": "/etc/passwd"}), "'/etc/passwd': must be the name"),
        (lambda named: named.update({"model.norm.weight": "a.bin"}), "'a.bin': must be the name of a .safetensors"),
        (lambda named: named.update({"more": f"{'a' * 300}.safetensors"}), ".safetensors': must be the name of a"),
        (lambda named: named.update({"more": "a.safetensors"}), "'more' is not in a.safetensors"),
        (lambda named: named.update({"more": 3}), "damaged; needs weight_map"),
        (dict.clear, "damaged; needs weight_map"),
    ],
)
def test_an_index_that_leads_elsewhere_is_one_line(copy, tmp_path, capsys, change, part):
    index(copy, change)
    assert part in refused(capsys, "from-hf", copy, tmp_path / "run", "--tokenizer=bytes")
    assert not (tmp_path / "run").exists()


def test_a_pickle_is_refused_with_the_reason(copy, tmp_path, capsys):
    (copy / WEIGHTS).unlink()
    assert "holds no model.safetensors" in refused(capsys, "from-hf", copy, tmp_path / "run")
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    line = refused(capsys, "from-hf", copy, tmp_path / "run")
    assert "pytorch_model.bin" in line and "pickle, which can run any program" in line and not Path("ran").exists()


def test_what_is_no_file_is_not_waited_for(copy, tmp_path, capsys):
    (copy / HEADER).unlink()
    (copy / HEADER).mkdir()
    assert f"{copy / HEADER}: is no file" in refused(capsys, "from-hf", copy, tmp_path / "run")
    (copy / HEADER).rmdir()
    os.mkfifo(copy / HEADER)
    assert f"{copy / HEADER}: is no file" in refused(capsys, "from-hf", copy, tmp_path / "run")


def test_directories_and_flags_that_are_wrong_are_one_line(models, copy, tmp_path, capsys):
    run = tmp_path / "run"
    if os.path.ismount("/proc"):
        line = refused(capsys, "from-hf", copy, "/proc/none", "--tokenizer=bytes", "--link")
        assert "/proc/none: cannot be made there" in line
    assert "no such directory" in refused(capsys, "from-hf", tmp_path / "none", run)
    assert "with --tokenizer=bytes" in refused(capsys, "from-hf", copy, run)
    assert "--tokenizer=bpe:300" in refused(capsys, "from-hf", copy, run, "--tokenizer=bpe:300")
    assert "no such family" in refused(capsys, "from-hf", copy, run, "--tokenizer=bytes", "--family=palm")
    changed = refused(capsys, "from-hf", copy, run, "--tokenizer=bytes", "--config.model.norm_eps=0.1")
    assert "model.norm_eps=0.1 (1e-05 there)" in changed
    other = refused(capsys, "from-hf", copy, run, "--tokenizer=bytes", "--config.data.tokenizer=bpe:300")
    assert "data.tokenizer='bpe:300': the tokenizer goes along with the run" in other
    run.mkdir()
    (run / "mine.txt").write_text("mine")
    assert "exists; give a new directory" in refused(capsys, "from-hf", copy, run, "--tokenizer=bytes")
    assert [path.name for path in run.iterdir()] == ["mine.txt"]
    assert "not a run directory" in refused(capsys, "to-hf", run, tmp_path / "out")
    (copy / WEIGHTS).rename(copy / "a")
    shutil.copy(copy / "a", copy / WEIGHTS)
    (copy / INDEX).write_text("{}")
    assert "remove the one" in refused(capsys, "from-hf", copy, tmp_path / "new", "--tokenizer=bytes")


def test_a_full_disk_is_found_before_anything_is_written(copy, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    line = refused(capsys, "from-hf", copy, tmp_path / "a/run", "--tokenizer=bytes")
    assert "No space left on device" in line and [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_error_half_way_leaves_nothing(copy, tmp_path, monkeypatch):
    found = from_hf.look(copy, tmp_path / "a/run", tokenizer="bytes")

    def fail(*_):
        raise RuntimeError("half-way")

    monkeypatch.setattr(output, "write_run", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        from_hf.convert(found, tmp_path / "a/run")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_of_two_that_make_one_directory_the_second_is_told(tmp_path):
    """Nothing of the first is touched, and nothing of the second stays."""
    place = tmp_path / "place"
    with pytest.raises(UserError, match="was made by another process meanwhile"), output.appearing(place) as mine:
        (mine / "mine").touch()
        place.mkdir()
        (place / "theirs").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["place", "theirs"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_half_way_leaves_nothing(tmp_path, number):
    """Also where the watch of signals looks while a slow disk is being cleaned up."""
    code = (
        "import os, shutil, sys, time\nfrom pathlib import Path\nfrom frugalmoe.convert.output import appearing\n"
        "from frugalmoe.interrupts import at_once\n"
        "read, remove = os.read, shutil.rmtree\n"
        "os.read = lambda *given: (read(*given), time.sleep(0.3))[0]\n"
        "shutil.rmtree = lambda *given, **more: (time.sleep(0.9), remove(*given, **more))\n"
        "with at_once(False), appearing(Path(sys.argv[1]) / 'above/new') as place:\n"
        "    (place / 'half').write_text('x')\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode and not list(tmp_path.iterdir())


def test_a_second_head_is_taken_where_it_is_the_first_and_refused_where_it_is_not(tmp_path, capsys):
    """Tied models are also published with both matrices."""
    directory = save(randomized("llama tied"), tmp_path / "tied")
    rewrite(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    opened(directory, tmp_path / "run")
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    before, after = load_file(directory / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    rewrite(directory, lambda t: t["lm_head.weight"].add_(1))
    line = refused(capsys, "from-hf", directory, tmp_path / "other", "--tokenizer=bytes")
    assert "'lm_head.weight': differs from model.embed_tokens.weight" in line


def test_half_precision_comes_back_exactly_and_what_it_cannot_hold_is_refused(models, tmp_path):
    directory = Path(shutil.copytree(models / "one", tmp_path / "half"))
    rewrite(directory, lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    found = from_hf.look(directory, tmp_path / "run", tokenizer="bytes")
    from_hf.convert(found, tmp_path / "run")
    config, weights, _, _ = load_model(tmp_path / "run")
    made = to_hf.look(tmp_path / "run", config)
    to_hf.convert(tmp_path / "run", made, weights, tmp_path / "back")
    before, after = load_file(directory / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert all(after[name].dtype == torch.float16 and torch.equal(before[name], after[name]) for name in before)
    weights.params["final_norm"]["scale"] = weights.params["final_norm"]["scale"] * 1e6
    with pytest.raises(UserError, match=r"'model.norm.weight' as F16: holds numbers that are not finite"):
        to_hf.convert(tmp_path / "run", made, weights, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_run_of_our_own_is_published_with_its_tokenizer(models, tmp_path, capsys):
    """In float32, as the one family that is named, with the token that ends a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, given = tmp_path / "run", Path(shutil.copytree(models / "many", tmp_path / "given"))
    edit(given / "tokenizer_config.json", chat_template="{{ bos_token }}{{ messages[0].content }}", bos_token="a")
    assert main(["convert", "from-hf", str(given), str(run)]) == 0
    shutil.rmtree(run / "source")
    (run / "source.json").unlink()
    assert "several families" in refused(capsys, "to-hf", run, tmp_path / "out")
    assert main(["convert", "to-hf", str(run), str(tmp_path / "out"), "--family=mixtral"]) == 0
    text, (_, _, ours, _) = "the moon", load_model(run)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs(text)["input_ids"] == ours.encode(text).tolist() and theirs.eos_token_id == ours.eos
    messages = [{"role": "user", "content": text}]
    assert theirs.apply_chat_template(messages, tokenize=False) == ours.chat.render(messages).text == "athe moon"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32 and model.config.eos_token_id == ours.eos


def test_a_model_that_no_family_has_is_refused_naming_the_nearest():
    model = {"model.qk_norm": "head", "model.moe.options.scale": 3.0, "model.vocab_size": 64}
    with pytest.raises(UserError, match=r"no family of models computes what this one does; .* has no model"):
        to_hf.look(Path("none"), resolve(override(default(), model)))
    plain = resolve(override(default(), {"model.vocab_size": 64}))
    with pytest.raises(UserError, match="several families"):  # with softmax over the chosen, and nothing shared
        to_hf.look(Path("none"), plain)
    made = to_hf.look(Path("none"), plain, "mixtral")
    assert made.values["num_local_experts"] == 8 and {entry.dtype for entry in made.entries} == {"F32"}


def test_arrays_on_disk_are_not_copied_to_be_saved(tmp_path):
    import copy as copies

    np.arange(6, dtype=np.float32).tofile(tmp_path / "a")
    array = on_disk(tmp_path / "a", (2, 3))
    assert copies.deepcopy(array) is array and array.dtype == np.float32


def test_new_directories_may_be_empty_but_not_links_or_below_files(tmp_path):
    (tmp_path / "empty").mkdir()
    output.check_new(tmp_path / "empty", "RUN")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for name in ("file", "link", "file/below", "x" * 300):
        with pytest.raises(UserError, match="RUN="):
            output.check_new(tmp_path / name, "RUN")


LING = {  # names of GLM-4-MoE and of Granite-MoE-shared as Ling has them
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "embed_tokens": "word_embeddings",
    "gate.e_score_correction_bias": "gate.expert_bias",
    "block_sparse_moe.router.layer": "mlp.gate",
    "shared_head.norm": "final_layernorm",
}
OF_LING = dict(
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    moe_intermediate_size=16,
    num_experts=8,
    num_experts_per_tok=2,
    norm_topk_prob=True,
    use_bias=False,
    hidden_act="silu",
    max_position_embeddings=64,
    rope_scaling=None,
    auto_map={"AutoModelForCausalLM": "modeling.Model"},
)
LING_2 = OF_LING | dict(
    model_type="bailing_moe_v2",
    intermediate_size=24,
    first_k_dense_replace=1,
    num_shared_experts=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    use_qkv_bias=True,
    use_qk_norm=True,
    partial_rotary_factor=0.5,
    rope_theta=1e4,
    rms_norm_eps=1e-5,
    score_function="sigmoid",
    router_dtype="fp32",
)
LING_1 = OF_LING | dict(
    model_type="bailing_moe",
    num_shared_experts=2,
    use_qkv_bias=False,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    norm_head=False,
    use_sliding_window=False,
    sliding_window=4096,
)


def as_ling(tensors: dict) -> dict:
    """The tensors of a model under Ling's names, queries, keys and values in one."""
    found = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            found[name.replace("self_attn.q_proj", "attention.query_key_value")] = torch.cat(parts)
        elif "input_linear" in name or "output_linear" in name:
            found |= dict(separate(name, tensor))
        elif not any(part in name for part in ("k_proj", "v_proj", "shared_head.head")) and "3.embed" not in name:
            for old, new in LING.items():
                name = name.replace(old, new)
            found[name] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


def separate(name: str, tensor: torch.Tensor):
    """Granite's fused experts one by one."""
    prefix = name.split("block_sparse_moe")[0].split("shared_mlp")[0] + "mlp."
    of_experts = [(f"experts.{i}.", one) for i, one in enumerate(tensor)]
    for expert, one in of_experts if tensor.ndim == 3 else [("shared_experts.", tensor)]:
        parts = ("down_proj",) if "output" in name else ("gate_proj", "up_proj")
        for part, piece in zip(parts, one.chunk(len(parts))):
            yield f"{prefix}{expert}{part}.weight", piece


@pytest.mark.parametrize("case, said", [("glm4_moe", LING_2), ("granitemoeshared", LING_1)])
def test_ling_is_the_model_that_it_equals_under_other_names(case, said, tmp_path):
    """Its tensors become the same arrays and its config.json the same model, which is compared with `transformers`."""
    directory = save(randomized(case), tmp_path / "theirs")
    found = from_hf.look(directory, tmp_path / "run", tokenizer="bytes")
    ling = tmp_path / "ling"
    ling.mkdir()
    save_file(as_ling(load_file(directory / WEIGHTS)), ling / WEIGHTS)
    (ling / HEADER).write_text(json.dumps(said))
    same = from_hf.look(ling, tmp_path / "run", tokenizer="bytes")
    assert not same.faults and settings.unlike(same.config.model, found.config.model) == []
    jax.tree.map(np.testing.assert_array_equal, from_hf.read_arrays(same), from_hf.read_arrays(found))
    edit(ling / HEADER, norm_head=True)
    if case == "granitemoeshared":
        assert from_hf.look(ling, tmp_path / "run", tokenizer="bytes").config.model.norm_head


def test_modules_of_ling_are_among_its_layers(tmp_path):
    """Of 4 layers one is a module: `num_hidden_layers` counts it."""
    from test_multi_token import their_layers

    theirs = randomized("glm4_moe")
    directory = save(theirs, tmp_path / "theirs", their_layers(theirs, 1))
    tensors = {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}
    ling = tmp_path / "ling"
    ling.mkdir()
    save_file(as_ling(tensors), ling / WEIGHTS)
    (ling / HEADER).write_text(json.dumps(LING_2 | {"num_hidden_layers": 4, "num_nextn_predict_layers": 1}))
    found, same = (from_hf.look(path, tmp_path / "run", tokenizer="bytes") for path in (directory, ling))
    assert not same.faults and settings.unlike(same.config.model, found.config.model) == []
    assert same.config.model.multi_token_prediction.depth == 1
    jax.tree.map(np.testing.assert_array_equal, from_hf.read_arrays(same), from_hf.read_arrays(found))
    values = settings.to_theirs(same.family, same.config.model)
    assert (values["num_hidden_layers"], values["num_nextn_predict_layers"]) == (4, 1)


def test_a_family_may_lie_outside_the_package_where_the_user_names_it(models, tmp_path, capsys, monkeypatch):
    """A record of a run that names a file does not make it run: it has to be named anew."""
    monkeypatch.chdir(tmp_path)
    Path("my_model.py").write_text("from frugalmoe.convert.families.mixtral import FAMILY\n")
    arguments = ["convert", "from-hf", str(models / "one"), "run", "--tokenizer=bytes", "--family=./my_model.py"]
    assert main(arguments) == 0
    assert json.loads(Path("run/config.json").read_text())["name"] == "my_model"
    assert "several families" in refused(capsys, "to-hf", "run", "out")
    assert main(["convert", "to-hf", "run", "out", "--family=./my_model.py"]) == 0
    assert json.loads(Path("out/config.json").read_text()) == json.loads((models / "one" / HEADER).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("dense", "family"), [("llama", "mixtral"), ("olmo2", "flex_olmo")])
def test_an_upcycled_model_is_one_that_transformers_has(tmp_path, dense, family):
    """It computes there what the dense one does, before a step is trained."""
    theirs = randomized(dense)
    place = {name: str(tmp_path / name) for name in ("dense", "run", "sparse", "out")}
    save(theirs, tmp_path / "dense")
    assert main(["convert", "from-hf", place["dense"], place["run"], "--tokenizer=bytes"]) == 0
    counts = ["--experts=8", "--per-token=4", "--granularity=2"]
    assert main(["upcycle", place["run"], place["sparse"], *counts]) == 0
    assert main(["convert", "to-hf", place["sparse"], place["out"], f"--family={family}"]) == 0
    upcycled = hf.AutoModelForCausalLM.from_pretrained(place["out"])
    ids_BT = torch.from_numpy(tokens()).long()
    with torch.no_grad():
        expected_BTV, found_BTV = theirs(ids_BT).logits, upcycled(ids_BT).logits
    assert upcycled.config.model_type == family
    assert (found_BTV - expected_BTV).abs().max() < 1e-5 * expected_BTV.abs().max()
