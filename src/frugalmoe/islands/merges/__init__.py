"""The merge rules, one file each. A new file in this folder is a new rule; nothing else is edited."""

from frugalmoe.found import Kind
from frugalmoe.islands.contract import Merge

_KIND = Kind(__name__, "MERGE", Merge, "islands.merge", "merge rule")
names, get, broken = _KIND.names, _KIND.get, _KIND.broken
