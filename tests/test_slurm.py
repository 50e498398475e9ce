"""A cluster of one node on this machine: two tasks train under srun, are told to stop, requeued, and go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from lit_unlearn.edits.checkpoint import read_edit
from lit_unlearn.emoji.judge import JudgeTraining
from lit_unlearn.system.run_file import read_run

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "configs" / "slurm"
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=10
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=5
MinJobAge=300
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=10 State=UP
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(shutil.which(name) is None for name in DAEMONS) or os.geteuid() != 0,
        reason="needs root and the Debian packages slurm-wlm and munge",
    ),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Environment in which ``sbatch`` finds a cluster of this machine alone."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # munge wants every folder above its socket open to all
    folder.chmod(0o755)
    for name in ("state", "spool", "log", "run"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "run" / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, host=host, port=free_port(), node_port=free_port()),
        encoding="utf-8",
    )
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    run = folder / "run"
    munged = ["munged", "--foreground", f"--key-file={key}", f"--socket={run}/munge.socket", "--num-threads=2"]
    munged += [f"--pid-file={run}/munged.pid", f"--log-file={folder}/log/munged.log", f"--seed-file={run}/seed"]
    commands = [munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", host]]
    daemons = []
    try:
        for command in commands:
            daemons.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )
            time.sleep(0.5)
        wait_for(lambda: "idle" in output(["sinfo", "-h", "-o", "%T"], environment), 30, "an idle node")
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def output(command: list[str], environment: dict[str, str]) -> str:
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    return result.stdout


def wait_for(condition: object, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.2)


def job_state(job: str, environment: dict[str, str]) -> dict[str, str]:
    text = output(["scontrol", "show", "job", job, "--oneliner"], environment)
    return dict(item.split("=", 1) for item in text.split() if "=" in item)


@pytest.fixture
def long_recipe(tmp_path: Path, tiny_sd: Path) -> Path:
    """Some seconds of steps on a tiny model, so that there is a middle to be told to stop in."""
    JudgeTraining(width=8).save_pretrained(tmp_path / "judge")
    content = {
        "method": "null_space",
        "concept": "dog",
        "trainer": {
            "accelerator": "cpu",
            "enable_model_summary": False,
            "callbacks": [{"class_path": "EvaluationReport"}],
        },
        "edit": {"class_path": "NullSpace", "init_args": {"threshold": 0.1, "minimum": 4}},
        "model": {
            "class_path": "ValueRefinement",
            "init_args": {"model": str(tiny_sd), "judge": str(tmp_path / "judge"), "num_inference_steps": 2},
        },
        "data": {"class_path": "ConceptPrompts", "init_args": {"steps": 80, "batch_size": 4, "images_per_prompt": 1}},
    }
    path = tmp_path / "long.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def script(tmp_path: Path) -> Path:
    """``run.sbatch`` as it ships, without what this machine lacks (GPUs, time)."""
    text = (SCRIPTS / "run.sbatch").read_text(encoding="utf-8")
    for option in ("--gpus-per-node=1", "--cpus-per-task=8", "--time=02:00:00"):
        assert f"#SBATCH {option}" in text
        text = text.replace(f"#SBATCH {option}", "#SBATCH --mem=100" if "gpus" in option else "#")
    text = text.replace("--ntasks-per-node=1 ", "--ntasks-per-node=2 ")
    text = re.sub(r"^(srun \S+) lit-unlearn", rf"\1 {sys.executable} -m lit_unlearn", text, flags=re.MULTILINE)
    path = tmp_path / "run.sbatch"
    path.write_text(text, encoding="utf-8")
    return path


def submit(tmp_path: Path, recipe: Path, root: str, environment: dict[str, str]) -> str:
    # Its node's name need not resolve here; on a cluster it does.
    exports = {**environment, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = ["sbatch", "--parsable", f"--chdir={tmp_path}", f"--output={tmp_path}/{root}.out", str(script(tmp_path))]
    command += ["--config", str(recipe), "--trainer.default_root_dir", root]
    return output(command, exports).strip()


def test_a_job_that_is_told_to_stop_is_requeued_and_ends_with_the_same_weights(
    cluster: dict[str, str], long_recipe: Path, tmp_path: Path
) -> None:
    def text(root: str) -> str:
        path = tmp_path / f"{root}.out"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    run = Path("null_space", "dog", "version_0")
    whole = submit(tmp_path, long_recipe, "whole", cluster)
    wait_for(lambda: job_state(whole, cluster)["JobState"] in ("COMPLETED", "FAILED"), 240, "the whole job")
    assert job_state(whole, cluster)["JobState"] == "COMPLETED", text("whole")
    assert read_run(tmp_path / "whole" / run)["state"] == "finished"
    assert "MEMBER: 2/2" in text("whole")  # two tasks, one run

    job = submit(tmp_path, long_recipe, "stopped", cluster)
    # Once the first layer is written the second is at work.
    checkpoint = tmp_path / "stopped" / run / "checkpoints" / "last.ckpt"
    wait_for(checkpoint.exists, 180, "the first layer's checkpoint")
    output(["scancel", "--signal=USR1", job], cluster)
    wait_for(lambda: "Requeued the SLURM job" in text("stopped"), 60, "the job to be requeued")
    assert read_run(tmp_path / "stopped" / run)["state"] == "running"
    assert "Told to stop: saved" in text("stopped")
    wait_for(lambda: job_state(job, cluster)["Restarts"] == "1", 60, "the second start")
    wait_for(lambda: job_state(job, cluster)["JobState"] in ("COMPLETED", "FAILED"), 240, "the requeued job")
    assert job_state(job, cluster)["JobState"] == "COMPLETED", text("stopped")
    assert "which was interrupted" in text("stopped")
    assert read_run(tmp_path / "stopped" / run)["state"] == "finished"
    first, second = (
        read_edit(tmp_path / root / run / "checkpoints/last.ckpt").weights for root in ("whole", "stopped")
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    scores = [
        json.loads((tmp_path / root / run / "scores.json").read_text(encoding="utf-8")) for root in ("whole", "stopped")
    ]
    for content in scores:
        content.pop("cost")
        content["edit"].pop("solve_seconds")
    assert scores[0] == scores[1]
