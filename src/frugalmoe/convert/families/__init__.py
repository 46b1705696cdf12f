"""Families of published models, one file each. A new file in this folder is a new family; nothing else is edited.

A file is named as the `model_type` of its models' config.json. Only a family that is asked for is imported.
"""

from frugalmoe.convert.contract import Family
from frugalmoe.found import Kind

_KIND = Kind(__name__, "FAMILY", Family, "--family", "family of models")
names, get, broken, sound = _KIND.names, _KIND.get, _KIND.broken, _KIND.sound
