"""scripts/launch.sh: several machines, here two agents on one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_main import TINY

from datasets import prepare_shapes

ROOT = Path(__file__).parents[1]
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


def wait_until(reached: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline, said(folder)[-2000:]
        time.sleep(0.2)


def start_agent(folder: Path, port: int, name: str, epochs: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "ENACT_CACHE": str(folder),
        "OMP_NUM_THREADS": "1", "NODES": "2", "GPUS": "1", "HEAD": f"127.0.0.1:{port}", "JOB": "test",
    }  # fmt: skip
    flags = [*TINY, "--epochs", str(epochs), "--output_dir", str(folder / "run"), "--dist_timeout", "1"]
    with (folder / f"{name}.err").open("wb") as log:
        return subprocess.Popen(
            [str(ROOT / "scripts" / "detr.sh"), "--enact", *flags],
            stdout=log, stderr=log, env=environment, start_new_session=True,
        )  # fmt: skip


def start_two(folder: Path, port: int, agents: list[subprocess.Popen[bytes]], epochs: int) -> None:
    """The first hosts the rendezvous, the second joins it."""
    prepare_shapes(folder, num_train=16, num_val=6)
    agents.append(start_agent(folder, port, "first", epochs))
    wait_until(lambda: in_use(port), folder)
    agents.append(start_agent(folder, port, "second", epochs))


def said(folder: Path) -> str:
    return "".join(log.read_text() for log in sorted(folder.glob("*.err")))


def epochs_logged(folder: Path) -> list[int]:
    log = folder / "run" / "log.txt"
    return [json.loads(line)["epoch"] for line in log.read_text().splitlines()] if log.exists() else []


def kill_group(agent: subprocess.Popen[bytes]) -> None:
    """The agent, and its worker, which has a session of its own."""
    workers = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=False).stdout
    for process in (*map(int, workers.split()), agent.pid):
        os.kill(process, signal.SIGKILL)
    agent.wait()


@pytest.fixture
def agents() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Those that a test starts; none is left behind."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for agent in started:
        if agent.poll() is None:
            kill_group(agent)


def test_two_machines_train_as_one(tmp_path: Path, agents: list[subprocess.Popen[bytes]]) -> None:
    start_two(tmp_path, free_port(), agents, epochs=3)
    codes = [agent.wait(timeout=200) for agent in agents]
    assert codes == [0, 0], said(tmp_path)
    assert epochs_logged(tmp_path) == list(range(3))
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["processes"] == 2


def test_a_machine_that_dies_and_comes_back_goes_on_from_the_last_checkpoint(
    tmp_path: Path, agents: list[subprocess.Popen[bytes]]
) -> None:
    port, epochs = free_port(), 30
    start_two(tmp_path, port, agents, epochs)
    wait_until(lambda: len(epochs_logged(tmp_path)) >= 3, tmp_path)
    kill_group(agents.pop())
    assert len(epochs_logged(tmp_path)) < epochs
    agents.append(start_agent(tmp_path, port, "third", epochs))
    codes = [agent.wait(timeout=200) for agent in agents]
    assert codes == [0, 0], said(tmp_path)
    assert epochs_logged(tmp_path) == list(range(epochs))
    assert "resumed" in said(tmp_path)
