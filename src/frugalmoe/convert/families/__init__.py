"""Families of published models, one file each. A new file in this folder is a new family; nothing else is edited.

A file is named as the `model_type` of its models' config.json. Only a family that is asked for is imported.
"""

from frugalmoe.convert.contract import Family
from frugalmoe.found import Kind

# model_type of families that are known and are not here -> the options of theirs that our model lacks.
MISSING = {
    "llama4": "images; of its text model, what llama4_text says",
    "llama4_text": "chunked attention (attention_chunk_size), layers without rotary positions (no_rope_layers), their "
    "temperature (attn_temperature_tuning), norms of queries and keys without weights (use_qk_norm)",
}
_KIND = Kind(__name__, "FAMILY", Family, "--family", "family of models")
names, get, broken, sound = _KIND.names, _KIND.get, _KIND.broken, _KIND.sound
