"""What ENACT alone costs a trained dense detector.

    python tools/without_training.py --checkpoint outputs/detr/checkpoint.pth

`enact.apply` puts clusters into the encoder of a dense model; nothing is trained afterwards, and the validation set is
scored before and after, with several kinds and numbers of clusters. Writes results/without_training.json
(every figure, with device, versions, commit and command), .md (a table) and .png (AP against tokens a cluster).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import enact
from configs.schema import Config
from enact import EnactAttention
from enact.clustering import partition_tokens
from enact.information import Information
from main import Run
from preparation import pick_device
from tools.detector_files import load_detector
from util import environment
from util.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
# What is compared: the arguments of enact.apply.
KINDS: dict[str, dict[str, Any]] = {
    "uniform": {"variant": "paper", "regions": "uniform", "pooling": "mean"},
    "uniform, size": {"variant": "paper", "regions": "uniform", "pooling": "mean", "cluster_bias": "size"},
    "paper": {"variant": "paper"},
    "paper, size": {"variant": "paper", "cluster_bias": "size"},
    "plus, gain 1": {"variant": "plus", "initial_gain": 1.0},
    "plus": {"variant": "plus"},
    "plus, keys": {"variant": "plus"},
}
# Of those whose probability layer starts along the direction in which the projected keys vary most.
FROM_KEYS = ("plus, keys",)


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a dense detr or conditional_detr")
    parser.add_argument("--sigmas", nargs="+", type=float, default=[0.5, 1.0, 3.0, 5.0], help="smoothing, in tokens")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--draws", type=int, default=2, help="of the untrained probability layer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "without_training", help="without suffix")
    options = parser.parse_args(argv)
    try:
        rows = measure(options)
    except (InputError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)
    device = environment.describe(pick_device(options.device))
    text = json.dumps({"environment": device, "rows": rows}, indent=1) + "\n"
    options.output.with_suffix(".json").write_text(text)
    options.output.with_suffix(".md").write_text(to_markdown(rows))
    save_plot(rows, options.output.with_suffix(".png"))
    return 0


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The dense row, then one for each kind and number of clusters."""
    logging.getLogger("main").setLevel(logging.WARNING)  # a table of COCO's for each row would bury the bar
    with tempfile.TemporaryDirectory() as folder:
        run = Run(_evaluation_of(options, folder), pick_device(options.device))
        rows: list[dict[str, Any]] = [{"kind": "dense", "sigma": None, "tokens a cluster": 1.0, **_score(run)}]
        settings = [(kind, sigma) for kind in options.kinds for sigma in options.sigmas]
        for kind, sigma in tqdm(settings, unit="setting"):
            draws = [_draw(run, kind, sigma, seed) for seed in range(options.draws)]
            mean = {name: statistics.fmean(draw[name] for draw in draws) for name in draws[0]}
            rows.append({"kind": kind, "sigma": sigma, **mean, "AP of each draw": [draw["AP"] for draw in draws]})
    return rows


def _evaluation_of(options: argparse.Namespace, folder: str) -> Config:
    config = load_detector(options.checkpoint, torch.device("cpu"))[1]
    if config.enact is not None or config.model == "anchor_detr":
        raise InputError(f"{options.checkpoint} is no dense DETR or Conditional DETR; give one that is")
    return dataclasses.replace(config, eval=True, resume=str(options.checkpoint), output_dir=folder, num_workers=0)


def _draw(run: Run, kind: str, sigma: float, seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    enact.apply(run.model, smoothing_sigma=sigma, **KINDS[kind])
    if kind in FROM_KEYS:
        _start_from_keys(run.model)
    try:
        with _counting(run.model) as lengths:
            return {**_score(run), "tokens a cluster": statistics.fmean(lengths)}
    finally:
        enact.remove(run.model)


@torch.no_grad()
def _start_from_keys(model: nn.Module) -> None:
    for attention in (module for module in model.modules() if isinstance(module, EnactAttention)):
        direction = torch.linalg.svd(attention.in_proj_weight.chunk(3)[1]).Vh[0]
        weight = attention.information.probability.weight
        weight.copy_(direction * weight.norm())


def _score(run: Run) -> dict[str, float]:
    figures = run.evaluate()["test_coco_eval_bbox"]
    return {"AP": 100 * figures[0], "AP50": 100 * figures[1]}


@contextlib.contextmanager
def _counting(model: nn.Module) -> Iterator[list[float]]:
    """The mean number of tokens in a cluster, of each image and layer."""
    lengths: list[float] = []
    hooks = []
    for attention in (module for module in model.modules() if isinstance(module, EnactAttention)):

        def count(
            _: Information, inputs: tuple[Tensor, ...], smoothed: Tensor, method: Any = attention.method
        ) -> None:
            real = inputs[1] if len(inputs) > 1 else None
            tokens = torch.full((len(smoothed),), smoothed.shape[1]) if real is None else real.sum(1).cpu()
            limit = torch.zeros_like(tokens) + method.budget(tokens)
            most = int(limit.max())
            found = partition_tokens(method.regions, smoothed, real, limit.to(smoothed.device), most).count
            lengths.extend((tokens / found.cpu()).tolist())

        hooks.append(attention.information.register_forward_hook(count))
    try:
        yield lengths
    finally:
        for hook in hooks:
            hook.remove()


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A line a row."""
    lines = ["| clusters | sigma | tokens a cluster | AP | AP50 |", "|---|---|---|---|---|"]
    for row in rows:
        sigma = "" if row["sigma"] is None else f"{row['sigma']:g}"
        figures = f"{row['tokens a cluster']:.1f} | {row['AP']:.1f} | {row['AP50']:.1f}"
        lines.append(f"| {row['kind']} | {sigma} | {figures} |")
    return "\n".join(lines) + "\n"


def save_plot(rows: list[dict[str, Any]], file: Path) -> None:
    """AP against tokens a cluster, a line for each kind."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.axhline(rows[0]["AP"], color="black", linestyle="--", label="dense")
    for kind in dict.fromkeys(row["kind"] for row in rows[1:]):
        points = sorted((row["tokens a cluster"], row["AP"]) for row in rows[1:] if row["kind"] == kind)
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
    axes.set_xlabel("tokens a cluster")
    axes.set_ylabel("AP, percent, nothing trained")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
