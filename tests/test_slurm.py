"""The Slurm scripts of `examples/slurm`, as far as one machine without Slurm can tell: two tasks are two processes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from luffy_trl.runs.checkpoints import checkpoints, damage

from .conftest import HUNG, SMALL_RUN


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
# Starts the command once a task, each with its place, passes signals on, and ends with the worst status
SRUN = """#!/bin/bash
while [ "$1" != bash ] && [ "$1" != trl ]; do shift; done
[ "$1" = trl ] && exec "$@"
trap 'kill -TERM $tasks' TERM
for ((i = 0; i < SLURM_NTASKS; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
    tasks="$tasks $!"
done
worst=0
for task in $tasks; do
    wait "$task"; status=$?
    [ $status -gt 128 ] && { wait "$task"; status=$?; }  # a signal ended the waiting
    [ $status -gt $worst ] && worst=$status
done
exit $worst
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo 127.0.0.1; echo server ;;
    requeue) echo "$2" >> requeued ;;
esac
"""


TRL = """#!/bin/bash
echo "$@" > served
exec sleep 60
"""
# In place of a run of some minutes: says what it was asked for, and ends as a run does that a signal has stopped
TRAIN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
line = " ".join([os.environ["RANK"], os.environ["WORLD_SIZE"], *sys.argv[1:]])
os.write(1, f"{line}\\n".encode())  # in one piece: two write into one pipe
time.sleep(60)
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_is_sound(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.prefix) / "bin" / "shellcheck"
    result = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "--signal=" in script.read_text()


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Variables of a job of two tasks on this machine, with stand-ins for Slurm's commands."""
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "trl": TRL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NTASKS": "2", "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu", "ACCELERATE_MIXED_PRECISION": "no",
    }  # fmt: skip


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_saves_a_checkpoint_and_is_queued_again(cluster, tmp_path, tiny_model_dir):
    fields = SMALL_RUN | {"model_name_or_path": tiny_model_dir, "dataset_name": "letter_walk", "output_dir": "out"}
    fields |= {
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
        "max_steps": 1000,
    }

    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    flags = [part for name, value in fields.items() for part in (f"--{name}", value)]
    job = subprocess.Popen(
        [str(part) for part in ("bash", ROOT / "examples" / "slurm" / "zero3.sbatch", *flags)], cwd=tmp_path,
        env=cluster, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    end = time.monotonic() + 300
    while not checkpoints(tmp_path / "out"):
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.1)
    for task in psutil.Process(job.pid).children(recursive=True):
        if "train.py" in task.cmdline():  # the job's shell gets no signal
            task.terminate()
    output = job.communicate(timeout=HUNG)[0]
    assert job.returncode == 75, output
    assert (tmp_path / "requeued").read_text() == "7\n"
    [stopped, *_] = checkpoints(tmp_path / "out")
    assert f"Stopped on SIGTERM, saved {stopped.name}." in output
    assert damage(stopped) is None
    assert len(list(stopped.glob("global_step*/zero_pp_rank_*_optim_states.pt"))) == 2, "ZeRO has a part a process"


def test_the_server_lives_until_the_run_has_answered_the_signal(cluster, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    script = ROOT / "examples" / "slurm" / "zero3_vllm_server.sbatch"
    job = subprocess.Popen(
        ["bash", script, "a/model", "--config", "r.yaml"], cwd=tmp_path, env=cluster, text=True, stdout=subprocess.PIPE
    )
    said = sorted(job.stdout.readline() for _ in range(2))
    flags = "--config r.yaml --use_vllm True --vllm_mode server --vllm_server_host server --vllm_server_timeout 900"
    assert said == [f"{rank} 2 {flags} --resume_from_checkpoint auto\n" for rank in range(2)]
    job.terminate()  # the job's shell alone, as `--signal=B:` has it
    job.communicate(timeout=HUNG)
    assert job.returncode == 75
    assert (tmp_path / "requeued").read_text() == "7\n"
    assert (
        tmp_path / "served"
    ).read_text() == "vllm-serve --model a/model --data_parallel_size 8 --max_model_len 9216\n"


def test_a_server_without_a_model_is_refused(cluster, tmp_path):
    script = ROOT / "examples" / "slurm" / "zero3_vllm_server.sbatch"
    result = subprocess.run(["bash", script], cwd=tmp_path, env=cluster, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "which model? sbatch zero3_vllm_server.sbatch MODEL" in result.stderr
