"""The templates of `launch/`: what they become is held to the schedulers' own documents, and ssh.sh runs processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from frugalmoe.cli import main
from frugalmoe.errors import UserError
from frugalmoe.launch import checks
from frugalmoe.launch.job import Job, fill, read_hosts

LAUNCH = Path(__file__).parents[1] / "launch"
CONFIG = "--config=configs/quickstart.py"
SIZES = {"slurm": (4, 2), "jobset": (4, 2), "jobset-tpu": (4, 4), "skypilot": (4, 2)}
TRAIN = "frugalmoe train --config=configs/quickstart.py --config.train.batch_size=64 --workdir=runs/quickstart"


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(LAUNCH.parent)


def dry_run(capsys, scheduler: str, *flags: str) -> str:
    nodes, devices = SIZES.get(scheduler, (None, 2))
    sizes = [f"--devices-per-node={devices}"] + ([f"--nodes={nodes}"] if nodes else [])
    assert main(["launch", scheduler, CONFIG, "--config.train.batch_size=64", "--dry-run", *sizes, *flags]) == 0
    return capsys.readouterr().out


def error(capsys, *argv: str) -> str:
    """The line that a refused command prints."""
    assert main(["launch", *argv]) == 2
    return capsys.readouterr().err.strip()


def test_slurm(capsys):
    text = dry_run(capsys, "slurm")
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    # JAX gives process i of a node device SLURM_LOCALID, so 2 devices are 2 tasks of a node.
    assert {"--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2", "--requeue", "--signal=TERM@120"} <= set(options)
    assert text.startswith("#!/bin/bash\n")
    assert f"  {TRAIN}\n" in text
    assert 'scontrol requeue "$SLURM_JOB_ID"' in text  # the shell's words are left to the shell


@pytest.mark.parametrize("scheduler", ["jobset", "jobset-tpu"])
def test_jobset_has_only_fields_of_the_published_types(capsys, scheduler):
    """The generated types of JobSet and of Kubernetes: what they do not know is lost on the way through them."""
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    document = yaml.safe_load(dry_run(capsys, scheduler))
    assert JobsetV1alpha2JobSet.from_dict(document).to_dict() == document


def test_jobset_names_its_first_pod(capsys):
    """JAX's own rule for a JobSet (`jax._src.clusters.k8s_cluster`) is JOB-0.JOBSET, with JOB = JOBSET-REPLICATED-0."""
    document = yaml.safe_load(dry_run(capsys, "jobset"))
    (replicated,) = document["spec"]["replicatedJobs"]
    jobset = document["metadata"]["name"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert f"--coordinator={jobset}-{replicated['name']}-0-0.{jobset}:" in pod["containers"][0]["command"][2]


@pytest.mark.parametrize("scheduler", ["jobset", "jobset-tpu"])
def test_jobset_goes_on_after_preemption(capsys, scheduler):
    spec = yaml.safe_load(dry_run(capsys, scheduler))["spec"]
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [75]
    assert {rule["action"] for rule in rules} == {"FailJob"}
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])


def test_skypilot(capsys):
    task = yaml.safe_load(dry_run(capsys, "skypilot"))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (4, "H100:2")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert f"exec {TRAIN} \\\n" in task["run"]


def test_ssh(capsys):
    text = dry_run(capsys, "ssh", "--hosts=node1,me@node2")
    assert "HOSTS=(node1 me@node2)\n" in text
    assert f"cd {Path.cwd()} && " in text


def test_what_waits_for_the_user_is_named_and_not_submitted(capsys):
    line = error(capsys, "jobset", CONFIG, "--nodes=1", "--devices-per-node=1")
    assert line.startswith("frugalmoe: launch/jobset.yaml: put your own values in place of EDIT-ME, in lines ")
    numbers = [int(n) for n in line.rpartition("lines ")[2].split(", ")]
    lines = (LAUNCH / "jobset.yaml").read_text().splitlines()
    assert [lines[n - 1].split()[0] for n in numbers] == ["image:", "claimName:"]


def test_without_the_scheduler_nothing_is_written(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", os.pathsep.join(["/usr/bin", "/bin"]))
    line = error(capsys, "slurm", CONFIG, "--devices-per-node=1", f"--workdir={tmp_path}/run")
    assert "sbatch: not found on this machine" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        # 2 nodes x 3 devices = 6 do not divide the batch of 16; the config's own check, before any cluster.
        (["slurm", CONFIG, "--nodes=2", "--devices-per-node=3", "--config.train.batch_size=16"], "batch_size=16"),
        (["slurm", CONFIG, "--nodes=2", "--devices-per-node=2", "--config.mesh.data=3"], "mesh.data=3"),
        (["slurm", CONFIG, "--nodes=0", "--devices-per-node=2"], "--nodes=0"),
        (["slurm", CONFIG, "--devices-per-node=0"], "--devices-per-node=0"),
        (["slurm", "--config=configs/none.py", "--devices-per-node=1"], "configs/none.py"),
        (["slurm", CONFIG, "--devices-per-node=1", "--hosts=a"], "--hosts=a"),
        (["slurm", CONFIG, "--devices-per-node=1", "--template=none.sbatch"], "none.sbatch: No such file"),
        (["slurm", CONFIG, "--devices-per-node=1", "--workdir=runs/a b"], "must not contain spaces"),
        (["slurm", CONFIG, "--devices-per-node=1", f"--workdir=runs/{'x' * 41}"], "at most 40"),
        (["jobset", CONFIG, "--devices-per-node=1", "--workdir=/data/run"], "must lie in runs/"),
        (["skypilot", f"--config={LAUNCH.parent}/configs/quickstart.py", "--devices-per-node=1"], "in the checkout"),
        # the template's slice has 4 x 4 = 16 chips
        (["jobset-tpu", CONFIG, "--nodes=2", "--devices-per-node=4"], "gke-tpu-topology=4x4: has 16 chips"),
        (["ssh", CONFIG, "--devices-per-node=1"], "--hosts=None"),
        (["ssh", CONFIG, "--devices-per-node=1", "--hosts=a,a"], "'a' twice"),
        (["ssh", CONFIG, "--devices-per-node=1", "--hosts=-oProxyCommand=x"], "is no host"),
        (["ssh", CONFIG, "--devices-per-node=1", "--hosts=a,b", "--nodes=3"], "--nodes=3"),
    ],
)
def test_refused(capsys, argv, said):
    line = error(capsys, *argv)
    assert said in line
    assert "\n" not in line


JOB = Job(nodes=4, devices_per_node=4, train=("train",), workdir=Path("runs/x"), directory=Path("/"), hosts=("a", "b"))


@pytest.mark.parametrize(
    ("template", "old", "new", "said"),
    [
        ("slurm.sbatch", "--requeue", "--requeu", "#SBATCH --requeu: unknown; did you mean 'requeue'"),
        ("slurm.sbatch", "--ntasks-per-node=4", "--ntasks-per-node=1", "#SBATCH --ntasks-per-node='1': must be '4'"),
        ("slurm.sbatch", "source .venv", "true\n#SBATCH --qos=x\nsource .venv", "after the first command"),
        ("slurm.sbatch", "fi\n", "", "bash cannot read it"),
        ("jobset.yaml", "parallelism: 4", "parallelism: 3", "template.spec.parallelism=3: must be 4"),
        ("jobset.yaml", "completionMode: Indexed", "", "template.spec.completionMode=None: must be 'Indexed'"),
        ("jobset.yaml", "nvidia.com/gpu: 4", "nvidia.com/gpu: 8", "limits.nvidia.com/gpu=8: must be 4"),
        ("jobset.yaml", "kind: JobSet", "kind: [", "not valid YAML"),
        ("jobset.yaml", "exec train", "exec (train", "command: bash cannot read it"),
        ("skypilot.yaml", "num_nodes: 4", "nodes: 4", "nodes: unknown; did you mean 'num_nodes'"),
        ("skypilot.yaml", "recover_on_exit_codes", "exit_codes", "resources.job_recovery.exit_codes: unknown"),
        ("skypilot.yaml", "H100:4", "A100:8", "resources.accelerators='A100:8': must be 'A100:4'"),
        ("ssh.sh", "done\n", "", "bash cannot read it"),
    ],
)
def test_an_edit_that_breaks_a_template_is_found(template, old, new, said):
    check = {"slurm": checks.check_slurm, "jobset": checks.check_jobset, "skypilot": checks.check_skypilot}.get(
        template.partition(".")[0], checks.check_ssh
    )
    text = fill(LAUNCH / template, JOB)
    check(text, JOB)
    assert old in text
    with pytest.raises(UserError) as e:
        check(text.replace(old, new), JOB)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_an_unknown_word_of_a_template_is_named(tmp_path):
    (tmp_path / "t.sbatch").write_text("$nods $HOME $1 ${X:-y}\n")
    with pytest.raises(UserError, match=r"\$nods: unknown; did you mean 'nodes'"):
        fill(tmp_path / "t.sbatch", JOB)


def test_hosts_of_a_file(tmp_path):
    (tmp_path / "hosts").write_text("# ours\nnode1\n\nme@node2  # the big one\n")
    assert read_hosts(str(tmp_path / "hosts")) == ("node1", "me@node2")


# What runs in place of training: says who it is, and on SIGTERM "saves" and ends with 75, or does as it is told.
PROCESS = """
import os, signal, sys, time
flags = dict(a[2:].split("=") for a in sys.argv[1:] if "=" in a)
print(f"process {flags['process_id']} of {flags['num_processes']} at {flags['coordinator']}", flush=True)
def stop(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
for _ in range(600):
    if os.path.exists(f"fail{flags['process_id']}"): sys.exit(3)
    if os.path.exists("finish"): sys.exit(0)
    time.sleep(0.05)
"""


@pytest.fixture
def started(tmp_path):
    """ssh.sh over two hosts, where the ssh program leaves the host's name out and runs the command here."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/bash\nshift\nexec "$@"\n')
    ssh.chmod(0o755)
    job = Job(2, 1, (sys.executable, "-c", PROCESS), tmp_path / "run", tmp_path, ("me@one", "two"))
    (tmp_path / "ssh.sh").write_text(fill(LAUNCH / "ssh.sh", job))
    process = subprocess.Popen(
        ["env", "--default-signal=INT", "bash", tmp_path / "ssh.sh"],  # tests in a background job ignore it
        env=os.environ | {"SSH": str(ssh), "PORT": "1234"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    first = sorted(process.stdout.readline() for _ in range(2))
    assert first == ["[me@one] process 0 of 2 at one:1234\n", "[two] process 1 of 2 at one:1234\n"]
    with process:
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_ssh_ends_well_when_all_do(started, tmp_path):
    (tmp_path / "finish").touch()
    assert started.communicate(timeout=20) == ("", "")
    assert started.returncode == 0


def test_ssh_ends_the_others_when_one_fails(started, tmp_path):
    (tmp_path / "fail1").touch()
    out, err = started.communicate(timeout=20)
    assert out == "[me@one] saved\n"
    assert err == "[two] ended with 3; ending the others\n"
    assert started.returncode == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ssh_forwards_ctrl_c(started, number):
    os.killpg(started.pid, number)  # to the whole group, as a terminal does
    out, _ = started.communicate(timeout=20)
    assert sorted(out.splitlines()) == ["[me@one] saved", "[two] saved"]
    assert started.returncode == 75


def test_ssh_ends_all_when_it_is_killed(started):
    started.kill()
    assert sorted(started.stdout.read().splitlines()) == ["[me@one] saved", "[two] saved"]
