"""scripts/launch.sh: several machines, here two agents on one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_main import TINY

from datasets import prepare_shapes

ROOT = Path(__file__).parents[1]
EPOCHS = 3
pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def in_use(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return True
        return False


def wait_until(reached: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.2)


def start_agent(folder: Path, port: int, name: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ENACT_CACHE": str(folder),
        "OMP_NUM_THREADS": "1", "NODES": "2", "GPUS": "1", "HEAD": f"127.0.0.1:{port}", "JOB": "test",
    }  # fmt: skip
    flags = [*TINY, "--epochs", str(EPOCHS), "--output_dir", str(folder / "run"), "--dist_timeout", "1"]
    with (folder / f"{name}.err").open("wb") as log:
        return subprocess.Popen(
            [str(ROOT / "scripts" / "detr.sh"), "--enact", *flags],
            stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip


def epochs_logged(folder: Path) -> list[int]:
    log = folder / "run" / "log.txt"
    return [json.loads(line)["epoch"] for line in log.read_text().splitlines()] if log.exists() else []


def kill_group(agent: subprocess.Popen[bytes]) -> None:
    """The agent, and its worker, which has a session of its own."""
    workers = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=False).stdout
    for process in (*map(int, workers.split()), agent.pid):
        os.kill(process, signal.SIGKILL)
    agent.wait()


def test_two_machines_train_as_one(tmp_path: Path) -> None:
    prepare_shapes(tmp_path, num_train=16, num_val=6)
    port = free_port()
    agents = [start_agent(tmp_path, port, "first")]
    try:
        wait_until(lambda: in_use(port), tmp_path / "first.err")  # it hosts the rendezvous
        agents.append(start_agent(tmp_path, port, "second"))
        codes = [agent.wait(timeout=200) for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                kill_group(agent)
    assert codes == [0, 0], (tmp_path / "first.err").read_text()
    assert epochs_logged(tmp_path) == list(range(EPOCHS))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["processes"] == 2
