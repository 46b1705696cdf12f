"""One letter, one meaning: names of arrays, docstrings and declarations against the one legend."""

import ast
import dataclasses
import re
import tokenize
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import frugalmoe
from frugalmoe.config import default, load, override, resolve
from frugalmoe.errors import UserError
from frugalmoe.model.transformer import declarations, structure
from frugalmoe.routing import strategies
from frugalmoe.routing.contract import Router, declare
from frugalmoe.schema import Model
from frugalmoe.sharding import parameter
from frugalmoe.sharding.letters import LETTERS

PACKAGE = Path(frugalmoe.__file__).parent
SOURCES = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
EMPTY = set(re.findall(r"\w+", "a an all and any as in is its of one or own that the there to"))
words = lambda text: set(re.findall(r"[a-z]+", text.lower())) - EMPTY


def legend(docstring: str) -> list[tuple[str, str]]:
    """(letter, meaning) of each entry of a docstring's "Letters:"; no meaning where it is a formula of letters."""
    found = re.search(r"Letters: (.*?)(?:\.\s+[A-Z]|\n\n|$)", docstring, re.S)
    if not found:
        return []
    text = re.sub(r"\s+", " ", re.sub(r"\([^)]*\)", "", found[1]))
    entries = []
    for entry in re.split(r"[,;] ", text):
        entry = re.fullmatch(r"(?:and )?'?([A-Za-z0-9.](?: and [A-Z])?)'?(?: |$)(.*)", entry.strip().rstrip("."))
        letters, meaning = entry.groups()
        formula = re.fullmatch(r"= ?[A-Z0-9 +*/]*", meaning)
        entries += [(letter, "" if formula else meaning) for letter in letters.split(" and ")]
    return entries


def wrong_entries(docstring: str) -> list[str]:
    """Entries whose letter is not in `LETTERS`, or whose meaning shares no word with the one there."""
    wrong = lambda letter, meaning: letter not in LETTERS or (meaning and not words(meaning) & words(LETTERS[letter]))
    return [f"{letter} {meaning}" for letter, meaning in legend(docstring) if wrong(letter, meaning)]


def test_every_docstring_has_the_meanings_of_the_legend():
    docstrings = {path: ast.get_docstring(ast.parse(text.read_text())) or "" for path, text in SOURCES.items()}
    assert sum("Letters:" in text for text in docstrings.values()) > 60
    assert not {path: wrong for path, text in docstrings.items() if (wrong := wrong_entries(text))}


@pytest.mark.parametrize(
    "docstring, wrong",
    [
        ("Letters: B batch, T time, K key-value heads.", ["K key-value heads"]),
        ("x.\n\nLetters: H channels of the GRU, G = 3H,\nE experts. T is not read here.", ["H channels of the GRU"]),
        ("Letters: Ä umlauts.", None),
        ("Letters: X = E + null experts; 2 = (gate, up), K = 1, I and J any two axes.", []),
        ("Letters: C constant experts", ["C constant experts"]),
        ("no letters", []),
    ],
)
def test_what_means_something_else_is_found(docstring, wrong):
    if wrong is None:
        with pytest.raises(AttributeError):
            wrong_entries(docstring)
    else:
        assert wrong_entries(docstring) == wrong


def array_names(path: Path) -> set[str]:
    """Names that end in letters of axes: `x_BTD`. A visitor's methods end in what is visited."""
    with path.open("rb") as file:
        names = {token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.NAME}
    return {name for name in names if re.search(r"^(?!visit_).*[a-z0-9]_(?=[a-z0-9]*[A-Z])[A-Za-z0-9]+$", name)}


def test_every_array_is_named_with_letters_of_the_legend():
    """1 is an axis of size 1, x what is left of the axes."""
    names = {path: array_names(file) for path, file in SOURCES.items()}
    assert sum(map(len, names.values())) > 500
    unknown = lambda name: set(name.rpartition("_")[2]) - {*LETTERS, "1", "x"}
    assert not {path: bad for path, of in names.items() if (bad := sorted(n for n in of if unknown(n)))}


CONFIGS = sorted(path.name for path in (Path(__file__).parents[1] / "configs").glob("*.py"))
SIZES = {"vocab_size": 64, "dim": 16, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "moe.num_experts": 4}
EVERY_PART = {"qkv_bias": True, "mixture_of_depths.capacity": 0.5, "num_dense_layers": 2, "dense_dim": 8}
LATENT = {"attention": "latent", "attention_options.latent.query_rank": 8}
SINKS = {"attention": "window,grouped", "attention_options.window.sinks": True}


def model_of(router: Router | str, **fields) -> Model:
    options = {f"model.{name}": value for name, value in (SIZES | fields).items()}
    return resolve(override(default(), options | {"model.moe.router": router})).model


def assert_names_agree(model: Model) -> None:
    """What a name says of its axes is what the parameter declares, and every parameter declares."""
    declared = declarations(model)
    _, params, _ = structure(model)
    assert len(declared) == len(jax.tree.leaves(params))
    for names, declaration in declared.items():
        of_name = names[-1].rpartition("_")[2]
        assert set(declaration.axes) <= set(LETTERS)
        assert of_name == declaration.axes or of_name == of_name.lower(), (names, declaration)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_names_of_every_config_say_what_is_declared(name):
    config = load(f"configs/{name}:laptop", {"model.vocab_size": 512})
    assert_names_agree(config.model)


@pytest.mark.parametrize("name", strategies.names())
def test_the_names_of_every_strategy_say_what_is_declared(name):
    router = strategies.get(name)
    moe = dataclasses.replace(model_of("hash").moe, router=name, options=router.options())
    for shared in (False, True):
        make = lambda shared=shared: router.new_params(jax.random.key(0), 16, moe, shared)
        for parameter_name, value in nnx.eval_shape(make).items():
            of_name, letters = parameter_name.rpartition("_")[2], value.get_metadata()["letters"]
            assert of_name == (letters or of_name.lower()), parameter_name


PARTS = [
    EVERY_PART | {"qk_norm": "full", "out_bias": True},
    EVERY_PART | {"qk_norm": "head"},
    {"tie_embeddings": True, "moe.expert_bias": True},
    EVERY_PART | {"norm": "layer", "head_bias": True, "multi_token_prediction.depth": 1},
    LATENT,
    SINKS,
]


@pytest.mark.parametrize("fields", PARTS, ids=str)
def test_the_names_of_every_part_say_what_is_declared(fields):
    assert_names_agree(model_of("recurrent", **fields))


NEW = {
    "plain": (lambda: jnp.zeros((16, 4)), "an array that does not say what it is"),
    "param": (lambda: nnx.Param(jnp.zeros((16, 4))), "an array that does not say what it is"),
    "number": (lambda: 3.0, "an array that does not say what it is"),
    "unknown": (lambda: declare(jnp.zeros((16, 4)), "DÄ"), "unknown letter 'Ä' in 'DÄ'; known: A B T"),
    "arrow": (
        lambda: declare(jnp.zeros((16, 4)), "D->E"),
        "a matrix, and nothing else, is declared",
    ),
    "many": (lambda: declare(jnp.zeros((16, 4)), "DEK"), "3 letters, 'DEK', for an array of 2 axes"),
    "few": (lambda: declare(jnp.zeros((16, 4)), "D"), "1 letters, 'D', for an array of 2 axes"),
    "name": (lambda: declare(jnp.zeros((16, 4)), "DP"), "its name says 'DE', its declaration 'DP'"),
    "role": (lambda: parameter(jnp.zeros((16, 4)), "D->E", "matrix"), "its role is 'matrix'"),
}


@pytest.mark.parametrize("where", ["init", "init_shared"])
@pytest.mark.parametrize("value, rule", NEW.values(), ids=NEW)
def test_a_strategy_whose_parameters_do_not_say_what_they_are_is_refused_in_one_line(value, rule, where):
    hashing = strategies.get("hash")
    router = dataclasses.replace(hashing, name="mine", **{where: lambda *_: {"kernel_DE": value()}})
    with pytest.raises(UserError) as refused:
        structure(model_of(router))
    line = str(refused.value)
    assert line.startswith(f"model.moe.router='mine': {where} returned 'kernel_DE': ")
    assert rule in line and "\n" not in line
