"""From flags and YAML to a Config."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from configs.cli import parse_args, to_yaml
from configs.schema import Config, recipe
from enact.clustering import Regions
from enact.method import Boundary, ClusterBias, Pooling, Variant
from enact.order import OrderName
from util.errors import InputError


def test_without_data_the_small_recipe_is_laid_over_the_row() -> None:
    config = parse_args(["--model", "detr", "--enact"])
    small = yaml.safe_load(Path("configs/shapes.yaml").read_text())
    assert config.enact == "paper"
    assert {key: getattr(config, key) for key in small} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in small.items()
    }


@pytest.mark.parametrize(("model", "epochs"), [("detr", 12), ("conditional_detr", 6), ("anchor_detr", 6)])
def test_without_data_a_detector_with_reference_points_trains_for_half_as_long(model: str, epochs: int) -> None:
    config = parse_args(["--model", model])
    assert (config.epochs, config.lr_drop, config.hidden_dim) == (epochs, epochs * 2 // 3, 96)


def test_coco_gets_the_published_recipe() -> None:
    dense, clustered = (parse_args(["--coco_path", "COCO", *flags]) for flags in ([], ["--enact"]))
    assert (dense.lr, clustered.lr) == (1e-4, 5e-5)
    assert (dense.backbone, dense.epochs, dense.lr_drop, dense.batch_size) == ("resnet50", 300, 200, 2)
    assert (dense.clip_max_norm, dense.weight_decay, dense.eos_coef, dense.num_queries) == (0.1, 1e-4, 0.1, 100)
    assert clustered.smoothing_sigma == 3.0


def test_flags_hold_over_files_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 0.5\nbatch_size: 3\n")
    for argv in (["--lr", "0.25", "--config", str(file)], ["--config", str(file), "--lr", "0.25"]):
        config = parse_args(argv)
        assert (config.lr, config.batch_size) == (0.25, 3)


def test_a_file_can_pick_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("enact: official\ncoco_path: COCO\n")
    config = parse_args([f"--config={file}"])
    assert (config.enact, config.lr) == ("official", 5e-5)
    assert parse_args([f"--config={file}", "--enact", "null"]).lr == 1e-4


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--dilation"], "dilation", True),
        (["--dilation", "false"], "dilation", False),
        (["--no_aux_loss"], "aux_loss", False),
        (["--eval", "--amp"], "eval", True),
        (["--enact", "official"], "enact", "official"),
        (["--enact", "--eval"], "enact", "paper"),
        (["--train_short_sides", "[64, 96]"], "train_short_sides", (64, 96)),
        (["--coco_path", "null"], "coco_path", None),
    ],
)
def test_switches_and_values(argv: list[str], field: str, value: object) -> None:
    assert getattr(parse_args(argv), field) == value


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--lerning_rate", "1"], "lerning_rate"),
        (["--lr", "fast"], '"lr".*fast'),
        (["--model", "yolo"], "yolo"),
        (["--enact", "better"], "better"),
        (["--batch_size", "2.5"], "batch_size"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--batch_size", "0"], "batch_size and accumulate must be 1 or more"),
        (["--nheads", "7"], "hidden_dim must be a multiple"),
        (["--crop_range", "[600, 384]"], "crop_range"),
    ],
)
def test_wrong_flags_are_one_line_that_names_them(argv: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        parse_args(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rate: 1\n", "learning_rate"),
        ("lr: [1\n", "not valid YAML"),
        ("just a word\n", "must hold fields"),
        ("lr: fast\n", "lr"),
        ("lr: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_a_wrong_config_file_is_one_line_that_names_it(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        parse_args(["--config", str(file)])
    assert "\n" not in str(caught.value)


def test_a_saved_config_reads_back_as_it_was(tmp_path: Path) -> None:
    config = parse_args(["--enact", "--lr", "0.125", "--train_short_sides", "[64]", "--output_dir", "x"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert parse_args(["--config", str(file)]) == config


def test_print_config_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--model", "detr", "--enact", "--lr", "0.125", "--print_config"])
    assert stopped.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["lr"] == 0.125
    assert printed["enact"] == "paper"
    assert printed["backbone"] == parse_args([]).backbone


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in fields(Config))
    assert "bf16 autocast" in text.lower()


def test_recipe_takes_fields_and_refuses_others() -> None:
    assert asdict(recipe("detr", "paper", lr=1.0))["lr"] == 1.0
    with pytest.raises(ValueError, match="learning_rate"):
        recipe("detr", learning_rate=1.0)


@pytest.mark.parametrize("flags", [["--pooling", "mean"], ["--token_order", "hilbert"], ["--max_clusters", "9"]])
def test_choices_within_enact_need_enact(flags: list[str]) -> None:
    assert parse_args([*flags, "--enact"]).enact == "paper"
    with pytest.raises(InputError, match="have no effect without enact"):
        parse_args(flags)


def test_official_takes_the_map_as_it_stands() -> None:
    with pytest.raises(InputError, match="token_order must be raster with enact official"):
        parse_args(["--enact", "official", "--token_order", "windows"])


@pytest.mark.parametrize(
    ("field", "choices"),
    [("enact", Variant), ("regions", Regions), ("pooling", Pooling), ("cluster_bias", ClusterBias),
     ("boundary", Boundary),
     ("token_order", OrderName)],
)  # fmt: skip
def test_the_config_offers_what_enact_offers(field: str, choices: Any) -> None:
    """Configs must not import enact, so the names stand in both."""
    offered = set(get_args(get_type_hints(Config)[field])) - {type(None)}
    names = set().union(*({option} if isinstance(option, str) else set(get_args(option)) for option in offered))
    assert names == set(get_args(choices))
