"""Every config resolves, published shapes have the published sizes, and bad values give one clear line."""

import copy
import dataclasses
import json
import math
import operator
import pickle
import re
import time
from pathlib import Path

import pytest
from runs import figures

from frugalmoe.config import Config, asked, default, load, override, record, recorded, resolve, settle
from frugalmoe.config.checks import check_devices
from frugalmoe.data.tokenizer import ByteTokenizer
from frugalmoe.errors import LONGEST_MESSAGE, UserError
from frugalmoe.fields import to_dict
from frugalmoe.model.transformer import count_parameters
from frugalmoe.routing import strategies
from frugalmoe.schema import MultiTokenPrediction
from frugalmoe.shipped import CONFIGS
from frugalmoe.train import rundir

NAMES = {"ling_1:lite": "ling_lite", "ling_1:plus": "ling_plus", "ling_2:mini": "ling_mini_2",
         "ling_2:flash": "ling_flash_2", "ling_2:1t": "ling_1t"}  # fmt: skip


@pytest.mark.parametrize("mode", ["", ":laptop"])
@pytest.mark.parametrize("spec", CONFIGS.choices())
def test_every_config_resolves(spec, mode):
    config = load(f"{spec}{mode}")
    assert config.name == NAMES.get(spec, spec) + ("-laptop" if mode else "")
    file, _, size = spec.partition(":")
    assert load(f"configs/{file}.py:{size}{mode}" if size else f"configs/{file}.py{mode}") == config
    assert resolve(override(default(), {})).model.dim == default().model.dim


def test_a_config_without_a_size_has_its_first():
    assert load("ling_2") == load("ling_2:mini")
    assert load("ling_1:laptop") == load("ling_1:lite:laptop")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ling_2:minii", "did you mean 'mini'? valid: 1t, flash, mini, each also with :laptop"),
        ("ling_2:lite", "unknown size; valid: 1t, flash, mini"),
        ("ling_2:laptop:mini", "unknown size"),
        ("ling_2:mini:desktop", "unknown mode; valid: laptop"),
        ("ling_2:mini:", "unknown mode; valid: laptop"),
        ("ling_2:mini:flash", "unknown mode; valid: laptop"),
        ("ling_2::laptop", "unknown size"),
        *((old, f"did you mean {new!r}?") for new, old in NAMES.items()),
        *((f"configs/{old}.py", f"did you mean 'configs/{new}'?") for new, old in NAMES.items()),
        *((f"{old}:laptop", f"did you mean {new!r}?") for new, old in NAMES.items()),
    ],
)
def test_a_size_that_is_none_and_a_name_of_old_are_told_what_there_is(spec, message):
    with pytest.raises(UserError) as error:
        load(spec)
    assert message in str(error.value)


# Billions: total; activated without embedding and head, and with both. Arithmetic from the published configurations
# (Ling 1: arXiv 2503.05139 and its config files; Ling 2.0: arXiv 2510.22115, table 1, without MTP), norm scales left
# out, which are below 1e-4 of the whole. The reports round to 16.8/2.75, 290/28.8, 16.26/1.43, 103/6.1 and 1000/51.0.
# DeepSeek-V3 (arXiv 2412.19437, 671/37), gpt-oss-20b (arXiv 2508.10925, 20.91/3.61 without the embedding) and Moonlight
# (arXiv 2502.16982, 15.29/2.24 without embedding and head) likewise.
PUBLISHED = {
    "ling_1:lite": (16.802, 2.235, 2.753),
    "ling_1:plus": (290.60, 27.64, 29.00),
    "ling_2:mini": (16.256, 0.789, 1.433),
    "ling_2:flash": (102.89, 4.864, 6.152),
    "ling_2:1t": (999.7, 48.48, 51.05),
    "deepseek_v3": (671.03, 35.70, 37.55),
    "gpt_oss": (20.908, 3.028, 4.186),
    "moonlight": (15.960, 2.2437, 2.9148),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    model = dataclasses.replace(load(name).model, multi_token_prediction=MultiTokenPrediction())
    counts = count_parameters(model)
    inner = counts["active"] - counts["embedding"] - counts["head"]
    ours = [count / 1e9 for count in (counts["total"], inner, counts["active"])]
    assert ours == pytest.approx(PUBLISHED[name], rel=3e-4)


BAD = [
    ("model.moe.num_expert=4", "model.moe.num_expert", "did you mean 'num_experts'"),
    ("modle.dim=4", "modle", "did you mean 'model'"),
    ("model.dim=big", "model.dim='big'", "expected int"),
    ("model.dim=1.5", "model.dim=1.5", "expected int"),
    ("train.steps=True", "train.steps=True", "expected int"),
    ("model.moe.num_experts_per_token=99", "model.moe.num_experts_per_token=99", "at most model.moe.num_experts=8"),
    ("model.num_heads=6,model.num_kv_heads=4", "model.num_heads=6", "multiple of model.num_kv_heads=4"),
    ("optim.learning_rate=-1.0", "optim.learning_rate=-1.0", "must be positive"),
    ("optim.learning_rate=1e999", "optim.learning_rate=inf", "must be 0 or from"),
    ("model.rope_fraction=0.3", "model.rope_fraction=0.3", "even number of channels"),
    ("model.norm=batch", "model.norm='batch'", "valid: layer, layer_bare, rms"),
    ("model.clip_qkv=-8.0", "model.clip_qkv=-8.0", "must not be negative"),
    ("model.norm_position=behind", "model.norm_position='behind'", "unknown"),
    ("model.multipliers.logits=0.0", "model.multipliers.logits=0.0", "must be positive"),
    ("model.multipliers.scores=-1.0", "model.multipliers.scores=-1.0", "must not be negative"),
    ("train.batch_size=10,train.accumulate_steps=4", "train.batch_size=10", "multiple of train.accumulate_steps=4"),
    ("model.moe.router=top_k", "model.moe.router", "no such routing strategy"),
    ("model.moe.options.scael=2.0", "model.moe.options.scael", "did you mean 'scale'"),
    ("model.moe.losses.zz=2.0", "model.moe.losses.zz", "unknown loss"),
    ("model.moe.activation=gelu", "model.moe.activation='gelu'", "unknown"),
    ("model.moe.shared_gate=True", "model.moe.shared_gate", "needs model.moe.num_shared_experts, which is 0"),
    ("model.moe.losses.z=-1.0", "model.moe.losses.z", "must not be negative"),
    ("model.moe.load_balance_devices=3", "model.moe.load_balance_devices=3", "must divide model.moe.num_experts=8"),
    ("model.moe.load_balance_devices=0", "model.moe.load_balance_devices=0", "must divide model.moe.num_experts=8"),
    ("model.moe.losses.device_balance=0.05", "model.moe.load_balance_devices=1", "at least 2"),
    ("model.moe.router=relu", "model.moe.router='relu'", "model.moe.losses.l1"),
    ("model.moe.executor=magic", "model.moe.executor='magic'", "valid: auto"),
    ("model.moe.drop_order=luck", "model.moe.drop_order='luck'", "token"),
    ("model.moe.router=sigmoid_bias,model.moe.options.num_groups=3", "options.num_groups=3", "num_experts=8"),
    ("model.moe.num_experts_per_token=1,model.moe.options.renormalize=True", "num_experts_per_token=1", "no gradient"),
    (
        "train.accumulate_steps=2,model.moe.load_balance_scope=global",
        "model.moe.load_balance_scope='global'",
        "train.accumulate_steps=1",
    ),
    ("data.tokenizer=gpt2", "data.tokenizer='gpt2'", "bytes, bpe:SIZE"),
    ("data.sources.a.null_text=drop", "data.sources.a.null_text='drop'", "valid: skip, stop"),
    ("data.sources.a.encoding=base64", "data.sources.a.encoding='base64'", "a text encoding"),
    ("data.sources.a.encoding=utf-99", "data.sources.a.encoding='utf-99'", "a text encoding"),
    ("data.validation_fraction=1.0", "data.validation_fraction=1.0", "(0, 1)"),
    ("optim.warmup_steps=5000", "optim.warmup_steps=5000", "train.steps=1000"),
    ("model.num_dense_layers=1", "model.dense_dim=0", "width"),
    ("model.moe_every=2", "model.dense_dim=0", "width"),
    ("model.moe_every=0", "model.moe_every=0", "must be from 1 to 4"),
    ("model.moe_every=4,model.num_dense_layers=1,model.dense_dim=8", "model.moe_every=4", "must be from 1 to 3"),
    ("model=3", "model=3", "section"),
    ("model={}", "model={}", "is a section; set its fields: attention"),  # would put every field at its default
    ("model.moe.losses=()", "model.moe.losses=()", "section"),
    ("mesh={1:2}", "mesh={1: 2}", "section"),
    ("model.moe.losses={1:2}", "model.moe.losses={1: 2}", "names as keys"),
    ("model.rope_theta=True", "model.rope_theta=True", "expected float, got bool"),
    ("model.moe.load_balance_group=-1", "model.moe.load_balance_group=-1", "must be positive"),
    ("train.batch_size=1073741824", "train.batch_size=1073741824", "must be below 2147483648 tokens"),
    ("model.dense_dim=4294967296", "model.dense_dim=4294967296", "must be from -2147483648 to 2147483647"),
    ("data.tokenizer=bpe:²²²²", "data.tokenizer='bpe:²²²²'", "bytes, bpe:SIZE"),
    ("name=../x", "name='../x': a part of it='..'", "a name holds letters"),
    ("name=/x", "name='/x': a part of it=''", "a name holds letters"),
    ("name=.", "name='.'", "a name holds letters"),
    ("name=a\nb", "name='a\\nb'", "a name holds letters"),
    (f"name={'x' * 129}", "name='xxx", "at most 128 bytes"),
    ("model.mixture_of_depths.capacity=1.5", "model.mixture_of_depths.capacity=1.5", "in (0, 1]"),
    ("model.mixture_of_depths.capacity=-0.1", "model.mixture_of_depths.capacity=-0.1", "in (0, 1]"),
    ("model.mixture_of_depths.every=0", "model.mixture_of_depths.every=0", "must be positive"),
    ("model.mixture_of_depths.predictor_loss=-1.0", "model.mixture_of_depths.predictor_loss=-1.0", "not be negative"),
    (
        "model.mixture_of_depths.capacity=0.5,model.mixture_of_depths.every=5",
        "model.mixture_of_depths.every=5",
        "routes no block of 0 dense and 4 MoE ones",
    ),
]


@pytest.mark.parametrize("overrides, field, rule", BAD, ids=lambda v: v)
def test_bad_values_name_field_value_and_rule(overrides, field, rule):
    with pytest.raises(UserError) as error:
        resolve(override(default(), overrides.split(",")))
    message = str(error.value)
    assert field in message and rule in message and "\n" not in message
    figures("F23 a bad value of a config is one line", 1, 1)


# What no field of any type means: too large, too small, not finite, of another kind, or a flood.
HOSTILE = (
    "inf", "nan", "1e999", "-1e999", "1e300", "1e-300", "-1", "2147483647", "1" + "0" * 30, "9" * 5000, "None", "True",
    "()", "[]", "{}", "{1:2}", "{[]:1}", "{'a':{'b':1}}", "1j", "...", "'\\d'", "a\nb", "\x1b]0;x\x07", "-" * 3000,
    "x" * 3000,
)  # fmt: skip


def _paths(section: dict, prefix: str = "") -> list[str]:
    inner = [
        path for name, part in section.items() if isinstance(part, dict) for path in _paths(part, f"{prefix}{name}.")
    ]
    return [*(prefix + name for name in section), *inner]


def _hostile(base: list[str], field: str) -> None:
    """Each value is either accepted, or refused in one short line that can be printed, and soon."""
    for value in HOSTILE:
        began = time.process_time()
        try:
            config = resolve(override(default(), [*base, f"{field}={value}"]))
            check_devices(config, 8)
            numbers = [v for v in _values(to_dict(config)) if isinstance(v, float)]
            assert all(math.isfinite(n) for n in numbers), (field, value)
        except UserError as e:
            message = str(e)
            assert message.isprintable() and len(message) <= LONGEST_MESSAGE, (field, value)
        assert time.process_time() - began < 5, (field, value)


def _values(value) -> list:
    return [leaf for part in value.values() for leaf in _values(part)] if isinstance(value, dict) else [value]


@pytest.mark.parametrize(
    "field", [*_paths(to_dict(Config())), "data.sources.a.weight", "model.moe.losses.device_balance"]
)
def test_no_value_of_a_field_hangs_floods_or_is_no_number(field):
    _hostile([], field)


@pytest.mark.parametrize("router", strategies.names())
def test_no_value_of_a_routers_option_does(router):
    for option in dataclasses.fields(strategies.get(router).options):
        _hostile([f"model.moe.router={router}"], f"model.moe.options.{option.name}")


def test_naming_another_router_drops_the_options_of_the_old_one():
    config = load("configs/ling_2.py:mini", {"model.moe.router": "hash"})
    assert config.model.moe.options == type(config.model.moe.options)()


def test_a_field_that_is_younger_than_a_run_leaves_it_as_it_was(tmp_path):
    config = resolve(default())
    old = json.loads(json.dumps(to_dict(config)))
    del old["model"]["mixture_of_depths"], old["model"]["moe"]["load_balance_devices"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    rundir.check_config(tmp_path, config, force=False)
    config = resolve(override(default(), {"model.mixture_of_depths.capacity": 0.5}))
    with pytest.raises(UserError, match=r"\(model.mixture_of_depths.capacity: 0.0 there, 0.5 here\)"):
        rundir.check_config(tmp_path, config, force=False)
    del old["model"]["moe"]["losses"]["z"]  # a user's own entry, no field
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"model\.moe\.losses\.z: None there, 0\.001 here"):
        rundir.check_config(tmp_path, resolve(default()), force=False)


def test_a_run_from_before_documents_had_a_start_goes_on_without_one(tmp_path):
    """The default changed what rows hold: the run's own config says nothing, and means what was so then."""
    config = resolve(default())
    assert config.data.document_start == "end_of_text" and rundir.as_begun(config, tmp_path) is config
    old = json.loads(json.dumps(to_dict(config)))
    del old["data"]["document_start"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert resolve(record(tmp_path / "config.json")).data.document_start == "none"
    begun = rundir.as_begun(config, tmp_path)
    assert begun == resolve(override(default(), {"data.document_start": "none"}))
    rundir.check_config(tmp_path, begun, force=False)
    with pytest.raises(UserError, match=r"\(data\.document_start: 'none' there, 'end_of_text' here\)"):
        rundir.check_config(tmp_path, config, force=False)
    for saved in (to_dict(config), {"data": 3}, [], None, {}):  # a run of today, and what is none
        (tmp_path / "config.json").write_text(json.dumps(saved))
        assert rundir.as_begun(config, tmp_path) is config


def test_a_run_continues_on_another_mesh_and_not_with_another_seed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(resolve(default()))))
    rundir.check_config(tmp_path, resolve(override(default(), {"mesh.fsdp": 4})), force=False)
    with pytest.raises(UserError, match=r"\(train.seed: 0 there, 1 here\)"):
        rundir.check_config(tmp_path, resolve(override(default(), {"train.seed": 1})), force=False)


OPEN = {"mesh.data": 2, "mesh.fsdp": -1}


def test_a_config_is_settled_once_and_its_record_knows_what_was_open(tmp_path):
    config = resolve(override(default(), OPEN))
    settled = settle(config, 257, 8)
    assert settled.model.vocab_size == 320 and to_dict(settled.mesh) == {
        "data": 2, "fsdp": 4, "expert": 1, "tensor": 1, "context": 1
    }  # fmt: skip
    assert settle(settled, 257, 8) == settled == settle(settle(config, None, 8), 257, None)
    assert settle(config, None, None) == config
    path = tmp_path / "config.json"
    rundir.describe(tmp_path, config, settled, 0)
    assert json.loads(path.read_text())["left_open"] == ["model.vocab_size", "mesh.fsdp"]
    assert resolve(record(path)) == settled and resolve(asked(path)) == config == load(str(tmp_path))
    assert settle(load(str(path), {"data.tokenizer": "bpe:512"}), 513, 4).model.vocab_size == 576
    rundir.describe(tmp_path, settled, settled, 0)
    assert load(str(tmp_path)) == settled  # nothing was left open


@pytest.mark.parametrize("value", [3, None, "mesh.data", ["mesh.date"], ["model.dim"], [[]], {"mesh.data": []}])
def test_a_record_that_names_other_fields_as_open_is_damaged(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(Config()) | {"left_open": value}))
    with pytest.raises(UserError, match="a damaged config"):
        load(str(tmp_path))


def test_a_vocabulary_is_compared_once_it_is_settled(tmp_path):
    """Runs that are older than `settle` left it open on record too, beside their tokenizer."""
    config = resolve(default())
    bytes_ = ByteTokenizer()
    for saved in (to_dict(config), recorded(config, settle(config, bytes_.size, 1))):
        (tmp_path / "config.json").write_text(json.dumps(saved))
        rundir.check_config(tmp_path, settle(config, bytes_.size, 2), force=False)  # the tokenizer is not there
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        bytes_.save_into(tmp_path / "tokenizer")
        for same in (config, settle(config, bytes_.size, 2), settle(config, bytes_.size, None)):
            rundir.check_config(tmp_path, same, force=False)
        with pytest.raises(UserError, match=r"\(model\.vocab_size: 320 there, 384 here\)"):
            rundir.check_config(tmp_path, settle(config, 321, None), force=False)


def test_what_an_older_run_left_open_is_no_change_of_its_config(tmp_path):
    config = resolve(default())
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    for devices, changes in ((2, {}), (4, {"mesh.data": [2, 4]})):
        rundir.describe(tmp_path, config, settle(config, 257, devices), 0)
        assert rundir.read_rows(tmp_path / "history.jsonl")[-1]["changes"] == changes


HEADS = {"model.num_heads": 8, "model.num_kv_heads": 2}  # of the default config beside: E=8, D=256, T=256, batch 16


@pytest.mark.parametrize(
    "fields, devices, message",
    [
        (
            {"mesh.data": 3},
            8,
            "mesh='data=3*fsdp=1*expert=1*tensor=1*context=1': multiplies to 3, which must equal the",
        ),
        ({"mesh.data": 0}, 1, "mesh.data=0: must be a positive size"),
        ({"mesh.fsdp": -1}, 8, "mesh.fsdp=-1: only one axis may be -1, and mesh.data is too"),
        (
            {"mesh.expert": 3},
            8,
            "mesh.expert=3: must divide the 8 devices, of which mesh.data=-1 takes the rest; nearest valid: 2, 4",
        ),
        ({"train.batch_size": 12}, 8, "mesh.data*fsdp*expert=8: must divide the 12 sequences of a micro-batch"),
        ({"train.batch_size": 12}, 8, "nearest valid: 6, 12"),
        (
            {"mesh.expert": 16, "mesh.data": 1},
            16,
            "mesh.expert=16: must divide model.moe.num_experts=8; nearest valid: 8",
        ),
        ({"mesh.tensor": 4} | HEADS, 4, "mesh.tensor=4: must divide model.num_kv_heads=2; nearest valid: 2"),
        ({"mesh.tensor": 3}, 3, "mesh.tensor=3: must divide model.num_heads=8; nearest valid: 2, 4"),
        ({"mesh.context": 16}, 16, "mesh.context=16: must divide the 8 of model.num_heads=8 on a tensor device"),
        (
            {"mesh.context": 3, "model.num_heads": 6, "model.num_kv_heads": 6, "model.dim": 192},
            3,
            "mesh.context=3: must divide data.sequence_length=256; nearest valid: 2, 4",
        ),
        ({"mesh.tensor": 2, "model.vocab_size": 4099}, 2, "mesh.tensor=2: must divide model.vocab_size=4099"),
        ({"mesh.fsdp": 16, "mesh.data": 1, "model.dim": 200}, 16, "model.dim=200, which parameters are stored by"),
        ({"mesh.context": 2, "model.mixture_of_depths.capacity": 0.5}, 2, "mesh.context=2: must be 1 with"),
        ({"model.moe.exchange": "all2all"}, 1, "model.moe.exchange='all2all': unknown; did you mean"),
        ({"model.moe.exchange_room": 0.5}, 1, "model.moe.exchange_room=0.5: must be at least 1, or 0"),
    ],
)
def test_mesh_must_fit_devices_and_what_it_spreads(fields, devices, message):
    with pytest.raises(UserError, match=re.escape(message)):
        check_devices(resolve(override(default(), fields)), devices)


def test_the_open_axis_takes_what_remains():
    config = resolve(override(default(), {"mesh.data": 2, "mesh.fsdp": -1, "mesh.expert": 2}))
    assert check_devices(config, 8) == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1, "context": 1}


def test_a_missing_config_file_lists_the_ones_there_are(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"did you mean 'configs/quickstart\.py'"):
        load("configs/quickstrat.py")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"did you mean 'quickstart'\? valid: deepseek_v3, .*, study$"):
        load("quickstrat")


def test_shipped_configs_are_found_by_name_after_files_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for spec in ("quickstart", "quickstart.py", "configs/quickstart.py"):
        assert load(f"{spec}:laptop").name == "quickstart-laptop"
    write_config(tmp_path / "quickstart.py", "c.name = 'mine'")
    assert (load("quickstart.py").name, load("quickstart").name) == ("mine", "quickstart")


def write_config(path: Path, body: str) -> Path:
    head = "import sys\nfrom frugalmoe.config import default\n\n\ndef get_config(arg=None):\n    c = default()\n"
    path.write_text(head + "".join(f"    {line}\n" for line in [*body.splitlines(), "return c"]))
    return path


@pytest.mark.parametrize(
    "body, message",
    [
        ("c.model.dimm = 3", "Did you mean"),
        ("1 / 0", "ZeroDivisionError"),
        ("sys.exit()", "SystemExit"),  # else the command would end with 0, and have done nothing
        ("return get_config()", "RecursionError"),
        ("return None", "returned NoneType: get_config() must edit what frugalmoe.config.default() gives"),
        ("return {}", "returned dict"),
        ("return type(c)()", "without the section checkpoint"),
        ("del c.unlock().model.unlock().moe", "without the section model.moe"),
        ("raise ValueError('a\\nb\\x1b[2J' + 5000 * 'x')", "ValueError: a"),
    ],
)
def test_an_error_inside_a_config_file_is_one_line(tmp_path, body, message):
    with pytest.raises(UserError) as error:
        load(str(write_config(tmp_path / "broken.py", body)))
    assert message in str(error.value) and str(error.value).isprintable() and len(str(error.value)) <= LONGEST_MESSAGE


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("x.yaml", "model: 3", "must be a Python file"),
        ("x.txt", "def get_config(arg=None): pass", "must be a Python file"),
        ("x.py", "c = 3", "defines no get_config"),
        ("x.py", "def get_config(arg=None)\n", "SyntaxError"),
        ("x.py", "import sys; sys.exit(0)", "SystemExit"),
        ("x.py", "def get_config(): return 3", "TypeError"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / name))


@pytest.mark.parametrize("spec", ["", ":laptop", "x" * 300, "/", "quickstart:desktop", "../quickstart"])
def test_what_names_no_config_is_one_line(spec):
    with pytest.raises(UserError, match="--config="):
        load(spec)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.__setitem__("z", 9.0),
        lambda d: d.__delitem__("z"),
        lambda d: d.update(z=9.0),
        lambda d: d.setdefault("new", 9.0),
        lambda d: d.pop("z"),
        lambda d: d.popitem(),
        lambda d: d.clear(),
        lambda d: operator.ior(d, {"z": 9.0}),
    ],
)
def test_a_config_shares_no_mapping_that_can_be_changed(change):
    """One config's edit would change every later config of the process, and the keys of caches."""
    with pytest.raises(TypeError, match="cannot be changed"):
        change(Config().model.moe.losses)
    assert dict(Config().model.moe.losses) == {"load_balance": 0.01, "z": 0.001}
    for copied in (copy.deepcopy(Config()), pickle.loads(pickle.dumps(Config()))):
        assert copied == Config() and hash(copied) == hash(Config())
