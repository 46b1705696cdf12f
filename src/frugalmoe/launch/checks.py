"""What is wrong in a filled template and its scheduler would not say, or not before the nodes are there.

What schedulers refuse by themselves (unknown options and fields) is left to them.
"""

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from frugalmoe.config import Config
from frugalmoe.errors import UserError
from frugalmoe.launch.job import Job


def check_visible(config: Config, template: str) -> list[str]:
    """Returns FIELD=VALUE of the data that cannot be seen from here, because the template mounts them on the nodes.

    Raises `UserError` for what the nodes, which have a copy of this directory, would not see.
    """
    if "requirements.txt" in template and not Path("requirements.txt").is_file():
        raise UserError("requirements.txt: not here; the template installs frugalmoe from its checkout: start it there")
    named = {f"data.sources.{name}.path": source.path for name, source in config.data.sources.items()}
    named = (named or {"data.path": config.data.path}) | {"data.tokenizer": config.data.tokenizer}
    named["data.validation.path"] = config.data.validation.path
    unseen = []
    for field, value in named.items():
        path = Path(value).expanduser()
        if not path.is_absolute() and ".." not in path.parts:
            continue
        if not any(str(folder) in template for folder in (path, *path.parents) if len(folder.parts) > 1):
            rule = "must lie in this directory, of which the nodes have a copy, or where the template mounts something"
            raise UserError(f"{field}={value!r}: {rule}")
        if not path.exists():
            unseen.append(f"{field}={value!r}")
    return unseen


def check_slurm(text: str, job: Job) -> None:
    """Checks that there is a process per device, as JAX counts them on SLURM, and no option below the first command,
    where none is read.
    """
    _check_shell("the script", text)
    head = re.match(r"(?:#.*\n|[ \t]*\n)*", text)[0]
    if late := re.search(r"^#SBATCH.*", text[len(head) :], re.M):
        raise UserError(f"{late[0]}: stands after the first command, where sbatch reads no more options")
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", head, re.M))
    _expect("#SBATCH --nodes", options.get("nodes"), str(job.nodes))
    _expect("#SBATCH --ntasks-per-node", options.get("ntasks-per-node"), str(job.devices_per_node))


def check_jobset(text: str, job: Job) -> None:
    """Checks that there is a pod per node with the devices that were asked for, on a TPU slice of that size."""
    document = _read_yaml(text)
    pods = ("spec", "replicatedJobs", 0, "template", "spec")
    pod = (*pods, "template", "spec")
    container = (*pod, "containers", 0)
    for field in ("parallelism", "completions"):
        _expect(field, _at(document, *pods, field), job.nodes)
    for device in ("nvidia.com/gpu", "google.com/tpu"):
        count = _at(document, *container, "resources", "limits", device)
        if count is not None:
            _expect(device, count, job.devices_per_node)
    topology = _at(document, *pod, "nodeSelector", "cloud.google.com/gke-tpu-topology")
    chips, devices = math.prod(map(int, re.findall(r"\d+", str(topology)))), job.nodes * job.devices_per_node
    if topology and chips != devices:
        rule = f"has {chips} chips, must have --nodes x --devices-per-node = {devices}"
        raise UserError(f"gke-tpu-topology={topology}: {rule}")
    _check_shell("command", str((_at(document, *container, "command") or [""])[-1]))


def check_skypilot(text: str, job: Job) -> None:
    """Checks that the task has the nodes and GPUs that were asked for."""
    document = _read_yaml(text)
    _expect("num_nodes", _at(document, "num_nodes"), job.nodes)
    accelerators = str(_at(document, "resources", "accelerators"))
    _expect("resources.accelerators", accelerators, f"{accelerators.partition(':')[0]}:{job.devices_per_node}")
    for part in ("setup", "run"):
        _check_shell(part, str(_at(document, part) or ""))


def check_ssh(text: str, job: Job) -> None:
    """Checks that bash can read the script."""
    _check_shell("the script", text)


def _check_shell(where: str, script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{where}: bash cannot read it ({done.stderr.splitlines()[0].removeprefix('bash: ')})")


def _read_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"not valid YAML ({' '.join(str(e).split())})") from e


def _at(node: Any, *path: str | int) -> Any:
    """The value at the end of a path of keys and places; None where there is none."""
    try:
        for key in path:
            node = node[key]
    except (KeyError, IndexError, TypeError):
        return None
    return node


def _expect(path: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise UserError(f"{path}={found!r}: must be {expected!r}")
