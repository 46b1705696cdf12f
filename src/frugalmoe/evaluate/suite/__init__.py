"""The tasks of the suite, one file each. A new file in this folder is a new task; nothing else is edited."""

from frugalmoe.evaluate.contract import Task
from frugalmoe.found import Kind

_KIND = Kind(__name__, "TASK", Task, "--suite", "task of the suite")
names, get = _KIND.names, _KIND.get
