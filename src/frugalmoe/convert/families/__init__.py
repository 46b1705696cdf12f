"""Families of published models, one file each. A new file in this folder is a new family; nothing else is edited.

A file is named as the `model_type` of its models' config.json. Only a family that is asked for is imported.
"""

from frugalmoe.convert.contract import Family
from frugalmoe.found import Kind

# model_type of families that are known and are not here -> the options of theirs that our model lacks.
MISSING = {
    "llama4": "images; its text model by itself, saved as Llama4ForCausalLM, is the family llama4_text",
}
_KIND = Kind(__name__, "FAMILY", Family, "--family", "family of models")
names, get, broken, sound = _KIND.names, _KIND.get, _KIND.broken, _KIND.sound
