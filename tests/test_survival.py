"""Runs that are stopped, killed, or run out of room, and go on as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_main import ROOT, TINY, log_of, run, torchrun
from torch.testing import assert_close

import main as command
from datasets import EpochBatches
from util import checkpoint
from util.errors import InputError
from util.step_guard import Outcome

pytestmark = pytest.mark.usefixtures("empty_folder")
# Dropout, augmentation, accumulation that does not divide the epoch, and a rate that drops in the second epoch.
HARD = ["--dropout", "0.2", "--accumulate", "3", "--lr_drop", "1", "--batch_size", "2"]


def saved(folder: str, name: str = checkpoint.LATEST) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(Path(folder) / name, weights_only=True)
    return state


def assert_same_run(one: str, other: str) -> None:
    """Weights, optimizer, schedule, random states, counters and log, bit for bit."""
    first, second = saved(one), saved(other)
    for state in (first, second):
        del state["config"], state["commit"], state["position"]
        for record in state["records"]:
            del record["train_seconds"]
        for process in state["random_states"]:
            assert process["numpy"].pop(0) == "MT19937"  # assert_close does not take words
        assert state.pop("class_names")[1] == "circle"
    for key in first.keys() | second.keys():
        assert_close(first[key], second[key], rtol=0, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    assert log_of(one) == log_of(other)
    assert [record["epoch"] for record in log_of(one)] == list(range(len(first["records"])))


def stop_at_step(step: int, number: int, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """A run that gets a signal just after its step `step`; its exit status."""
    account = command.Run.account

    def interrupted(self: command.Run, outcome: Outcome[Any], bar: Any) -> None:
        account(self, outcome, bar)
        if self.state.steps == step:
            signal.raise_signal(number)

    with monkeypatch.context() as patched:
        patched.setattr(command.Run, "account", interrupted)
        return run(*flags)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_run_after_a_step_and_resuming_is_an_uninterrupted_run(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*HARD, *(["--enact", "--num_workers", "1"] if number == signal.SIGTERM else [])]
    assert run("--output_dir", "whole", *flags) == 0
    assert len(saved("whole")["records"]) == 2
    status = 130 if number == signal.SIGINT else 143
    # The second stop is after the first batches of the second epoch, of a run that was stopped before.
    assert stop_at_step(1, number, monkeypatch, "--output_dir", "stopped", *flags) == status
    assert saved("stopped")["position"]["batches"] == 6
    assert saved("stopped")["records"] == []
    again = ("--output_dir", "stopped", "--resume", "auto", *flags)
    torch.manual_seed(1234)  # whatever happened in between
    assert stop_at_step(4, number, monkeypatch, *again) == status
    assert (saved("stopped")["epoch"], saved("stopped")["position"]["batches"]) == (0, 6)
    assert run(*again) == 0
    assert_same_run("stopped", "whole")


def test_ctrl_c_outside_an_epoch_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--output_dir", "whole") == 0
    with monkeypatch.context() as patched:
        patched.setattr(command.Run, "evaluate", lambda self: signal.raise_signal(signal.SIGINT))
        assert run("--output_dir", "stopped") == 130
    assert len(saved("stopped")["records"]) == 1
    assert run("--output_dir", "stopped", "--resume", "auto") == 0
    assert_same_run("stopped", "whole")


def test_a_second_signal_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self: command.Run, *_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command.Run, "account", twice)
    assert run("--output_dir", "stopped") == 130
    assert not Path("stopped/checkpoint.pth").exists()


def test_signals_have_their_usual_effect_outside_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler of ours would wait for a process that hangs in a collective call."""
    seen, evaluate = [], command.Run.evaluate

    def look(self: command.Run) -> dict[str, Any]:
        seen.append(signal.getsignal(signal.SIGTERM))
        return evaluate(self)

    monkeypatch.setattr(command.Run, "evaluate", look)
    assert run("--epochs", "1", "--output_dir", "run") == 0
    assert seen == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_last_two_checkpoints_the_best_and_the_milestones_stay() -> None:
    assert run("--output_dir", "run", "--epochs", "3", "--keep_every", "2") == 0
    names = {path.name for path in Path("run").glob("*.pth")}
    assert names == {"checkpoint.pth", "checkpoint_previous.pth", "checkpoint_best.pth", "checkpoint0001.pth"}
    assert saved("run", "checkpoint0001.pth")["epoch"] == 1
    assert command.SCORES in saved("run", "checkpoint0001.pth")["records"][-1]
    scores = [record[command.SCORES][0] for record in log_of("run")]
    assert saved("run", "checkpoint_best.pth")["epoch"] == scores.index(max(scores))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output_dir", "whole") == 0
    assert run("--output_dir", "hurt", "--checkpoint_steps", "1") == 0
    latest = Path("hurt/checkpoint.pth")
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1
    latest.write_bytes({"cut": bytes(content[:-100]), "flipped": bytes(content), "empty": b""}[damage])
    capsys.readouterr()
    assert run("--output_dir", "hurt", "--resume", "auto") == 0
    assert "passed over" in capsys.readouterr().err
    assert_same_run("hurt", "whole")


def test_without_a_whole_checkpoint_nothing_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output_dir", "run") == 0
    for name in (checkpoint.LATEST, checkpoint.PREVIOUS):
        Path("run", name).write_bytes(b"PK")
    assert run("--output_dir", "run", "--resume", "auto") == 2
    assert "no checkpoint of run is whole" in capsys.readouterr().err


def test_what_a_dead_process_left_is_removed() -> None:
    Path("run").mkdir()
    leftovers = [Path("run", f".checkpoint{name}.pth.abc123.tmp") for name in ("", "_previous", "_best", "0003")]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    Path("run/.other.tmp").write_bytes(b"not ours")
    assert run("--output_dir", "run", "--epochs", "1") == 0
    assert not any(leftover.exists() for leftover in leftovers)
    assert Path("run/.other.tmp").exists()


def test_a_checkpoint_of_the_first_layout_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--output_dir", "whole") == 0
    assert run("--output_dir", "old", "--epochs", "1") == 0
    state = saved("old")
    state["random_states"] = [{"cpu": one["cpu"]} for one in state["random_states"]]
    kept = ("model", "optimizer", "lr_scheduler", "epoch", "records", "random_states", "config")
    old = {key: state[key] for key in kept}
    torch.save(old, "old/checkpoint.pth")
    assert run("--output_dir", "old", "--resume", "auto") == 0
    assert_close(saved("old")["model"], saved("whole")["model"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"layout": 3}, "layout 3"), ({"layout": "x"}, "layout 'x'"), ({"optimizer": {}}, "training state"),
     ({"records": 5}, "training state"), ({"random_states": None}, "training state"), ({"position": {}}, "position")],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_says_why(
    change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output_dir", "run", "--epochs", "1") == 0
    torch.save(saved("run") | change, "run/checkpoint.pth")
    capsys.readouterr()
    assert run("--output_dir", "run", "--resume", "run/checkpoint.pth") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: run/checkpoint.pth: ")
    assert message in error or message == "position"


def test_other_settings_are_named_when_a_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output_dir", "run", "--epochs", "1") == 0
    capsys.readouterr()
    assert run("--output_dir", "run", "--epochs", "2", "--lr", "0.5", "--resume", "auto") == 0
    error = capsys.readouterr().err
    assert "epochs 1 -> 2, lr 0.0001 -> 0.5" in " ".join(error.split()) or "lr 0.0005 -> 0.5" in error
    assert log_of("run")[1]["train_lr"] < 0.01


def killed(kills: int, seed: int, name: str, folder: str, *flags: str) -> list[int]:
    """Statuses of the runs that tests/killed_runs.py made."""
    words = [sys.executable, str(ROOT / "tests" / "killed_runs.py"), name, str(kills), str(seed)]
    done = subprocess.run(
        [*words, *TINY, *flags, "--output_dir", folder],
        capture_output=True, text=True, timeout=500, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    statuses: list[int] = json.loads(done.stdout)
    return statuses


def long_run(kills: int) -> list[str]:
    """Flags of a run long enough to be killed so often: it saves after every second step."""
    return [*HARD, "--enact", "--accumulate", "1", "--checkpoint_steps", "2", "--epochs", str(2 * kills)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_run_killed_twenty_times_ends_as_one_never_killed(name: str) -> None:
    statuses = killed(20, 2, name, "killed", *long_run(20))
    killed_at_once, after_a_step = statuses.count(-signal.Signals[name]), statuses.count(143)
    assert killed_at_once + after_a_step >= 15, statuses
    assert after_a_step >= 5 or name == "SIGKILL", statuses
    assert killed(0, 0, name, "whole", *long_run(20)) == [0]
    assert_same_run("killed", "whole")
    assert not list(Path("killed").glob(".*.tmp"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB, where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    mounted = subprocess.run(words, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_loses_nothing(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--checkpoint_steps", "1", "--epochs", "2"]
    assert run("--output_dir", "whole", *flags) == 0
    size = Path("whole/checkpoint.pth").stat().st_size
    folder = small_disk / "run"
    folder.mkdir()
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2**23 - int(3.5 * size) - 50_000))  # room for two checkpoints, not for four
    assert run("--output_dir", str(folder), *flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "No space left on device" in errors[0]
    assert "--resume auto" in errors[0]
    ballast.unlink()
    status, rounds = 2, 0
    while status and rounds < 3:
        status, rounds = run("--output_dir", str(folder), *flags, "--resume", "auto"), rounds + 1
    assert status == 0
    assert_same_run(str(folder), "whole")


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.LATEST
    checkpoint.save({"model": {"a": torch.zeros(3)}}, path)
    before = path.read_bytes()
    with pytest.raises(InputError, match="cannot write"):
        checkpoint.save({"model": {"a": torch.zeros(3), "b": lambda: None}}, tmp_path / "no" / checkpoint.LATEST)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.LATEST]


def test_names_are_given_without_hard_links_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(self: Path, target: Path) -> None:
        raise OSError(38, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", no_links)
    for value in (1, 2):
        checkpoint.save({"model": {}, "value": value}, tmp_path / checkpoint.LATEST)
    assert checkpoint.load(tmp_path / checkpoint.LATEST)["value"] == 2
    assert checkpoint.load(tmp_path / checkpoint.PREVIOUS)["value"] == 1


def test_a_name_given_twice_leaves_no_third_file(tmp_path: Path) -> None:
    path, name = tmp_path / checkpoint.LATEST, tmp_path / checkpoint.BEST
    checkpoint.save({"model": {}}, path)
    for _ in range(2):
        checkpoint.give_name(path, name)
    assert {file.name for file in tmp_path.iterdir()} == {checkpoint.LATEST, checkpoint.BEST}


@pytest.mark.slow
def test_another_number_of_processes_goes_on_and_says_that_the_order_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stop_at_step(1, signal.SIGTERM, monkeypatch, "--output_dir", "run", "--batch_size", "4") == 143
    assert saved("run")["position"]["batches"] == 2
    done = torchrun(2, "--output_dir", "run", "--batch_size", "4", "--resume", "auto")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "batches have 8 images over all processes, they had 4" in done.stderr
    assert len(log_of("run")) == 2
    assert len(saved("run")["random_states"]) == 2


@contextlib.contextmanager
def launched(folder: str, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """A run of two processes that torchrun starts again when one dies."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=9"]
    with Path(f"{folder}.err").open("a") as log:
        agent = subprocess.Popen(
            [sys.executable, *launch, str(ROOT / "main.py"), *TINY, *flags, "--output_dir", folder, "--resume", "auto"],
            stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        yield agent
    finally:
        agent.kill()
        agent.wait()


def workers_of(agent: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in found.split()]


def wait_for_steps(folder: str, more_than: int) -> int:
    """Wait until a checkpoint has seen more steps; how many."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            steps = int(saved(folder)["steps"])
            if steps > more_than:
                return steps
        time.sleep(0.1)
    pytest.fail(Path(f"{folder}.err").read_text()[-3000:])


@pytest.mark.slow
def test_two_processes_killed_and_terminated_end_as_two_never_stopped() -> None:
    flags = ["--enact", "--dropout", "0.2", "--batch_size", "1", "--epochs", "12", "--checkpoint_steps", "1",
             "--eval_every", "12"]  # fmt: skip
    with launched("whole", *flags) as agent:
        assert agent.wait(timeout=300) == 0, Path("whole.err").read_text()[-3000:]
    moments, steps = random.Random(3), 0
    with launched("stopped", *flags) as agent:
        for victim in (0, 1, 1):  # torchrun starts both again
            steps = wait_for_steps("stopped", steps + 8)
            time.sleep(moments.uniform(0, 0.5))
            os.kill(workers_of(agent)[victim], signal.SIGKILL)
        steps = wait_for_steps("stopped", steps + 8)
        agent.send_signal(signal.SIGTERM)  # as a scheduler does
        assert agent.wait(timeout=60) != 0
    said = Path("stopped.err").read_text()
    assert said.count("stopped by SIGTERM; --resume auto goes on") in (0, 2)  # 0: between two epochs
    before = saved("stopped")["steps"]
    assert steps <= before < 12 * 8
    with launched("stopped", *flags) as agent:
        assert agent.wait(timeout=300) == 0, Path("stopped.err").read_text()[-3000:]
    assert_same_run("stopped", "whole")


@pytest.mark.slow
def test_an_error_in_one_process_ends_both_with_its_reason() -> None:
    """The second process alone meets a photograph that is broken."""
    source = next(folder for folder in Path(os.environ["ENACT_CACHE"]).iterdir() if folder.name.startswith("shapes"))
    shutil.copytree(source, "data")
    order = EpochBatches(16, 4, seed=42, rank=1, world_size=2)
    (_, index), *_ = next(iter(order))
    photograph = sorted(Path("data/train2017").iterdir())[index]
    photograph.write_bytes(photograph.read_bytes()[:200])
    small = ["--config", str(ROOT / "configs/shapes.yaml"), "--coco_path", "data", "--dist_timeout", "1"]
    start = time.monotonic()
    done = torchrun(2, *small, "--output_dir", "run")
    assert done.returncode != 0
    assert f"[rank 1] error: data/train2017/{photograph.name}" in done.stderr
    assert time.monotonic() - start < 100


@pytest.mark.slow
def test_processes_with_nothing_to_learn_or_see_take_part() -> None:
    """Three processes, two training images of which one has no objects, one validation image."""
    source = next(folder for folder in Path(os.environ["ENACT_CACHE"]).iterdir() if folder.name.startswith("shapes"))
    shutil.copytree(source, "data")
    for split, count in (("train2017", 2), ("val2017", 1)):
        file = Path("data/annotations") / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["images"] = content["images"][:count]
        known = [content["images"][0]["id"]]
        content["annotations"] = [found for found in content["annotations"] if found["image_id"] in known]
        file.write_text(json.dumps(content))
    small = ["--config", str(ROOT / "configs/shapes.yaml"), "--coco_path", "data", "--batch_size", "1"]
    done = torchrun(3, *small, "--output_dir", "run", "--enact")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(log_of("run")) == 2
    assert all(record["train_loss"] > 0 for record in log_of("run"))
