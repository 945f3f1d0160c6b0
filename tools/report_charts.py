"""Charts of a report as inline SVG: their colours come from the page's style sheet, names and numbers are escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from tools.analysis import Floats, Integers

Element = ElementTree.Element
Range = tuple[float, float]

FEW_CLASSES = 20  # of which a confusion matrix has room for the counts
LONGEST_NAME = 24  # letters


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Args:
        name: for the legend and for the text that appears over the line.
        xs, ys: its points; those that are not finite are left out.
        style: classes of the style sheet, such as "line-1 dashed".
        dots: whether points are marked, each with its numbers.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str
    dots: bool = False

    def points(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        points = zip(self.xs, self.ys, strict=True)
        return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


class _Axes:
    """A plot area with ticks; numbers -> places in it."""

    width, height = 380, 230
    left, right, top, bottom = 46, 10, 8, 38

    def __init__(
        self, title: str, x_label: str, y_label: str, x_range: Range, y_range: Range, whole: bool = False
    ) -> None:
        self.x_range, self.y_range = x_range, y_range
        self.svg = _svg(self.width, self.height, title, "chart")
        right, bottom = self.width - self.right, self.height - self.bottom
        for value, text in _ticks(y_range):
            y = self.y(value)
            _add(self.svg, "line", {"class": "grid"}, x1=self.left, x2=right, y1=y, y2=y)
            _add(self.svg, "text", {"text-anchor": "end"}, text, x=self.left - 6, y=y + 4)
        for value, text in _ticks(x_range, whole):
            _add(self.svg, "text", {"text-anchor": "middle"}, text, x=self.x(value), y=bottom + 16)
        _add(self.svg, "line", {"class": "axis"}, x1=self.left, x2=right, y1=bottom, y2=bottom)
        middle = {"text-anchor": "middle", "class": "label"}
        _add(self.svg, "text", middle, x_label, x=(self.left + right) / 2, y=self.height - 5)
        x, y = 11, (self.top + bottom) / 2
        _add(self.svg, "text", {**middle, "transform": f"rotate(-90 {x} {y:g})"}, y_label, x=x, y=y)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)

    def draw(self, series: Series) -> None:
        """A line, and its name where the pointer rests on it."""
        group = _add(self.svg, "g", {"class": series.style})
        places = [(self.x(x), self.y(y)) for x, y in series.points()]
        if len(places) > 1:
            line = _add(group, "polyline", {"points": " ".join(f"{x:.1f},{y:.1f}" for x, y in places)})
            _add(line, "title", {}, series.name)
        if series.dots or len(places) == 1:
            for (x, y), (across, up) in zip(places, series.points(), strict=True):
                dot = _add(group, "circle", {}, cx=x, cy=y, r=2.6)
                _add(dot, "title", {}, f"{series.name}: {up:.4g} at {across:g}")


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_range: Range | None = None,
    y_range: Range | None = None,
    whole: bool = False,
) -> Markup:
    """Lines over common axes.

    Args:
        title: for readers of the screen.
        series: the lines.
        x_label, y_label: what the axes show.
        x_range, y_range: their ends; without, those of the points.
        whole: only whole numbers stand at the x axis.
    """
    points = [point for one in series for point in one.points()]
    x_span, y_span = x_range or _span([x for x, _ in points]), y_range or _span([y for _, y in points])
    axes = _Axes(title, x_label, y_label, x_span, y_span, whole)
    for one in series:
        axes.draw(one)
    return _markup(axes.svg)


def sparkline(title: str, recalls: Floats, curves: Sequence[tuple[str, Floats]]) -> Markup:
    """Small curves of precision over recall, each (a style, (R,) precisions); empty if none is defined."""
    defined = [(style, curve) for style, curve in curves if not any(map(math.isnan, curve))]
    if not defined:
        return Markup()
    width, height = 96, 30
    svg = _svg(width, height, title, "sparkline")
    _add(svg, "rect", {"class": "frame"}, x=0.5, y=0.5, width=width - 1, height=height - 1)
    for style, curve in defined:
        places = zip(recalls[::4].tolist(), curve[::4].tolist(), strict=True)
        points = " ".join(f"{1 + x * (width - 2):.1f},{height - 1 - y * (height - 2):.1f}" for x, y in places)
        _add(_add(svg, "g", {"class": style}), "polyline", {"points": points})
    return _markup(svg)


def confusion_chart(confusion: Integers, names: Sequence[str]) -> Markup:
    """A matrix of counts, coloured by their share of the row.

    Args:
        confusion: (K + 1, K + 1), as `Analysis.confusion`.
        names: of the K classes.
    """
    rows, columns = [*names, "nothing there"], [*names, "not found"]
    cell = 34 if len(names) <= FEW_CLASSES else 15
    left = 16 + 6.4 * min(LONGEST_NAME, max(map(len, rows)))
    top = 22 + 4.9 * min(LONGEST_NAME, max(map(len, columns)))
    width, height = left + cell * len(columns) + 0.7 * top, top + cell * len(rows) + 4
    svg = _svg(width, height, "confusion matrix", "confusion")
    svg.set("style", f"width: {width:.0f}px")
    for column, name in enumerate(columns):
        x, y = left + cell * (column + 0.6), top - 6
        _add(svg, "text", {"transform": f"rotate(-45 {x:g} {y:g})"}, _shortened(name), x=x, y=y)
    for row, name in enumerate(rows):
        y = top + cell * row
        _add(svg, "text", {"text-anchor": "end"}, _shortened(name), x=left - 6, y=y + cell / 2 + 4)
        for column, other in enumerate(columns):
            if row < len(names) or column < len(names):  # nothing is there for nobody to find
                count, share = int(confusion[row, column]), confusion[row, column] / max(1, confusion[row].sum())
                title = f"{name}, detected as {other}" if column < len(names) else f"{name}, not found"
                place = _add(svg, "g", {"class": "right" if row == column else "wrong"})
                _draw_cell(place, left + cell * column, y, cell, count, share, f"{title}: {count}")
    return _markup(svg)


def _draw_cell(place: Element, x: float, y: float, side: float, count: int, share: float, title: str) -> None:
    _add(place, "title", {}, title)
    _add(place, "rect", {"class": "frame"}, x=x, y=y, width=side, height=side)
    if count:
        strength = {"class": "fill", "fill-opacity": f"{0.12 + 0.88 * share:.2f}"}
        _add(place, "rect", strength, x=x + 1, y=y + 1, width=side - 2, height=side - 2)
    if count and side > 20:
        style = {"text-anchor": "middle", "class": "strong" if share > 0.55 else "weak"}
        _add(place, "text", style, str(count), x=x + side / 2, y=y + side / 2 + 4)


def _svg(width: float, height: float, title: str, style: str) -> Element:
    box = {"viewBox": f"0 0 {width:g} {height:g}", "class": style, "role": "img", "aria-label": title}
    return Element("svg", box)


def _add(parent: Element, tag: str, attributes: dict[str, str], text: str = "", **numbers: float) -> Element:
    written = {name: f"{value:g}" if value == int(value) else f"{value:.1f}" for name, value in numbers.items()}
    child = ElementTree.SubElement(parent, tag, {**attributes, **written})
    child.text = text or None
    return child


def _markup(svg: Element) -> Markup:
    return Markup(ElementTree.tostring(svg, encoding="unicode"))  # which has escaped texts and attributes


def _ticks(span: Range, whole: bool = False) -> list[tuple[float, str]]:
    """Round numbers within a range, and how they are written."""
    values: Any = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(*span)
    slack = 1e-9 * (span[1] - span[0])
    return [(float(value), f"{value:.4g}") for value in values if span[0] - slack <= value <= span[1] + slack]


def _span(values: Sequence[float]) -> Range:
    """From the least to the greatest value, never empty."""
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low, high


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
