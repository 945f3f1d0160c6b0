"""What ENACT alone costs trained dense detectors, whosever encoder they have.

    python tools/without_training.py --checkpoint outputs/detr/checkpoint.pth outputs/conditional_detr/checkpoint.pth

`enact.apply` puts clusters into the encoder of a dense model; nothing is trained afterwards, and the validation set is
scored before and after, with several kinds and numbers of clusters, and once more after `enact.remove`. That is done
for each kind of model that `enact.apply` supports and a checkpoint is given for (`tools.hosts`; those of
tools/transformer_detr.py serve torch's own classes). Writes results/without_training.json (every figure, with device,
versions, commit and command), .md (tables) and .png (AP against tokens a cluster).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import enact
from enact import EnactAttention
from enact.clustering import partition_tokens
from enact.information import Information
from enact.plugin import EnactProjectedAttention
from main import SCORES, Run
from preparation import pick_device
from tools.hosts import HOSTS, Host, model_of, move_encoder, open_run
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
REMOVED = "after enact.remove"  # in the place of a kind


class Score(NamedTuple):
    """What a detector makes of the validation set: COCO's figures in percent, and its outputs, batch by batch."""

    figures: dict[str, float]
    outputs: list[Tensor]


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", nargs="+", type=Path, required=True,
        help="of a dense detr, of a conditional_detr, of tools/transformer_detr.py: one or several",
    )  # fmt: skip
    parser.add_argument(
        "--hosts", nargs="+", choices=HOSTS, metavar="HOST", help=f"{', '.join(HOSTS)}; default: all of the checkpoints"
    )
    parser.add_argument("--sigmas", nargs="+", type=float, default=[0.5, 1.0, 3.0, 5.0], help="smoothing, in tokens")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--draws", type=int, default=2, help="of the untrained probability layer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "without_training", help="without suffix")
    options = parser.parse_args(argv)
    try:
        with _quiet("main", "enact.plugin"):  # a table of COCO's for each row would bury the bar
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


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Warnings only, from some loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all hosts."""
    checkpoints = {model_of(path): path for path in options.checkpoint}
    names = options.hosts or [name for name, host in HOSTS.items() if host.model in checkpoints]
    missing = [name for name in names if HOSTS[name].model not in checkpoints]
    if missing:
        raise InputError(f"--hosts {missing[0]} needs a --checkpoint of a {HOSTS[missing[0]].model}")
    settings = [(kind, sigma) for kind in options.kinds for sigma in options.sigmas]
    rows = []
    with tempfile.TemporaryDirectory() as folder, tqdm(total=len(names) * len(settings), unit="setting") as bar:
        for host in map(HOSTS.__getitem__, names):
            bar.set_description(host.title)
            run = open_run(checkpoints[host.model], folder, options.device)
            rows += [{"host": host.title, **row} for row in measure_host(run, host, settings, options.draws, bar)]
    return rows


def measure_host(
    run: Run, host: Host, settings: Sequence[tuple[str, float]], draws: int, bar: tqdm[Any]
) -> Iterator[dict[str, Any]]:
    """The dense row, one for each kind and number of clusters, and that of the model after the last `enact.remove`."""
    difference = {}
    if host.encoder is not None:
        own = _score(run)
        move_encoder(run, host.encoder)
    dense = _score(run)
    if host.encoder is not None:
        difference = {"largest difference from our encoder": _largest_difference(own.outputs, dense.outputs)}
    state, modules = _copy(run.model.state_dict()), _modules(run.model)
    yield {"kind": "dense", "sigma": None, "tokens a cluster": 1.0, **dense.figures, **difference}
    for kind, sigma in settings:
        drawn = [_draw(run, host, kind, sigma, seed) for seed in range(draws)]
        mean = {name: statistics.fmean(draw[name] for draw in drawn) for name in drawn[0]}
        yield {"kind": kind, "sigma": sigma, **mean, "AP of each draw": [draw["AP"] for draw in drawn]}
        bar.update()
    removed = _score(run)
    same = {
        "modules": _modules(run.model) == modules,
        "weights": _same_bits(run.model.state_dict(), state),
        "outputs": _same_bits(dict(enumerate(removed.outputs)), dict(enumerate(dense.outputs))),
    }
    yield {"kind": REMOVED, "sigma": None, "tokens a cluster": 1.0, **removed.figures, "as before": same}


def _draw(run: Run, host: Host, kind: str, sigma: float, seed: int) -> dict[str, float]:
    part = run.model.get_submodule(host.part)
    torch.manual_seed(seed)
    enact.apply(part, smoothing_sigma=sigma, **KINDS[kind])
    if kind in FROM_KEYS:
        _start_from_keys(part)
    try:
        with _counting(part) as lengths:
            return {**_score(run).figures, "tokens a cluster": statistics.fmean(lengths)}
    finally:
        enact.remove(part)


@torch.no_grad()
def _start_from_keys(model: nn.Module) -> None:
    for attention in (module for module in model.modules() if isinstance(module, EnactAttention)):
        separate = isinstance(attention, EnactProjectedAttention)
        keys = attention.get_parameter("k_proj.weight") if separate else attention.in_proj_weight.chunk(3)[1]
        weight = attention.information.probability.weight
        weight.copy_(torch.linalg.svd(keys).Vh[0] * weight.norm())


def _score(run: Run) -> Score:
    outputs: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Any, ...], found: dict[str, Any]) -> None:
        outputs.extend((found["pred_logits"], found["pred_boxes"]))

    hook = run.model.register_forward_hook(keep)
    try:
        figures = run.evaluate()[SCORES]
    finally:
        hook.remove()
    return Score({"AP": 100 * figures[0], "AP50": 100 * figures[1]}, outputs)


def _copy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _modules(model: nn.Module) -> list[tuple[str, int, type]]:
    """Which object each module is, and of which class."""
    return [(name, id(module), type(module)) for name, module in model.named_modules()]


def _same_bits(found: Mapping[Any, Tensor], expected: Mapping[Any, Tensor]) -> bool:
    """Whether there are the same tensors of the same dtypes and shapes, bit by bit."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.flatten().view(torch.uint8)

    return list(found) == list(expected) and all(
        (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        and torch.equal(bits(found[name]), bits(tensor))
        for name, tensor in expected.items()
    )


def _largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))


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
    """A table of what `enact.remove` leaves, a line a host, and one of all figures."""
    lines = [
        "| host | AP before | AP after `enact.remove` | as before, bit by bit | farthest from our encoder's outputs |",
        "|---|---|---|---|---|",
    ]
    for before, *_, after in _by_host(rows).values():
        same = [name for name, equal in after["as before"].items() if equal]
        difference = before.get("largest difference from our encoder")
        shown = "" if difference is None else f"{difference:.1e}"
        lines.append(f"| {before['host']} | {before['AP']:.3f} | {after['AP']:.3f} | {', '.join(same)} | {shown} |")
    lines += ["", "| host | clusters | sigma | tokens a cluster | AP | AP50 |", "|---|---|---|---|---|---|"]
    for row in rows:
        sigma = "" if row["sigma"] is None else f"{row['sigma']:g}"
        figures = f"{row['tokens a cluster']:.1f} | {row['AP']:.1f} | {row['AP50']:.1f}"
        lines.append(f"| {row['host']} | {row['kind']} | {sigma} | {figures} |")
    return "\n".join(lines) + "\n"


def save_plot(rows: list[dict[str, Any]], file: Path) -> None:
    """AP against tokens a cluster, a panel a host, a line for each kind."""
    hosts = _by_host(rows)
    columns = min(len(hosts), 4)
    lines = -(-len(hosts) // columns)
    figure = Figure(figsize=(1 + 3.2 * columns, 0.8 + 2.7 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (title, (dense, *rest)) in zip(panels, hosts.items(), strict=False):
        axes.set_title(title, fontsize=10)
        axes.axhline(dense["AP"], color="black", linestyle="--", label="dense, and after enact.remove")
        for kind in dict.fromkeys(row["kind"] for row in rest[:-1]):
            points = sorted((row["tokens a cluster"], row["AP"]) for row in rest if row["kind"] == kind)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=kind)
        axes.grid(alpha=0.3)
        axes.tick_params(labelbottom=True)
    for empty in panels[len(hosts) :]:
        empty.set_axis_off()
    figure.supxlabel("tokens a cluster")
    figure.supylabel("AP, percent, nothing trained")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    figure.savefig(file, dpi=120)


def _by_host(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    hosts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        hosts.setdefault(row["host"], []).append(row)
    return hosts


if __name__ == "__main__":
    sys.exit(main())
