"""tools/ablation.py: the arms, and what is made of their runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_results_table import write_run

from configs.cli import parse_args
from tools import ablation


def test_it_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, ablation.__file__, "--help"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "plus_hilbert" in done.stdout


@pytest.mark.parametrize("arm", ablation.ARMS)
def test_an_arm_is_a_configuration_of_its_own(arm: str) -> None:
    configs = {name: parse_args(flags) for name, flags in ablation.ARMS.items()}
    assert sum(config == configs[arm] for config in configs.values()) == 1


def test_finished_runs_are_not_run_again_and_make_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, trained = tmp_path / "runs", []
    runs.mkdir()
    write_run(runs / "dense_1", None, 1, 0.3)
    (runs / "dense_1" / "detections.png").touch()

    def train(arm: str, seed: int, folder: Path, flags: list[str], single_thread: bool) -> bool:
        trained.append((arm, seed, flags, single_thread))
        if arm == "plus":
            return False
        (write_run(folder, arm, seed, 0.2) / "detections.png").touch()
        return True

    monkeypatch.setattr(ablation, "train", train)
    output = tmp_path / "table"
    arguments = ["--arms", "dense", "paper", "plus", "--seeds", "1", "--output_dir", str(runs), "--output", str(output)]
    assert ablation.main([*arguments, "--", "--epochs", "2"]) == 1
    assert trained == [("paper", 1, ["--epochs", "2"], False), ("plus", 1, ["--epochs", "2"], False)]
    assert [run["enact"] for run in json.loads(output.with_suffix(".json").read_text())] == [None, "paper"]
    assert output.with_suffix(".png").stat().st_size > 5000
    assert ablation.main(["--arms", "dense", "--seeds", "1", *arguments[6:]]) == 0
