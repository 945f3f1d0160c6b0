"""Pictures of what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.benchmark_measure import GIB
from tools.benchmark_report import MANY_TOKENS, exponents, line_of, number, seconds
from tools.benchmark_subjects import PRODUCT

Record = Mapping[str, Any]
BAR_SPACE = 0.8


class Panel(NamedTuple):
    """A plot of one figure of every record."""

    title: str
    figure: Callable[[Record], float]


def save_plot(report: Mapping[str, Any], path: Path) -> None:
    """A PNG of the figures of a report."""
    if report["scope"] == "sweep":
        figure = _curves(report["results"])
    else:
        records = [record for record in report["results"] if record["arm"] != PRODUCT]
        figure = _bars(records, PANELS[report["scope"]])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


PANELS = {
    "model": [
        Panel("memory of training, GiB", lambda record: number(record, "bytes") / GIB),
        Panel("training, seconds an image", lambda record: seconds(record, "train") / record["batch"]),
        Panel("inference, seconds an image", lambda record: seconds(record, "inference")),
    ],
    "encoder": [
        Panel("memory of training, GiB", lambda record: number(record, "bytes") / GIB),
        Panel("training, seconds a batch", lambda record: seconds(record, "train")),
        Panel("inference, seconds an image", lambda record: seconds(record, "inference")),
    ],
    "criterion": [
        Panel("matching and losses, seconds", lambda record: seconds(record, "losses")),
        Panel("with backward, seconds", lambda record: seconds(record, "train")),
    ],
    "loading": [
        Panel("reading for training, images a second", lambda record: record["batch"] / seconds(record, "train")),
        Panel("reading for evaluation, images a second", lambda record: record["batch"] / seconds(record, "inference")),
    ],
    "estimate": [
        Panel("estimated peak, usual batch, GiB", lambda record: number(record, "bytes") / GIB),
        Panel("estimated peak, largest batch, GiB", lambda record: number(record, "bytes_largest") / GIB),
    ],
}


def _bars(records: Sequence[Record], panels: Sequence[Panel]) -> Figure:
    """A panel for each figure, a group of bars for each row and batch, a colour for each encoder."""
    groups = list(dict.fromkeys((record["row"], record["batch"]) for record in records))
    series = list(dict.fromkeys(line_of(record)[1] for record in records))
    figure = Figure(figsize=(4 + 2 * len(groups), 3.2 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(all_axes, panels, strict=True):
        for index, name in enumerate(series):
            own = [record for record in records if line_of(record)[1] == name]
            offset = BAR_SPACE * ((index + 0.5) / len(series) - 0.5)
            places = [groups.index((record["row"], record["batch"])) + offset for record in own]
            axes.bar(places, [_drawable(panel.figure(record)) for record in own], BAR_SPACE / len(series), label=name)
        axes.set_xticks(range(len(groups)), [f"{row}\n{batch} images" for row, batch in groups])
        axes.set_title(panel.title)
        axes.grid(axis="y", alpha=0.3)
    all_axes[0].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _curves(records: Sequence[Record]) -> Figure:
    """Time and memory over tokens, on logarithmic axes, with the fitted exponents of the time."""
    rows = list(dict.fromkeys(record["row"] for record in records))
    figure = Figure(figsize=(12, 4.5 * len(rows)), layout="constrained")
    panels = dict(zip(rows, figure.subplots(len(rows), 2, squeeze=False), strict=True))
    for (row, encoder), slope in exponents(records).items():
        line = [record for record in records if line_of(record) == (row, encoder)]
        label = encoder if math.isnan(slope) else f"{encoder}: exponent {slope:.2f}"
        _curve(panels[row][0], line, lambda record: seconds(record, "train"), label)
        _curve(panels[row][1], line, lambda record: number(record, "bytes") / GIB, encoder)
    for row, (times, memory) in panels.items():
        times.axvline(MANY_TOKENS, color="black", linewidth=0.8, linestyle=":")
        times.set(title=f"{row}, one encoder layer: forward and backward", xlabel="tokens", ylabel="seconds")
        memory.set(title="memory", xlabel="tokens", ylabel="GiB")
        times.legend(fontsize="small")
    return figure


def _curve(axes: Axes, records: Sequence[Record], figure: Callable[[Record], float], label: str) -> None:
    points = [(record["tokens"], figure(record)) for record in records if not math.isnan(figure(record))]
    axes.loglog([x for x, _ in points], [y for _, y in points], marker=".", label=label)
    axes.grid(alpha=0.3, which="both")


def _drawable(value: float) -> float:
    return 0.0 if math.isnan(value) else value
