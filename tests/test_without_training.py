"""tools/without_training.py and tools/transformer_detr.py: dense detectors before and after `enact.apply`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_main import run, weights
from torch import Tensor, nn
from torch.testing import assert_close

import enact
from tools import hosts, transformer_detr, without_training
from tools.hosts import HOSTS

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[dict[str, str]]:
    """The checkpoint of a tiny detector of each kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENACT_CACHE", str(cache))
        patch.chdir(tmp_path_factory.mktemp("trained"))
        assert run("--epochs", "1") == 0
        assert run("--epochs", "1", "--model", "conditional_detr") == 0
        detr = "outputs/detr/checkpoint.pth"
        assert transformer_detr.main(["--checkpoint", detr, "--epochs", "1", "--device", "cpu"]) == 0
        yield {model: str(Path(f"outputs/{model}/checkpoint.pth").resolve())
               for model in ("detr", "conditional_detr", "transformer_detr")}  # fmt: skip


def measure(*flags: str) -> Rows:
    """The rows that the command writes to the working folder."""
    assert without_training.main(["--device", "cpu", "--output", "found", "--draws", "1", *flags]) == 0
    rows: Rows = json.loads(Path("found.json").read_text())["rows"]
    return rows


@pytest.mark.usefixtures("empty_folder")
def test_every_host_is_clustered_and_then_what_it_was(
    trained: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    clustered: list[list[str]] = []
    monkeypatch.setattr(enact, "apply", lambda *_, **how: clustered.append(enact.plugin.apply(*_, **how)))
    rows = measure("--checkpoint", *trained.values(), "--kinds", "plus, keys", "--sigmas", "3")
    assert [len(names) for names in clustered] == [2] * len(HOSTS)
    assert [row["host"] for row in rows] == [host.title for host in HOSTS.values() for _ in range(3)]
    for host, dense, after in zip(HOSTS.values(), rows[::3], rows[2::3], strict=True):
        assert after["as before"] == {"modules": True, "weights": True, "outputs": True}, host.title
        assert (after["AP"], after["AP50"]) == (dense["AP"], dense["AP50"])
        if host.encoder is not None:
            assert 0 < dense["largest difference from our encoder"] < 1e-5, host.title
        assert f"| {host.title} | plus, keys | 3 |" in Path("found.md").read_text()
    assert Path("found.png").stat().st_size > 5000


@pytest.mark.usefixtures("empty_folder")
def test_it_scores_the_dense_model_and_then_every_kind_and_number_of_clusters(trained: dict[str, str]) -> None:
    flags = ["--hosts", "detr", "--kinds", "uniform", "paper", "--sigmas", "0.5", "5"]
    rows = measure("--checkpoint", trained["detr"], *flags)
    assert [(row["kind"], row["sigma"]) for row in rows] == [
        ("dense", None), *((kind, sigma) for kind in ("uniform", "paper") for sigma in (0.5, 5)),
        ("after enact.remove", None),
    ]  # fmt: skip
    lengths = [row["tokens a cluster"] for row in rows]
    assert lengths[0] == 1
    assert lengths[1] < lengths[2]
    assert lengths[1:3] == pytest.approx(lengths[3:5], rel=0.1)  # as many uniform ones, but for layer 2


def leave_the_clusters(part: nn.Module) -> None:
    """Instead of `enact.remove`."""


def lose_a_bit(part: nn.Module) -> None:
    enact.plugin.remove(part)
    bias = part.get_parameter("encoder.layers.1.norm2.bias").data
    bias[0] = torch.nextafter(bias[0], bias[0] + 1)


def forget_a_class(part: nn.Module) -> None:
    class Other(nn.Linear):
        pass

    enact.plugin.remove(part)
    part.get_submodule("encoder.layers.0.linear1").__class__ = Other


@pytest.mark.usefixtures("empty_folder")
@pytest.mark.parametrize(
    ("remove", "wrong"),
    [
        (leave_the_clusters, {"modules", "weights", "outputs"}),
        (lose_a_bit, {"weights"}),
        (forget_a_class, {"modules"}),
    ],
)
def test_what_remove_does_not_restore_is_found(
    remove: Any, wrong: set[str], trained: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enact, "remove", remove)
    flags = ["--hosts", "detr", "--kinds", "paper", "--sigmas", "3"]
    same = measure("--checkpoint", trained["detr"], *flags)[-1]["as before"]
    assert {name for name in same if not same[name]} == wrong


@pytest.mark.usefixtures("empty_folder")
def test_an_encoder_with_other_outputs_than_ours_is_seen(
    trained: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(hosts, "encoder_to_huggingface", lambda _, state: state)  # weights as drawn
    flags = ["--hosts", "hf_detr", "--kinds", "paper", "--sigmas", "3"]
    rows = measure("--checkpoint", trained["detr"], *flags)
    assert rows[0]["largest difference from our encoder"] > 1e-3


@pytest.mark.usefixtures("empty_folder")
def test_one_cluster_a_token_costs_nothing(trained: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(without_training.KINDS, "uniform", {"regions": "tokens"})
    losses = []
    evaluate = without_training.Run.evaluate

    def remembered(run: without_training.Run) -> dict[str, Any]:
        record = evaluate(run)
        losses.append(record["test_loss"])
        return record

    monkeypatch.setattr(without_training.Run, "evaluate", remembered)
    measure("--checkpoint", trained["detr"], "--hosts", "detr", "--kinds", "uniform", "--sigmas", "3")
    dense, clustered, _ = losses
    assert clustered == pytest.approx(dense, abs=1e-4)


def test_the_detr_around_a_transformer_starts_from_the_dense_one(trained: dict[str, str]) -> None:
    before, after = (weights(Path(trained[model]).parent) for model in ("detr", "transformer_detr"))
    assert after.keys() - before.keys() == transformer_detr.OWN
    for name, tensor in before.items():
        assert_close(after[name], tensor, atol=0.05, rtol=0)  # but for an epoch
        if tensor.dim() > 1:
            assert not torch.equal(after[name], tensor)


def test_the_detr_around_a_transformer_does_not_see_who_shares_the_batch(trained: dict[str, str]) -> None:
    config = hosts.load_detector(Path(trained["detr"]), torch.device("cpu")).config
    model = transformer_detr.TransformerDetr(config).eval()
    mask = torch.arange(48) >= torch.tensor([[48], [32]])
    pad_mask = mask[:, None].expand(2, 32, 48)
    features = torch.randn(2, config.hidden_dim, 8, 12)

    def logits(image: slice, width: int) -> Tensor:
        model.backbone = model.input_proj = nn.Identity()  # whose features near the edge are another matter
        found: Tensor = model(features[image, :, :, : width // 4], pad_mask[image, :, :width])["pred_logits"]
        return found

    assert_close(logits(slice(1, 2), 32), logits(slice(0, 2), 48)[1:])


@pytest.mark.usefixtures("empty_folder")
def test_what_cannot_be_measured_is_refused(trained: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--epochs", "1", "--enact") == 0
    clustered = "outputs/detr_enact/checkpoint.pth"
    assert without_training.main(["--checkpoint", clustered]) == 2
    assert "is no dense DETR or Conditional DETR" in capsys.readouterr().err
    assert transformer_detr.main(["--checkpoint", clustered]) == 2
    assert "is no dense DETR; give one that is" in capsys.readouterr().err
    assert without_training.main(["--checkpoint", trained["detr"], "--hosts", "transformer"]) == 2
    assert "--hosts transformer needs a --checkpoint of a transformer_detr" in capsys.readouterr().err
