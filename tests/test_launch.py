"""The templates of `launch/`: filled in they say what was asked for, bad ones are refused, and their scripts run."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from frugalmoe.cli import main
from frugalmoe.errors import UserError
from frugalmoe.launch.job import Job, fill, read_hosts
from frugalmoe.launch.schedulers import SCHEDULERS

LAUNCH = Path(__file__).parents[1] / "launch"
CONFIG = "--config=configs/quickstart.py"
TPU = "--template=launch/jobset-tpu.yaml"
WORKDIR = "runs/launched-by-a-test"  # not that of a quickstart that somebody trained in this checkout
TRAIN = f"frugalmoe train --config=configs/quickstart.py --config.train.batch_size=64 --workdir={WORKDIR}"


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(LAUNCH.parent)


def dry_run(capsys, scheduler: str, *flags: str) -> str:
    argv = [CONFIG, "--config.train.batch_size=64", "--devices-per-node=4", f"--workdir={WORKDIR}", *flags, "--dry-run"]
    assert main(["launch", scheduler, *argv]) == 0
    return capsys.readouterr().out


def error(capsys, *argv: str) -> str:
    """The line that a refused command prints."""
    assert main(["launch", *argv]) == 2
    return capsys.readouterr().err.strip()


def test_slurm(capsys):
    text = dry_run(capsys, "slurm", "--nodes=2")
    # JAX gives process i of a node device SLURM_LOCALID, so 4 devices are 4 tasks of a node.
    for option in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "requeue", "signal=TERM@120"):
        assert f"\n#SBATCH --{option}\n" in text
    assert text.startswith("#!/bin/bash\n")
    assert f"  {TRAIN}\n" in text


@pytest.mark.parametrize("flags", [(), (TPU,)], ids=["gpu", "tpu"])
def test_jobset(capsys, flags):
    jobset = yaml.safe_load(dry_run(capsys, "jobset", "--nodes=4", *flags))
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert list(container["resources"]["limits"].values()) == [4]
    assert f"exec {TRAIN}" in container["command"][2]
    # What was stopped from outside (a process that saved ends with 75) starts again as often as that happens.
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    if not flags:  # the name of the first pod, by JAX's rule (`jax._src.clusters.k8s_cluster`): JOB-0.JOBSET
        name = jobset["metadata"]["name"]
        assert f"--coordinator={name}-{replicated['name']}-0-0.{name}:" in container["command"][2]


def test_skypilot(capsys):
    task = yaml.safe_load(dry_run(capsys, "skypilot", "--nodes=2"))
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H100:4")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    assert f"exec {TRAIN} \\\n" in task["run"]


def test_ssh(capsys):
    text = dry_run(capsys, "ssh", "--hosts=node1,me@node2")
    assert "HOSTS=(node1 me@node2)\n" in text
    assert f"cd {Path.cwd()} && " in text


def test_what_waits_for_the_user_is_named_and_not_submitted(capsys):
    line = error(capsys, "jobset", CONFIG, "--devices-per-node=1")
    assert line.startswith("frugalmoe: launch/jobset.yaml: put your own values in place of EDIT-ME, in lines ")
    numbers = [int(n) for n in line.rpartition("lines ")[2].split(", ")]
    lines = (LAUNCH / "jobset.yaml").read_text().splitlines()
    assert [lines[n - 1].split()[0] for n in numbers] == ["image:", "claimName:"]


def test_without_the_scheduler_nothing_is_written(capsys, monkeypatch, tmp_path):
    (tmp_path / "bash").symlink_to(shutil.which("bash"))
    monkeypatch.setenv("PATH", str(tmp_path))
    line = error(capsys, "slurm", CONFIG, "--devices-per-node=1", f"--workdir={tmp_path}/runs/x")
    assert "sbatch: not found on this machine" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["slrum", CONFIG, "--devices-per-node=1"], "slrum: unknown scheduler; did you mean 'slurm'? valid: jobset, "),
        # 2 nodes x 3 devices = 6 do not divide the batch of 16; the config's own check, before any cluster.
        (["slurm", CONFIG, "--nodes=2", "--devices-per-node=3", "--config.train.batch_size=16"], "batch_size=16"),
        (["slurm", CONFIG, "--nodes=0", "--devices-per-node=2"], "--nodes=0"),
        (["slurm", CONFIG, f"--nodes={10**30}", "--devices-per-node=2", "--config.mesh.expert=3"], "from 1 to 100000"),
        (["slurm", CONFIG, "--devices-per-node=0"], "--devices-per-node=0"),
        (["slurm", "--config=configs/none.py", "--devices-per-node=1"], "configs/none.py"),
        (["slurm", CONFIG, "--devices-per-node=1", "--hosts=a"], "--hosts=a"),
        (
            ["slurm", CONFIG, "--devices-per-node=1", "--template=none.sbatch"],
            "--template=none.sbatch: no such template; ",
        ),
        (["slurm", CONFIG, "--devices-per-node=1", "--workdir=runs/a b"], "must not contain spaces"),
        (["slurm", CONFIG, "--devices-per-node=1", f"--workdir=runs/{'x' * 41}"], "at most 40"),
        (["jobset", CONFIG, "--devices-per-node=1", "--workdir=/data/run"], "must lie in runs/"),
        (["skypilot", f"--config={LAUNCH.parent}/configs/quickstart.py", "--devices-per-node=1"], "in the checkout"),
        # the template's slice has 4 x 4 = 16 chips
        (["jobset", CONFIG, TPU, "--nodes=2", "--devices-per-node=4"], "gke-tpu-topology=4x4: has 16 chips"),
        (["ssh", CONFIG, "--devices-per-node=1"], "--hosts=None"),
        (["ssh", CONFIG, "--devices-per-node=1", "--hosts="], "names no host"),
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
        ("slurm.sbatch", "--nodes=4", "--nodes=2", "#SBATCH --nodes='2': must be '4'"),
        ("slurm.sbatch", "--ntasks-per-node=4", "--ntasks-per-node=1", "#SBATCH --ntasks-per-node='1': must be '4'"),
        ("slurm.sbatch", "export PATH", "true\n#SBATCH --mem=0\nexport PATH", "#SBATCH --mem=0: stands after"),
        ("slurm.sbatch", "then\n", "\n", "the script: bash cannot read it"),
        ("jobset.yaml", "completions: 4", "completions: 2", "completions=2: must be 4"),
        ("jobset.yaml", "gpu: 4", "gpu: 8", "nvidia.com/gpu=8: must be 4"),
        ("jobset.yaml", "kind: JobSet", "kind: {", "not valid YAML"),
        ("jobset.yaml", "exec train", "exec (train", "command: bash cannot read it"),
        ("skypilot.yaml", "num_nodes: 4", "num_nodes: 1", "num_nodes=1: must be 4"),
        ("skypilot.yaml", "H100:4", "A100:8", "resources.accelerators='A100:8': must be 'A100:4'"),
        ("ssh.sh", "done\n", "", "bash cannot read it"),
    ],
)
def test_an_edit_that_breaks_a_template_is_found(template, old, new, said):
    check = SCHEDULERS[template.partition(".")[0]].check
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


def program(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/bash", *lines)) + "\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(("status", "requeued"), [(75, "requeue 7\n"), (0, ""), (3, "")])
def test_slurm_requeues_what_was_saved(tmp_path, status, requeued):
    program(tmp_path / "srun", f"exit {status}")
    program(tmp_path / "scontrol", 'echo "$@"')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "1"}
    script = fill(LAUNCH / "slurm.sbatch", JOB)
    done = subprocess.run(["bash"], input=script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, requeued, "")


@pytest.mark.slow
def test_submits_the_file_beside_the_run(tmp_path):
    program(tmp_path / "sbatch", 'echo "submitted $(head -n 1 "$1")"', "exit 5")
    command = [sys.executable, "-m", "frugalmoe.cli", "launch", "slurm", CONFIG, "--devices-per-node=1"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/runs/x"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    file = tmp_path / "runs/x.slurm.sbatch"
    assert (done.returncode, done.stdout) == (5, f"sbatch {file}\nsubmitted #!/bin/bash\n")
    assert [p.name for p in file.parent.iterdir()] == [file.name]


# What runs in place of training: says who it is, and on SIGTERM "saves" and ends with 75, or does as it is told.
PROCESS = """
import os, signal, sys, time
def stop(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
flags = dict(a[2:].split("=") for a in sys.argv[1:] if "=" in a)
print(f"process {flags['process-id']} of {flags['num-processes']} at {flags['coordinator']}", flush=True)
for _ in range(600):
    if os.path.exists(f"fail{flags['process-id']}"): sys.exit(3)
    if os.path.exists("finish"): sys.exit(0)
    time.sleep(0.05)
"""


@pytest.fixture
def started(tmp_path):
    """ssh.sh over two hosts, where the ssh program runs the command here, out of reach of this terminal's signals."""
    ssh = program(tmp_path / "ssh", 'exec setsid --wait env --default-signal=INT,TERM,HUP "${@:2}"')
    job = Job(2, 1, (sys.executable, "-c", PROCESS), tmp_path / "run", tmp_path, ("me@one", "two"))
    (tmp_path / "ssh.sh").write_text(fill(LAUNCH / "ssh.sh", job))
    process = subprocess.Popen(
        ["env", "--default-signal=INT,HUP", "bash", tmp_path / "ssh.sh"],  # which tests in a background job ignore
        env=os.environ | {"SSH": str(ssh), "PORT": "1234", "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            first = sorted(process.stdout.readline() for _ in range(2))
            assert first == ["[me@one] process 0 of 2 at one:1234\n", "[two] process 1 of 2 at one:1234\n"]
            yield process
        finally:
            process.kill()  # no more than a second later its hosts' processes have ended


def test_ssh_ends_well_when_all_do(started, tmp_path):
    (tmp_path / "finish").touch()
    assert started.communicate(timeout=20) == ("", "")
    assert started.returncode == 0
    assert not list(tmp_path.glob("tmp.*"))


def test_ssh_ends_the_others_when_one_fails(started, tmp_path):
    (tmp_path / "fail1").touch()
    out, err = started.communicate(timeout=20)
    assert out == "[me@one] saved\n"
    assert err == "[two] ended with 3; ending the others\n"
    assert started.returncode == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ssh_tells_all_to_stop(started, number):
    os.killpg(started.pid, number)  # to the whole group, as a terminal does
    out, _ = started.communicate(timeout=20)
    assert sorted(out.splitlines()) == ["[me@one] saved", "[two] saved"]
    assert started.returncode == 75


@pytest.mark.slow
def test_ssh_ends_all_when_it_is_killed(started):
    started.kill()
    started.wait()
    assert sorted(started.stdout.read().splitlines()) == ["[me@one] saved", "[two] saved"]
