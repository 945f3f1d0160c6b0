"""Figures of what `clusters_view` finds: one for each layer of an image, and one for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tools.clusters_panels import show_attention, show_clusters, show_information, show_picture, show_probability
from tools.clusters_view import Explanation, LayerView, Size

MOST_COLUMNS = 4


def draw_layer(view: Explanation, number: int, title: str, class_names: Mapping[int, str]) -> Figure:
    """The picture with its detections and one layer's clusters, information, probability and attention.

    Args:
        view: from `explain`.
        number: of the layer, from 0.
        title: of the figure.
        class_names: by label.
    """
    layer = view.layers[number]
    panels = (1 if layer.clusters is None else 4) + len(view.points)
    columns = min(MOST_COLUMNS, panels if panels < 4 else -(-panels // 2))
    sheet = Sheet(view.size, -(-panels // columns), columns, title)
    axes = iter([sheet.panel(*divmod(place, columns)) for place in range(panels)])
    show_picture(next(axes), view, class_names)
    if layer.clusters is not None:
        show_clusters(next(axes), view, layer.clusters)
        show_information(next(axes), view, layer.clusters)
        show_probability(next(axes), view, layer.clusters)
    for point, panel in enumerate(axes):
        show_attention(panel, view, layer, point)
    return sheet.figure


def draw_contact_sheet(view: Explanation, title: str, class_names: Mapping[int, str]) -> Figure:
    """The picture with a table of numbers, and a row for each layer: clusters, information, probability, attention.

    The attention is the first point's; of layers without clusters it is that of the first few. Arguments as in
    `draw_layer`.
    """
    clustered = view.layers[0].clusters is not None
    sheet = Sheet(view.size, 1 + len(view.layers), 4 if clustered else max(2, min(4, len(view.points))), title)
    show_picture(sheet.panel(0, 0), view, class_names)
    sheet.write(0, 1, layer_table(view.layers))
    for row, layer in enumerate(view.layers, start=1):
        _draw_row([sheet.panel(row, column) for column in range(4 if clustered else len(view.points[:4]))], view, layer)
        sheet.label(row, f"layer {row - 1}")
    return sheet.figure


def _draw_row(panels: Sequence[Axes], view: Explanation, layer: LayerView) -> None:
    if layer.clusters is not None:
        show_clusters(panels[0], view, layer.clusters)
        show_information(panels[1], view, layer.clusters)
        show_probability(panels[2], view, layer.clusters)
    for point, axes in enumerate(panels[-1:] if layer.clusters is not None else panels):
        show_attention(axes, view, layer, point)


def layer_table(layers: Sequence[LayerView]) -> str:
    """A line for each layer: its tokens, clusters, their mean, least and greatest size, and the information."""
    if layers[0].clusters is None:
        return f"{len(layers)} dense layers,\n{layers[0].attention[0].numel()} tokens each"
    lines = [f"{'layer':<6}{'tokens':>7}{'clusters':>10}{'mean':>6}{'least':>7}{'most':>6}   information in bits"]
    for number, layer in enumerate(layers):
        assert layer.clusters is not None
        sizes, bits = layer.clusters.sizes(), layer.clusters.information
        lines.append(
            f"{number:<6}{bits.numel():>7}{len(sizes):>10}{sizes.float().mean():>6.1f}{sizes.min():>7}{sizes.max():>6}"
            f"   {bits.min():.2g} to {bits.max():.2g}"
        )
    return "\n".join(lines)


class Sheet:
    """A figure of equal panels in the shape of a picture, each with room for a title and a colour bar.

    Args:
        size: height and width of the picture.
        rows, columns: of panels.
        title: of the figure.

    Attributes:
        figure: what is drawn on.
    """

    longest, narrowest = 3.6, 2.6  # inches of a panel; narrow pictures get room for their titles
    left, bar, head, top = 0.35, 0.95, 0.32, 0.35  # inches beside and above the panels, and above all

    def __init__(self, size: Size, rows: int, columns: int, title: str) -> None:
        shape = size[1] / size[0]
        self.across = max(self.narrowest, self.longest * min(1.0, shape))
        self.down = min(self.across / shape, 1.5 * self.longest)
        self.width = self.left + columns * (self.across + self.bar)
        self.height = self.top + rows * (self.down + self.head) + 0.1
        self.figure = Figure((self.width, self.height))
        FigureCanvasAgg(self.figure)  # which knows how large a text is
        self.figure.text(0.5, 1 - 0.22 / self.height, title, ha="center", va="center", fontsize=11)

    def panel(self, row: int, column: int) -> Axes:
        """New axes."""
        x, y = self._corner(row, column)
        return self.figure.add_axes((x, y, self.across / self.width, self.down / self.height))

    def write(self, row: int, column: int, text: str) -> None:
        """Lines of text from the top of a place without a panel."""
        x, y = self._corner(row, column)
        self.figure.text(x, y + self.down / self.height, text, va="top", family="monospace", fontsize=8.5)

    def label(self, row: int, text: str) -> None:
        """A name for a row."""
        _, y = self._corner(row, 0)
        x, y = self.left / self.width / 2, y + self.down / self.height / 2
        self.figure.text(x, y, text, ha="center", va="center", rotation=90, fontsize=11)

    def _corner(self, row: int, column: int) -> tuple[float, float]:
        """The lower left corner of a panel, as parts of the figure."""
        x = self.left + column * (self.across + self.bar)
        y = self.height - self.top - (row + 1) * (self.down + self.head)
        return x / self.width, y / self.height


def save(figure: Figure, path: Path) -> None:
    """Write a PNG file."""
    figure.savefig(path, dpi=110)
