"""Every row of the results table, as a user gets it from its YAML file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from configs.cli import parse_args
from configs.schema import CONFIG_DIR, Config, recipe
from models import build_criterion_from, build_model_from, build_postprocessor

ROWS = sorted(path for path in CONFIG_DIR.glob("*.yaml") if not path.stem.startswith("shapes"))


def command_of(row: Path) -> list[str]:
    """The flags of the command that stands at the top of the file."""
    line = next(line for line in row.read_text().splitlines() if "python main.py" in line)
    return line.partition("python main.py ")[2].split()


def test_every_backbone_and_resolution_has_a_row_with_and_without_enact() -> None:
    expected = {
        f"{model}_{backbone}{feature}{enact}"
        for model in ("detr", "conditional_detr", "anchor_detr")
        for backbone in ("r50", "r101")
        for feature in ("", "_dc5")
        for enact in ("", "_enact")
    }
    assert {row.stem for row in ROWS} == expected


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.stem)
def test_a_row_is_what_its_name_says_and_builds(row: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIG_DIR.parent)
    config = parse_args(command_of(row))
    alone = Config(**yaml.safe_load(row.read_text()))
    assert config == Config(**{**vars(alone), "coco_path": "COCO"})  # nothing is left to the row that --model picks
    anchor, conditional, enact = (part in row.stem for part in ("anchor", "conditional", "enact"))
    assert config.model == ("anchor_detr" if anchor else "conditional_detr" if conditional else "detr")
    assert config.enact == ("paper" if enact else None)
    assert config.backbone == ("resnet101" if "r101" in row.stem else "resnet50")
    assert config.dilation == ("dc5" in row.stem)
    assert config.lr == (5e-5 if enact else 1e-4)
    assert config.batch_size == (1 if anchor or config.dilation else 2)
    assert (config.epochs, config.lr_drop) == ((50, 40) if anchor or conditional else (300, 200))
    assert (config.dropout, config.dim_feedforward) == ((0.0, 1024) if anchor else (0.1, 2048))
    assert (config.cls_loss_coef, config.set_cost_class) == ((2.0, 2.0) if anchor or conditional else (1.0, 1.0))
    assert config.smoothing_sigma == (5.0 if anchor and enact else 3.0)
    with torch.device("meta"):
        model = build_model_from(Config(**{**vars(config), "backbone_weights": None}))
    assert model.num_queries == (900 if anchor else 300 if conditional else 100)
    assert len(build_criterion_from(config).weight_dict) == 18
    assert callable(build_postprocessor(config.model))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.stem)
def test_a_row_opens_with_its_command_and_what_was_published(row: Path) -> None:
    comment = " ".join(line[1:].strip() for line in row.read_text().splitlines() if line.startswith("#"))
    assert "--coco_path COCO" in comment
    assert "Published: AP " in comment or "Nothing was published for this row" in comment
    assert " GPU" in comment or "V100" in comment or "No memory" in comment


@pytest.mark.parametrize("model", ["detr", "conditional_detr", "anchor_detr"])
def test_the_official_variant_has_the_recipe_of_its_row(model: str) -> None:
    paper, official = recipe(model, "paper"), recipe(model, "official")
    assert official == Config(**{**vars(paper), "enact": "official"})


@pytest.mark.parametrize("model", ["detr", "conditional_detr", "anchor_detr"])
@pytest.mark.parametrize("enact", [[], ["--enact"], ["--enact", "official"]])
def test_the_small_recipe_gives_every_image_a_hundred_tokens(model: str, enact: list[str]) -> None:
    config = parse_args(["--model", model, *enact])
    detector = build_model_from(config)
    side = min(*config.train_short_sides, config.eval_short_side)
    images, pad_mask = torch.zeros(1, 3, side, side), torch.zeros(1, side, side, dtype=torch.bool)
    assert detector.backbone(images).shape[2:].numel() >= 100
    assert detector(images, pad_mask)["pred_boxes"].shape == (1, 10, 4)
