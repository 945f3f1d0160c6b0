"""Measure memory and time of every row of the results table, dense and ENACT, side by side.

    python tools/benchmark.py                                       # the published rows, whole detectors
    python tools/benchmark.py --scope encoder --device cpu          # the encoder alone
    python tools/benchmark.py --scope sweep --rows detr_r50         # a layer over 400 to 16,000 tokens
    python tools/benchmark.py --scope criterion                     # matching and losses
    python tools/benchmark.py --scope loading -- --coco_path COCO   # images a second of a loader process
    python tools/benchmark.py --estimate --batch_size 1 2 4 8       # does it fit a GPU? without one
    python tools/benchmark.py --scale 0.25 --repeats 3 -- --enc_layers 2   # a trial; after -- any flag of main.py

The arms: naive (the dense encoder as published: padded maps, attention maps stored), dense (ours, fused), official
(ENACT as published: padded, stored), paper and plus (ours). Writes OUTPUT.json (every run, with device, versions,
commit and command), OUTPUT.md (tables with the published figures and ratios) and OUTPUT.png. What does not fit or
does not compile is a cell that says so.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.cli import parse_args
from configs.schema import CONFIG_DIR, Config
from preparation import pick_device
from tools import benchmark_criterion, benchmark_loading
from tools.benchmark_arms import ARMS
from tools.benchmark_estimate import estimate_training
from tools.benchmark_inputs import SEED, largest_batch, scaled, training_batch
from tools.benchmark_measure import Subject, measure, memory_limit
from tools.benchmark_plots import save_plot
from tools.benchmark_report import exponents, write
from tools.benchmark_subjects import PRECISIONS, PRODUCT, Cell, encoder_subject, model_subject
from tools.commands import one_line_errors
from util import environment
from util.errors import InputError
from util.logs import set_up_console

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED_ROWS = ("detr_r50", "conditional_detr_r101", "anchor_detr_r50_dc5")
DEFAULT_ROWS = {
    "model": PUBLISHED_ROWS,
    "encoder": ("detr_r50", "detr_r50_dc5", "anchor_detr_r50_dc5"),
    "sweep": ("detr_r50", "anchor_detr_r50_dc5"),
    "criterion": PUBLISHED_ROWS,
    "loading": ("detr_r50",),
    "estimate": PUBLISHED_ROWS,
}
SWEEP_TOKENS = (400, 850, 1600, 3400, 4800, 6400, 9600, 12800, 16000)
# An encoder alone is compared with the same dropout in every host.
ENCODER_FLAGS = ("--dropout", "0.1")
# With dropout on its weights a CPU would have no fused attention to measure. What is published stores its maps anyway.
CPU_FLAGS = ("--attention_dropout", "0")
# Scopes that compare ways to do one thing, whatever the encoder.
WAYS = {"criterion": benchmark_criterion.WAYS, "loading": benchmark_loading.WAYS}
# Images of a step where it is not the recipe's: many small maps, or two large ones.
ENCODER_BATCH, DILATED_ENCODER_BATCH, CRITERION_BATCH, LOADING_BATCH = 8, 2, 8, 16


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command; an error of the user's is one line and exit status 2."""
    set_up_console()
    words = sys.argv[1:] if argv is None else list(argv)
    options = build_parser().parse_args(words)
    Benchmark(options, words).run()
    return 0


def build_parser() -> argparse.ArgumentParser:
    """A parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scope", choices=("model", "encoder", "sweep", *WAYS), default="model", help="what to measure")
    add("--estimate", action="store_true", help="the memory of training on a GPU, on fake tensors: needs no GPU")
    add("--rows", nargs="+", metavar="ROW", help="names in configs/; with _enact the ENACT arms alone")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    add("--precisions", nargs="+", choices=PRECISIONS, metavar="P", help="fp32, bf16; default: fp32, on a GPU both")
    add("--compile", action="store_true", help="measure every arm compiled too")
    batches = "the row's (encoder, criterion: 8; DC5 encoder: 2; loading: 16)"
    add("--batch_size", nargs="+", type=_positive(int), metavar="B", help=f"images of a step; default: {batches}")
    add("--tokens", nargs="+", type=_positive(int), default=list(SWEEP_TOKENS), metavar="N", help="of the sweep")
    add("--repeats", type=_positive(int), default=10, metavar="N", help="timed runs of every cell (default 10)")
    add("--scale", type=_positive(float), default=1.0, help="of the images' sides; below 1 for a trial")
    add("--device", default="auto", help="auto, cpu or cuda (default: cuda where there is one)")
    add("--memory_limit", type=_positive(float), metavar="GIB",
        help="more is out of memory; default: all, on a CPU four fifths of what is free")  # fmt: skip
    add("--output", type=Path, help="without suffix; default results/benchmark, for other scopes with their name")
    add("flags", nargs="*", help="of main.py, for every arm, after --")
    return parser


def without_folder(word: str) -> str:
    """A word of a command line, with folders of this machine left out: --output=/home/me/x -> --output=x."""
    before, equals, value = word.rpartition("=")
    elsewhere = Path(value).is_absolute() or value.startswith(("~", ".."))
    return before + equals + (Path(value).name if elsewhere else value)


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(word: str) -> float:
        value = kind(word)
        if not value > 0 or math.isinf(value):
            raise argparse.ArgumentTypeError(f"must be above 0, got {word}")
        return value

    parse.__name__ = "number"  # what argparse calls it
    return parse


class Benchmark:
    """One command, from its flags to its files."""

    def __init__(self, options: argparse.Namespace, words: Sequence[str]) -> None:
        self.options = options
        self.command = " ".join(["python", "tools/benchmark.py", *map(without_folder, words)])
        self._configs: dict[tuple[str, str], Config] = {}

    def run(self) -> None:
        """Measure group after group; the files hold what is done, whenever the command stops."""
        groups = list(self.groups())
        self.check_configs(groups)
        self.environment = {**environment.describe(self.device), "command": self.command}  # before files change
        results: list[dict[str, Any]] = []
        steps = 1 if self.scope == "estimate" else 1 + self.options.repeats
        with (
            memory_limit(self.options.memory_limit, self.device),
            tqdm(total=steps * sum(map(len, groups)), unit="run", dynamic_ncols=True) as bar,
        ):
            for group in groups:
                results += self.estimate(group, bar) if self.scope == "estimate" else self.measure(group, bar)
                self.write(results)

    @property
    def scope(self) -> str:
        return "estimate" if self.options.estimate else str(self.options.scope)

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.options.estimate else pick_device(self.options.device)

    def groups(self) -> Iterator[list[Cell]]:
        """Cells that are compared with one another, and so take turns."""
        for row, arms in self.rows().items():
            for batch in self.options.batch_size or [self.default_batch(row)]:
                if self.scope in WAYS:
                    yield [Cell(row, way, batch=batch) for way in WAYS[self.scope]]
                elif self.scope == "estimate":
                    yield [Cell(row, arm, batch=batch) for arm in arms]
                elif self.scope == "sweep":
                    for tokens in self.options.tokens:
                        yield list(self.cells(row, arms, 1, tokens))
                else:
                    products = [Cell(row, PRODUCT, precision, batch=batch) for precision in self.precisions]
                    yield products * (self.scope == "encoder") + list(self.cells(row, arms, batch))

    def cells(self, row: str, arms: list[str], batch: int, tokens: int = 0) -> Iterator[Cell]:
        """Every arm in every precision, compiled or not."""
        for arm in arms:
            for precision in self.precisions:
                for compiled in (False, True)[: 1 + self.options.compile]:
                    yield Cell(row, arm, precision, compiled, batch, tokens)

    def rows(self) -> dict[str, list[str]]:
        """The rows, without _enact, and the arms of each."""
        known = sorted(file.stem for file in CONFIG_DIR.glob("*.yaml") if not file.stem.startswith("shapes"))
        rows: dict[str, list[str]] = {}
        for row in self.options.rows or DEFAULT_ROWS[self.scope]:
            if row not in known:
                raise InputError(f"no row {row} in {CONFIG_DIR.name}/; choose some of {', '.join(known)}")
            arms = [arm for arm in self.options.arms if ARMS[arm].enact or not row.endswith("_enact")]
            base = rows.setdefault(row.removesuffix("_enact"), [])
            base += [arm for arm in arms if arm not in base]
        return {row: arms for row, arms in rows.items() if arms or self.scope in WAYS}

    @cached_property
    def precisions(self) -> list[str]:
        """What was asked for, else what the device is good at."""
        both = self.options.estimate or self.device.type == "cuda"
        return list(self.options.precisions or (list(PRECISIONS) if both else ["fp32"]))

    def default_batch(self, row: str) -> int:
        if self.scope in WAYS:
            return CRITERION_BATCH if self.scope == "criterion" else LOADING_BATCH
        if self.scope == "encoder":
            return DILATED_ENCODER_BATCH if self.config(row, "dense").dilation else ENCODER_BATCH
        return self.config(row, "dense").batch_size

    def config(self, row: str, arm: str) -> Config:
        """The recipe of a row with the encoder of an arm, with the flags that were given."""
        if (row, arm) not in self._configs:
            enact, published = ARMS.get(arm, ARMS["dense"])
            file = CONFIG_DIR / f"{row}{'_enact' if enact else ''}.yaml"
            words = ["--config", str(file), "--coco_path", "COCO", "--backbone_weights", "null"]
            words += ["--enact", enact] if enact else []
            words += ENCODER_FLAGS if self.scope in ("encoder", "sweep") else ()
            words += CPU_FLAGS if self.device.type == "cpu" and self.scope != "estimate" and not published else ()
            self._configs[row, arm] = scaled(parse_args([*words, *self.options.flags]), self.options.scale)
        return self._configs[row, arm]

    def check_configs(self, groups: list[list[Cell]]) -> None:
        """Refuse flags that some arm cannot have before anything is measured (InputError)."""
        if not groups:
            raise InputError("no arm is left: a row of ENACT (_enact) has no dense arms; choose others with --arms")
        for row, arm in dict.fromkeys((cell.row, cell.arm) for group in groups for cell in group):
            self.config(row, arm)

    def measure(self, group: list[Cell], bar: tqdm[Any]) -> list[dict[str, Any]]:
        """The records of cells that take turns."""
        measured = measure(group, self.build, self.device, self.options.repeats, bar)
        return [{**asdict(cell), **figures} for cell, figures in measured.items()]

    def build(self, cell: Cell) -> Subject:
        """What a cell stands for, with the same weights and inputs whenever it is built."""
        torch.manual_seed(SEED)
        config = self.config(cell.row, cell.arm)
        if self.scope == "criterion":
            return benchmark_criterion.criterion_subject(cell.arm, cell.batch, config, self.device)
        if self.scope == "loading":
            return benchmark_loading.loading_subject(cell.arm, cell.batch, config, self.device)
        make = model_subject if self.scope == "model" else encoder_subject
        return make(cell, config, self.device)

    def estimate(self, group: list[Cell], bar: tqdm[Any]) -> list[dict[str, Any]]:
        """The records of cells, in every precision."""
        records: list[dict[str, Any]] = []
        for cell in group:
            bar.set_postfix_str(str(cell))
            config = self.config(cell.row, cell.arm)
            batches = [make(config, cell.batch) for make in (training_batch, largest_batch)]
            peaks = estimate_training(config, cell.arm, batches, self.precisions)
            for precision, (usual, largest) in zip(self.precisions, peaks, strict=True):
                figures = {"precision": precision, "error": None, "bytes": usual, "bytes_largest": largest}
                records.append({**asdict(cell), **figures})
            bar.update()
        return records

    def plain_configs(self, results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The configuration of every row and arm, with values that JSON has."""
        configs: dict[str, dict[str, Any]] = {}
        for record in results:
            if record["arm"] != PRODUCT:
                fields = asdict(self.config(record["row"], record["arm"])).items()
                plain = {name: without_folder(value) if isinstance(value, str) else value for name, value in fields}
                configs.setdefault(record["row"], {})[record["arm"]] = plain
        return configs

    def write(self, results: list[dict[str, Any]]) -> None:
        """OUTPUT.json, .md and .png."""
        name = "benchmark" if self.scope == "model" else f"benchmark_{self.scope}"
        output = self.options.output or ROOT / "results" / name
        report: dict[str, Any] = {
            "environment": self.environment,
            "scope": self.scope,
            "device": self.device.type,
            "seed": SEED,
            "repeats": self.options.repeats,
            "scale": self.options.scale,
            "configs": self.plain_configs(results),
            "results": results,
        }
        if self.scope == "sweep":
            slopes = exponents(results).items()
            report["exponents"] = {" ".join(line): None if math.isnan(slope) else slope for line, slope in slopes}
        write(report, output)
        save_plot(report, output.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
