"""Make the table of finished runs: python tools/results.py outputs/* --output results/shapes

Reads log.txt and environment.json of each run and groups runs that differ only in their seed. It writes OUTPUT.json
(every figure, with device, versions, commit and command) and OUTPUT.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import ENACT_CHOICES
from datasets.json_files import read_json
from tools.commands import one_line_errors
from util.errors import InputError
from util.files import regular_size
from util.yaml_files import read_yaml

COLUMNS = ("AP", "AP50", "APS", "APM", "APL")
POSITIONS = (0, 1, 3, 4, 5)  # of COLUMNS among COCO's twelve figures


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of finished runs")
    parser.add_argument("--output", type=Path, required=True, help="the files to write, without suffix")
    options = parser.parse_args(argv)
    runs = [read_run(folder) for folder in options.runs]
    write_table(runs, options.output)
    return 0


def write_table(runs: list[dict[str, Any]], output: Path) -> None:
    """OUTPUT.json and OUTPUT.md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(runs, indent=1) + "\n")
    output.with_suffix(".md").write_text(to_markdown(runs))


def read_run(folder: Path) -> dict[str, Any]:
    """What a run's folder says of it (InputError: it is not that of a finished run)."""
    try:
        return _read_run(folder)
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise InputError(f"{folder} is not the folder of a finished run: {' '.join(str(error).split())}") from None


def read_table(path: Path) -> list[dict[str, Any]]:
    """What `write_table` wrote (InputError: it is no such file)."""
    runs = read_json(path)
    columns = {"model", "enact", "choices", "epochs", "seconds_fastest_epoch", *COLUMNS}
    if not isinstance(runs, list) or not all(isinstance(run, dict) and columns <= run.keys() for run in runs):
        raise InputError(f"{path} is no table of runs, as tools/results.py and tools/ablation.py write it")
    return runs


def _read_run(folder: Path) -> dict[str, Any]:
    config = read_yaml(folder / "config.yaml")
    log = folder / "log.txt"
    regular_size(log)
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figures = records[-1]["test_coco_eval_bbox"]
    return {
        "model": config["model"],
        "enact": config["enact"],
        "choices": choices_of(config),
        "seed": config["seed"],
        "epochs": len(records),
        "seconds_per_epoch": statistics.median(record["train_seconds"] for record in records),
        "seconds_fastest_epoch": min(record["train_seconds"] for record in records),
        "parameters": records[-1]["n_parameters"],
        **{name: figures[position] for name, position in zip(COLUMNS, POSITIONS, strict=True)},
        "loss": records[-1]["test_loss"],
        "environment": read_json(folder / "environment.json"),
    }


def to_markdown(runs: list[dict[str, Any]]) -> str:
    """A row for each model and encoder: means over seeds, the range of AP and AP50, and the fastest epoch of all.

    Runs of tables made before the loss of the validation set was kept have none.
    """
    lines = [
        "| model | encoder | seeds | AP | AP50 | APS | APM | loss | epochs | fastest epoch, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["model"], encoder_of(run)), []).append(run)
    for model, encoder in sorted(groups, key=lambda row: (row[0], row[1] != "dense", row[1])):
        group = groups[model, encoder]
        cells = [mean_and_range(group, "AP"), mean_and_range(group, "AP50")]
        cells += [f"{100 * mean(group, name):.1f}" for name in ("APS", "APM")]
        cells.append(f"{mean(group, 'loss'):.2f}" if all("loss" in run for run in group) else "-")
        cells += [str(group[0]["epochs"]), f"{min(run['seconds_fastest_epoch'] for run in group):.1f}"]
        lines.append(f"| {model} | {encoder} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def encoder_of(run: dict[str, Any]) -> str:
    """What tables and titles call an encoder; `run` needs "enact" and "choices" alone."""
    if not run["enact"]:
        return "dense"
    return ", ".join([f"ENACT {run['enact']}", *(f"{name} {choice}" for name, choice in run["choices"].items())])


def choices_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that change what its variant of ENACT does."""
    return {name: config[name] for name, usual in ENACT_CHOICES.items() if config.get(name, usual) != usual}


def mean(group: list[dict[str, Any]], name: str) -> float:
    """The mean of one figure over runs."""
    return statistics.fmean(run[name] for run in group)


def mean_and_range(group: list[dict[str, Any]], name: str) -> str:
    """In percent: mean (lowest to highest)."""
    values = [100 * run[name] for run in group]
    return f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
