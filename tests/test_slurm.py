"""scripts/slurm.sh, with stand-ins for SLURM's commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "slurm.sh"
SRUN = """#!/bin/bash
echo "srun $*" >> log
trap 'echo "terminated" >> log; sleep 0.3; echo "saved" >> log; exit 143' TERM
for i in $(seq 100); do [ -e finish ] && exit 0; sleep 0.1; done
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> log
[ "$1" != show ] || echo node0
"""
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the script runs as a job."""
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in (("NNODES", "2"), ("JOB_ID", "7"), ("JOB_NODELIST", "node[0-1]"), ("SUBMIT_DIR", "here")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    return tmp_path


def start() -> subprocess.Popen[bytes]:
    job = subprocess.Popen(["bash", str(SCRIPT), "--enact"])
    deadline = time.monotonic() + 20
    while "srun" not in lines() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)  # until srun has set its trap
    return job


def lines() -> str:
    log = Path("log")
    return log.read_text() if log.exists() else ""


def test_a_job_that_finishes_is_done(job: Path) -> None:
    Path("finish").touch()
    assert start().wait(timeout=20) == 0
    assert lines().splitlines() == ["scontrol show hostnames node[0-1]", "srun here/scripts/launch.sh --enact"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(job: Path, number: int) -> None:
    script = start()
    script.send_signal(number)
    assert script.wait(timeout=20) == 143
    assert lines().splitlines()[2:] == ["terminated", "saved", "scontrol requeue 7"]
