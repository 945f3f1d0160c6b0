"""The table of finished runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tools.results import main, to_markdown


def write_run(folder: Path, enact: str | None, seed: int, ap: float, **fields: str) -> Path:
    folder.mkdir()
    config = {"model": "detr", "enact": enact, "seed": seed, "pooling": None, "token_order": "raster", **fields}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = [{"train_seconds": seconds, "n_parameters": 7} for seconds in (2.0, 4.0, 3.0)]
    records[-1]["test_loss"] = 20 * ap
    records[-1]["test_coco_eval_bbox"] = [ap, 2 * ap, 0, 0.1, 0.2, -1, *[0] * 6]  # type: ignore[assignment]
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "environment.json").write_text(json.dumps({"device": "an abacus"}))
    return folder


def test_runs_that_differ_in_their_seed_share_a_row(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", None, 1, 0.2), write_run(tmp_path / "b", None, 2, 0.3)]
    runs.append(write_run(tmp_path / "c", "paper", 1, 0.25))
    runs.append(write_run(tmp_path / "d", "paper", 1, 0.1, pooling="mean"))
    assert main([*map(str, runs), "--output", str(tmp_path / "out" / "table")]) == 0
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()[2:]
    figures = "25.0 (20.0 to 30.0) | 50.0 (40.0 to 60.0) | 10.0 | 20.0 | 5.00 | 3 | 2.0"
    assert rows[0] == f"| detr | dense | 2 | {figures} |"
    assert rows[1].startswith("| detr | ENACT paper | 1 | 25.0")
    assert rows[2].startswith("| detr | ENACT paper, pooling mean | 1 | 10.0")
    saved = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [run["AP50"] for run in saved] == [0.4, 0.6, 0.5, 0.2]
    assert saved[0]["environment"] == {"device": "an abacus"}
    del saved[1]["loss"]  # as in older tables
    assert to_markdown(saved).splitlines()[2].endswith("| 20.0 | - | 3 | 2.0 |")


def test_a_folder_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--output", str(tmp_path / "table")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
