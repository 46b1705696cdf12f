"""The keys of a published model's config.json, each of which somebody must ask for."""

from collections.abc import Mapping
from typing import Any

from frugalmoe.config.checks import MOST_LAYERS
from frugalmoe.errors import UserError

# What says nothing of the answers of a trained model: how it is saved, started, trained, or wrapped.
INERT = frozenset((
    "architectures", "model_type", "transformers_version", "_name_or_path", "auto_map", "dtype", "torch_dtype",
    "use_cache", "initializer_range", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
    "sep_token_id", "decoder_start_token_id", "output_router_logits", "router_aux_loss_coef", "output_attentions",
    "output_hidden_states", "return_dict", "return_dict_in_generate", "is_encoder_decoder", "id2label", "label2id",
    "problem_type", "chunk_size_feed_forward", "tokenizer_class", "task_specific_params", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "_experts_implementation", "experts_implementation",
    "max_position_embeddings",
))  # fmt: skip


class Keys:
    """A JSON object that remembers what was asked of it; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self._where = dict(values), where
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str, default: Any = None, also: tuple[str, ...] = ()) -> Any:
        """Returns the value of a key under the first of its spellings that is there, else the default."""
        self._asked |= {name, *also}
        return next((self._values[spelling] for spelling in (name, *also) if spelling in self), default)

    def require(self, name: str, also: tuple[str, ...] = ()) -> Any:
        """As `get`, of a key that must be there."""
        if (value := self.get(name, None, also)) is None:
            raise UserError(f"{self._where}: lacks {name!r}")
        return value

    def integer(self, name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """Returns a whole number from 0 to `most`; required where there is no default."""
        value = self.require(name) if default is None else self.get(name, default)
        if type(value) is not int or not 0 <= value <= most:
            raise self.refused(name, value, f"must be a whole number from 0 to {most}")
        return value

    def flag(self, name: str) -> bool:
        """Returns true or false, which it is where the key is absent."""
        value = self.get(name, False)
        if type(value) is not bool:
            raise self.refused(name, value, "must be true or false")
        return value

    def layers(self) -> int:
        """Returns the number of layers, each of which may be looked at by itself."""
        return self.integer("num_hidden_layers", most=MOST_LAYERS)

    def section(self, name: str) -> "Keys":
        """Returns the object under a key; an empty one where it is absent."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.refused(name, value, "must be an object")
        return Keys(value, f"{self._where}: {name}")

    def fix(self, name: str, allowed: tuple[Any, ...]) -> None:
        """Refuses a value that is not implemented; an absent key has the first of those allowed."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise self.refused(name, value, f"is not implemented; valid: {', '.join(map(repr, allowed))}")

    def refused(self, name: str, value: Any, rule: str) -> UserError:
        """What to raise for a value."""
        return UserError(f"{self._where}: {name}={value!r}: {rule}")

    def check_all_asked(self, inert: frozenset[str] | set[str] = frozenset()) -> None:
        """Refuses keys that nobody asked for, as they might change what the model computes."""
        left = [name for name in self._values if name not in self._asked and name not in inert and name in self]
        if left:
            shown = ", ".join(f"{name}={self._values[name]!r}" for name in left[:10])
            rule = "no meaning is known for this family, and it may change what the model computes"
            raise UserError(f"{self._where}: {shown}: {rule}")
