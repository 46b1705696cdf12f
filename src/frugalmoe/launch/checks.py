"""What can be wrong in a filled template, found before the cluster does.

Sources: sbatch(1) of SLURM 22.05 and 25.11; `sky/utils/schemas.py` of SkyPilot 0.14.1. Kubernetes checks the names of a
JobSet's fields when it takes it, and does not know what JAX needs: that is checked here.
"""

import math
import re
import subprocess
from collections.abc import Iterable
from typing import Any

import yaml

from frugalmoe.errors import UserError, did_you_mean
from frugalmoe.launch.job import Job

EDIT = "EDIT-ME"

SBATCH = """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment consolidate-segments
    constraint container container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task
    deadline delay-boot dependency distribution error exclude exclusive export export-file extra extra-node-info
    get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold
    ignore-pbs input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu
    mem-per-gpu mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core
    ntasks-per-gpu ntasks-per-node ntasks-per-socket oom-kill-step open-mode output overcommit oversubscribe
    parsable partition power prefer priority profile propagate qos quiet reboot requeue reservation resources
    resv-ports segment signal sockets-per-node spread-job spread-segments stepmgr switches test-only thread-spec
    threads-per-core time time-min tmp tres-bind tres-per-task uid use-min-nodes verbose wait wait-all-nodes wckey
    wrap
"""
SKY_TASK = """
    name workdir event_callback num_nodes resources file_mounts service pool setup run envs secrets inputs outputs
    config volumes managed_secrets volume_mounts api_server_access
"""
SKY_RECOVERY = "strategy max_restarts_on_errors recover_on_exit_codes"


def check_slurm(text: str, job: Job) -> None:
    """Options that sbatch knows, where sbatch reads them, and a process per device as JAX counts them on SLURM."""
    _check_shell(text, "the script")
    options, body = {}, False
    for line in text.splitlines():
        if not line.startswith("#SBATCH"):
            body = body or bool(line.strip() and not line.startswith("#"))
            continue
        if body:
            raise UserError(f"{line}: stands after the first command, where sbatch reads no more options")
        for name, value in re.findall(r" --([\w-]+)(?:=(\S*))?", line):
            _known("#SBATCH --", [name], SBATCH)
            options[name] = value
    for name, value in (("nodes", job.nodes), ("ntasks-per-node", job.devices_per_node)):
        _expect(f"#SBATCH --{name}", options.get(name), str(value))


def check_jobset(text: str, job: Job) -> None:
    """One indexed job whose pods are the nodes, with the devices that were asked for, on a slice of that size."""
    document = _read_yaml(text)
    inner = "spec.replicatedJobs.0.template.spec"
    pod = f"{inner}.template.spec"
    expected = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata.name": job.name,
        "spec.replicatedJobs.0.replicas": 1,
        f"{inner}.parallelism": job.nodes,
        f"{inner}.completions": job.nodes,
        f"{inner}.completionMode": "Indexed",
        f"{pod}.restartPolicy": "Never",
    }
    for path, value in expected.items():
        _expect(path, _at(document, path), value)
    for name, count in (_at(document, f"{pod}.containers.0.resources.limits") or {}).items():
        if name.endswith(("/gpu", "/tpu")):
            _expect(f"{pod}.containers.0.resources.limits.{name}", count, job.devices_per_node)
    topology = (_at(document, f"{pod}.nodeSelector") or {}).get("cloud.google.com/gke-tpu-topology")
    if topology is not None:
        chips, devices = math.prod(map(int, re.findall(r"\d+", topology))), job.nodes * job.devices_per_node
        if chips != devices:
            raise UserError(
                f"gke-tpu-topology={topology}: has {chips} chips, must have --nodes x --devices-per-node = {devices}"
            )
    _check_shell((_at(document, f"{pod}.containers.0.command") or [""])[-1], f"{pod}.containers.0.command")


def check_skypilot(text: str, job: Job) -> None:
    """Fields that SkyPilot's schema knows, and the nodes and devices that were asked for."""
    document = _read_yaml(text)
    _known("", document, SKY_TASK)
    recovery = _at(document, "resources.job_recovery")
    if isinstance(recovery, dict):
        _known("resources.job_recovery.", recovery, SKY_RECOVERY)
    _expect("name", _at(document, "name"), job.name)
    _expect("num_nodes", _at(document, "num_nodes"), job.nodes)
    accelerators = _at(document, "resources.accelerators")
    if isinstance(accelerators, str) and not accelerators.startswith("tpu"):  # of those the name holds the number
        kind, _, count = accelerators.partition(":")
        _expect("resources.accelerators", f"{kind}:{count or 1}", f"{kind}:{job.devices_per_node}")
    for part in ("setup", "run"):
        _check_shell(_at(document, part) or "", part)


def check_ssh(text: str, job: Job) -> None:
    """A script that the shell can read."""
    _check_shell(text, "the script")


def unedited(text: str) -> list[int]:
    """Numbers of the lines that still wait for the user's own values; comments do not count."""
    lines = enumerate(text.splitlines(), start=1)
    return [number for number, line in lines if EDIT in line.partition("#")[0]]


def _check_shell(script: str, where: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{where}: bash cannot read it ({done.stderr.splitlines()[0].removeprefix('bash: ')})")


def _read_yaml(text: str) -> dict[str, Any]:
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"not valid YAML ({' '.join(str(e).split())})") from e
    if not isinstance(document, dict):
        raise UserError("not a YAML mapping")
    return document


def _at(node: Any, path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    for key in path.split("."):
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict):
            node = node.get(key)
        else:
            return None
    return node


def _known(prefix: str, names: Iterable[str], valid: str) -> None:
    for name in names:
        if name not in valid.split():
            raise UserError(f"{prefix}{name}: unknown; {did_you_mean(name, valid.split())}")


def _expect(path: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise UserError(f"{path}={found!r}: must be {expected!r}")
