"""Train the variants of ENACT beside each other: python tools/ablation.py --output_dir runs/ablation

Every arm is `main.py` with flags of its own, three seeds each, on the built-in scenes unless --coco_path is among the
flags after `--`. Arms whose run is finished are not run again, so that the command can be repeated after a failure.
--include adds the finished runs of another table, where their model is that of the arms.
Writes results/ablation.json (every figure), .md (a table) and .png (AP of each arm, a dot a seed).

    python tools/ablation.py --arms dense paper uniform --seeds 1 2 3 --jobs 2 -- --model conditional_detr
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.commands import one_line_errors
from tools.results import encoder_of, read_run, read_table, write_table

ROOT = Path(__file__).resolve().parents[1]
# What is compared: the flags of main.py that make an arm.
ARMS: dict[str, list[str]] = {
    "dense": [],
    "official": ["--enact", "official"],
    "paper": ["--enact", "paper"],
    # Controls: what are the places of the cuts worth, and what the weights?
    "uniform": ["--enact", "paper", "--regions", "uniform", "--pooling", "mean"],
    "random": ["--enact", "paper", "--regions", "random"],
    "mean": ["--enact", "paper", "--pooling", "mean"],
    # One change at a time.
    "scaled": ["--enact", "paper", "--pooling", "scaled_information"],
    "probability": ["--enact", "paper", "--pooling", "probability"],
    "soft": ["--enact", "paper", "--boundary", "soft"],
    "size": ["--enact", "paper", "--cluster_bias", "size"],
    "serpentine": ["--enact", "paper", "--token_order", "serpentine"],
    "windows": ["--enact", "paper", "--token_order", "windows"],
    "hilbert": ["--enact", "paper", "--token_order", "hilbert"],
    # All of it.
    "plus": ["--enact", "plus"],
    "plus_hard": ["--enact", "plus", "--boundary", "hard"],
    "plus_hilbert": ["--enact", "plus", "--token_order", "hilbert"],
    "plus_windows": ["--enact", "plus", "--token_order", "windows"],
    "plus_hard_hilbert": ["--enact", "plus", "--boundary", "hard", "--token_order", "hilbert"],
    "plus_uniform": ["--enact", "plus", "--boundary", "hard", "--regions", "uniform"],
}


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 42])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a thread each if there are several")
    parser.add_argument("--output_dir", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "ablation", help="without suffix")
    parser.add_argument("--include", nargs="*", type=Path, default=[], metavar="FILE", help="other tables")
    parser.add_argument("flags", nargs="*", help="of main.py, for every arm, after --")
    options = parser.parse_args(argv)
    included = [run for file in options.include for run in read_table(file)]
    folders = {(arm, seed): options.output_dir / f"{arm}_{seed}" for seed in options.seeds for arm in options.arms}
    missing = {key: folder for key, folder in folders.items() if not is_finished(folder)}
    failed = train_all(missing, options.flags, options.jobs)
    runs = [read_run(folder) for folder in folders.values() if is_finished(folder)]
    models = {run["model"] for run in runs}
    runs += [run for run in included if run["model"] in models]
    if runs:
        write_table(runs, options.output)
        save_plot(runs, options.output.with_suffix(".png"))
    for folder in failed:
        print(f"error: a run failed; see {folder}.log", file=sys.stderr)
    return 1 if failed else 0


def is_finished(folder: Path) -> bool:
    """Whether a run has drawn its last picture."""
    return (folder / "detections.png").exists()


def train_all(folders: dict[tuple[str, int], Path], flags: list[str], jobs: int) -> list[Path]:
    """Train what is missing; the folders of the runs that failed."""

    def train_one(key: tuple[str, int]) -> bool:
        succeeded = train(*key, folders[key], flags, single_thread=jobs > 1)
        bar.update()
        return succeeded

    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(folders), unit="run", disable=not folders) as bar:
        succeeded = list(pool.map(train_one, folders))
    return [folder for folder, good in zip(folders.values(), succeeded, strict=True) if not good]


def train(arm: str, seed: int, folder: Path, flags: list[str], single_thread: bool) -> bool:
    """One run of main.py, what it says in a file beside its folder; whether it succeeded."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "main.py"), *flags, *ARMS[arm], "--seed", str(seed)]
    command += ["--output_dir", str(folder), "--resume", "auto"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if single_thread else {})}
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode == 0


def save_plot(runs: list[dict[str, Any]], file: Path) -> None:
    """AP of each arm, best mean on top: a dot for each seed and a bar for their mean."""
    groups: dict[str, list[float]] = {}
    for run in runs:
        groups.setdefault(encoder_of(run), []).append(100 * run["AP"])
    ordered = sorted(groups, key=lambda name: sum(groups[name]) / len(groups[name]))
    figure = Figure(figsize=(9, 0.4 * len(ordered) + 1), layout="constrained")
    axes = figure.add_subplot()
    for row, name in enumerate(ordered):
        values = groups[name]
        axes.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.7)
        axes.plot(sum(values) / len(values), row, "|", color="black", markersize=18)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set_xlabel("AP, percent (dots: seeds, bars: means)")
    axes.grid(axis="x", alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
