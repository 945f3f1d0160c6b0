"""Draw how a row of tokens becomes clusters: python tools/method_picture.py --output docs/pictures/row.png

The tokens are made up; what is drawn of them is computed by `enact`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from enact.clustering import curvature, sign_changes
from enact.information import filter_tokens, gaussian_taps, self_information
from tools.clusters_panels import PALETTE

TOKENS = 64
SIGMA = 3.0
OBJECTS = ((14.0, 3.0), (30.0, 4.0), (50.0, 2.5))  # place and width, in tokens


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a PNG file")
    options = parser.parse_args(argv)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw_row(made_up_logits()).savefig(options.output, dpi=90)
    return 0


def made_up_logits() -> Tensor:
    """(1, N): a few objects that the probability prefers, and noise."""
    place = torch.arange(TOKENS, dtype=torch.float32)
    noise = torch.rand(TOKENS, generator=torch.Generator().manual_seed(3)) - 0.5
    bumps = [2.2 * torch.exp(-((place - centre) ** 2) / (2 * width**2)) for centre, width in OBJECTS]
    return (torch.stack(bumps).sum(0) + noise).unsqueeze(0)


def draw_row(logits: Tensor) -> Figure:
    """Information, its curvature, and the clusters, of logits (1, N)."""
    information = self_information(logits)
    smoothed = filter_tokens(information, gaussian_taps(SIGMA))
    starts = [0, *sign_changes(smoothed)[0].nonzero()[:, 0].tolist()]
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=[3, 2, 0.8])
    top.bar(range(TOKENS), information[0], color="0.8", label="information of each token")
    top.plot(smoothed[0], color=PALETTE[0], label=f"smoothed over {SIGMA:g} tokens")
    top.set(ylabel="bits", ylim=(0, 1.35 * float(information.max())))
    top.legend(frameon=False, fontsize=8, loc="upper right")
    middle.bar(range(TOKENS), curvature(smoothed)[0], color=PALETTE[1])
    middle.axhline(0, color="0.3", linewidth=0.8)
    middle.set_ylabel("curvature")
    middle.set_yticks([0])
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], TOKENS], strict=True)):
        bottom.barh(0, end - start, left=start - 0.5, color=PALETTE[number % len(PALETTE)], edgecolor="white")
    bottom.set(yticks=[], ylabel="clusters", xlabel=f"{TOKENS} tokens, {len(starts)} clusters", xlim=(-1, TOKENS))
    for axes in (top, middle):
        for start in starts[1:]:
            axes.axvline(start - 0.5, color="0.6", linewidth=0.7, linestyle=":")
    return figure


if __name__ == "__main__":
    sys.exit(main())
