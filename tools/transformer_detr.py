"""A small DETR around torch's own `nn.Transformer`, and the command that trains it.

    python tools/transformer_detr.py --checkpoint outputs/detr/checkpoint.pth

`nn.Transformer` adds positions nowhere, so that a trained DETR's weights give other outputs in it. This one starts from
them and is trained for a few epochs more, on the data of the checkpoint's run. What it writes is what main.py writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import Config
from main import Run
from models import build_model_from
from models.layers import collect_outputs, feature_pad_mask
from preparation import pick_device
from tools.detector_files import load_detector
from util import checkpoint
from util.errors import InputError

OWN = {"encoder.norm.weight", "encoder.norm.bias"}  # a DETR's encoder has none


class TransformerDetr(nn.Transformer):
    """An `nn.Transformer` between a backbone and two heads, as in the short DETR of arXiv 2005.12872, appendix A.6.

    Positions are added once, to the encoder's input; the learned queries are the decoder's input; only the last
    decoder layer predicts. Weights have the names that a `Detr`'s have.

    Args:
        config: of a dense DETR.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(
            config.hidden_dim, config.nheads, config.enc_layers, config.dec_layers, config.dim_feedforward,
            config.dropout, batch_first=True,
        )  # fmt: skip
        detr: Any = build_model_from(config)
        self.backbone, self.input_proj = detr.backbone, detr.input_proj
        self.position_embedding, self.query_embed = detr.position_embedding, detr.query_embed
        self.class_embed, self.bbox_embed = detr.class_embed, detr.bbox_embed
        self.num_queries = config.num_queries

    def forward(self, images: Tensor, pad_mask: Tensor) -> dict[str, Tensor | list[dict[str, Tensor]]]:  # type: ignore[override]
        """As `Detr`, with no "aux_outputs"."""
        features = self.backbone(images)
        cells = feature_pad_mask(pad_mask, features).to(features.device, non_blocking=True)
        position, padding = self.position_embedding(cells).flatten(1, 2), cells.flatten(1)  # (B, N, C), (B, N)
        tokens = self.input_proj(features).flatten(2).transpose(1, 2) + position
        queries = self.query_embed.weight.expand(len(images), -1, -1)
        states = super().forward(tokens, queries, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        states = states.unsqueeze(0)  # of one layer
        return collect_outputs(self.class_embed(states), self.bbox_embed(states).sigmoid(), aux_loss=False)


def is_transformer_detr(path: Path) -> bool:
    """Whether a checkpoint is of a `TransformerDetr`."""
    names = set(checkpoint.load(path)["model"])
    return names >= OWN


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a dense detr, whose weights it starts from")
    parser.add_argument("--output_dir", default="outputs/transformer_detr")
    parser.add_argument("--epochs", type=int, default=4, help="the last quarter at a tenth of the learning rate")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    try:
        train(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def train(options: argparse.Namespace) -> None:
    """From the weights of the checkpoint to a run in the output folder."""
    detr, config, _ = load_detector(options.checkpoint, torch.device("cpu"))
    if config.model != "detr" or config.enact is not None:
        raise InputError(f"{options.checkpoint} is no dense DETR; give one that is")

    def build(config: Config) -> TransformerDetr:
        model = TransformerDetr(config)
        missing, unexpected = model.load_state_dict(detr.state_dict(), strict=False)
        assert set(missing) == OWN
        assert not unexpected
        return model

    changes = {
        "output_dir": options.output_dir, "epochs": options.epochs, "lr_drop": max(1, options.epochs * 3 // 4),
        "aux_loss": False, "resume": None, "eval": False,
    }  # fmt: skip
    Run(dataclasses.replace(config, **changes), pick_device(options.device), build).go()


if __name__ == "__main__":
    sys.exit(main())
