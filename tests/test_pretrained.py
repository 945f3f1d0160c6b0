"""--pretrained and --freeze: a run that starts from the weights of another, and trains a part of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_main import broken, run, weights
from torch.testing import assert_close

from models.checkpoints import to_published
from models.pretrained import save_huggingface

pytestmark = pytest.mark.usefixtures("empty_folder")


def drawn(*flags: str) -> dict[str, torch.Tensor]:
    """The weights of a run that has trained for an epoch."""
    assert run("--output_dir", "source", "--epochs", "1", *flags) == 0
    return weights("source")


def start(path: str, *flags: str) -> dict[str, torch.Tensor]:
    """The weights after an epoch with learning rates of zero, that is, those of the start."""
    still = ["--epochs", "1", "--lr", "0", "--lr_backbone", "0", "--weight_decay", "0"]
    assert run("--output_dir", "run", "--pretrained", path, *still, *flags) == 0
    return weights("run")


@pytest.mark.parametrize("form", ["ours", "published", "folder", "safetensors", "bin"])
def test_a_run_starts_from_weights_in_any_form(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = ["--backbone_norm", "frozen", "--backbone_stage", "4"]  # the only ones that Hugging Face has
    source = drawn(*backbone)
    state = torch.load("source/checkpoint.pth", weights_only=True)
    paths = {"ours": "source/checkpoint.pth", "published": "published.pth", "folder": "theirs",
             "safetensors": "theirs/model.safetensors", "bin": "weights.bin"}  # fmt: skip
    if form in ("folder", "safetensors"):
        pytest.importorskip("safetensors")
        save_huggingface(Path("theirs"), source, state["config"], state["class_names"], state["config"]["num_classes"])
    torch.save({"model": to_published(source)}, "published.pth")
    torch.save(source, "weights.bin")
    assert_close(start(paths[form], *backbone), source, rtol=0, atol=0)
    assert f"start from the weights of {paths[form]}" in capsys.readouterr().err


def test_a_head_for_other_classes_and_new_layers_stay_as_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    source = drawn("--num_classes", "9")
    found = start("source/checkpoint.pth", "--enact")
    said = capsys.readouterr().err
    assert "2 layers of ENACT are new and stay as drawn" in said
    assert "the class head has 10 rows in the weights, 7 in the model, and stays as drawn" in said
    for key in source.keys() - {"class_embed.weight", "class_embed.bias"}:
        assert_close(found[key], source[key], rtol=0, atol=0)


def test_weights_in_our_layout_of_the_official_variant_are_rewritten(capsys: pytest.CaptureFixture[str]) -> None:
    drawn("--enact", "official")
    start("source/checkpoint.pth", "--enact")
    assert "the query and value slices of the encoder's projections are scaled" in capsys.readouterr().err


def test_a_run_that_goes_on_does_not_start_again() -> None:
    drawn("--seed", "1")
    flags = ["--output_dir", "run", "--pretrained", "source/checkpoint.pth"]
    assert run(*flags, "--epochs", "1") == 0
    after_one = weights("run")
    assert run(*flags, "--epochs", "1", "--resume", "auto") == 0
    assert_close(weights("run"), after_one, rtol=0, atol=0)


def test_frozen_parts_stay_and_the_others_learn() -> None:
    source = drawn()
    flags = ["--freeze", "[backbone,encoder.layers.0]", "--epochs", "1"]
    assert run("--output_dir", "run", "--pretrained", "source/checkpoint.pth", *flags) == 0
    for key, value in weights("run").items():
        if key.startswith(("backbone.", "encoder.layers.0.")):
            assert_close(value, source[key], rtol=0, atol=0)
        elif key.endswith("linear1.weight"):
            assert not torch.equal(value, source[key]), key


def test_bad_starts_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("letter.safetensors").write_text("Dear reader")
    broken("no weights at nowhere.pth; check --pretrained", "--pretrained", "nowhere.pth", capsys=capsys)
    broken("is not a safetensors file", "--pretrained", "letter.safetensors", capsys=capsys)
    broken("no part 'backbon'; its parts are backbone", "--freeze", "[backbon]", capsys=capsys)
    every = "[backbone,input_proj,encoder,decoder,query_embed,class_embed,bbox_embed]"
    broken("nothing is left to train", "--freeze", every, capsys=capsys)
