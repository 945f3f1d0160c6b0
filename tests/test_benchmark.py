"""tools/benchmark.py as a command, on tiny detectors and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from configs.schema import Config
from datasets import normalize
from preparation import build_data
from tools import benchmark, benchmark_loading, benchmark_report
from tools.benchmark_arms import ARMS
from tools.benchmark_inputs import cells_of, coco_pictures, inference_batch, largest_batch, training_batch
from tools.benchmark_subjects import PRODUCT, PRODUCT_SIZES, Cell

ROOT = Path(__file__).parents[1]
# Of main.py, for detectors and pictures that cost next to nothing.
TINY = [
    "--backbone", "resnet10", "--backbone_stage", "1", "--no_dilation", "--enc_layers", "2", "--dec_layers", "2",
    "--hidden_dim", "32", "--nheads", "4", "--dim_feedforward", "64", "--num_queries", "40",
    "--num_query_position", "13",
]  # fmt: skip
RUN = ["--device", "cpu", "--scale", "0.05", "--repeats", "2", "--batch_size", "2"]
ENCODERS = ["dense naive", "dense", "ENACT official", "ENACT paper", "ENACT plus"]


@pytest.fixture(autouse=True)
def _small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRODUCT_SIZES, "cpu", 128)


def run(*flags: str, output: Path, tiny: list[str] = TINY) -> dict[str, Any]:
    """The report of a command that worked."""
    assert benchmark.main([*RUN, *flags, "--output", str(output), "--", *tiny]) == 0
    report: dict[str, Any] = json.loads(output.with_suffix(".json").read_text())
    return report


def command(*flags: str) -> benchmark.Benchmark:
    """A command that has not run."""
    words = [*RUN, *flags, "--", *TINY]
    return benchmark.Benchmark(benchmark.build_parser().parse_args(words), words)


def config_of(row: str, arm: str = "dense", *flags: str) -> Config:
    return command(*flags).config(row, arm)


def table_of(output: Path, place: int = 0) -> list[dict[str, str]]:
    """The rows of one of the tables of OUTPUT.md, by column; of columns of one name the first."""
    tables = [part for part in output.with_suffix(".md").read_text().split("\n\n") if part.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in tables[place].splitlines())
    return [dict(reversed(list(zip(header, row, strict=True)))) for row in rows]


@cache
def full_size(row: str) -> Config:
    words = ["--device", "cpu"]
    return benchmark.Benchmark(benchmark.build_parser().parse_args(words), words).config(row, "dense")


def test_model_scope_measures_every_arm_of_a_row(tmp_path: Path) -> None:
    output = tmp_path / "found"
    report = run("--rows", "detr_r50", output=output)
    assert [record["arm"] for record in report["results"]] == list(ARMS)
    for record in report["results"]:
        assert record["error"] is None
        assert record["bytes"] > 0
        assert 0 < record["flops_encoder"] < record["flops"]
        assert len(record["train"]["runs"]) == len(record["inference"]["runs"]) == 2
        assert (len(record["clusters"]) == 2) == (ARMS[record["arm"]].enact is not None)
    naive, dense, _, paper, _ = table_of(output)
    assert [row["encoder"] for row in table_of(output)] == ENCODERS
    assert (naive["GB published"], paper["GB published"]) == ("36.5", "23.5")
    assert paper["train s/image published"] == "0.0488"
    assert naive["of naive"] == dense["of dense"] == "1.00"
    sizes = table_of(output, 1)
    assert float(sizes[0]["GFLOP an image"]) == pytest.approx(report["results"][0]["flops"] / 1e9, abs=0.05)
    assert output.with_suffix(".png").stat().st_size > 5000


def test_encoder_scope_sets_the_work_against_the_rate_of_the_machine(tmp_path: Path) -> None:
    output = tmp_path / "found"
    report = run("--scope", "encoder", "--rows", "detr_r50", "--arms", "naive", "dense", "paper", output=output)
    product, *records = report["results"]
    assert product["arm"] == PRODUCT
    rate = product["operations"] / product["product"]["median"]
    for record, row in zip(records, table_of(output), strict=True):
        assert {"train", "inference"} <= record.keys()
        assert record["tokens_real"] < record["tokens_padded"]
        assert ("train_long" in record) == (not ARMS[record["arm"]].published)
        if "train_long" in record:
            assert record["tokens_long"] == pytest.approx(3400 * 0.05**2, rel=0.2)  # a trial's scale shrinks it too
        expected = 3 * record["flops"] / record["train"]["median"] / rate
        assert float(row["of the machine's rate"]) == pytest.approx(expected, abs=0.006)
    assert records[0]["bytes"] > records[1]["bytes"]  # the maps
    shares = table_of(output, 1)
    assert [row["encoder"] for row in shares] == ["dense naive", "dense", "ENACT paper"]
    assert shares[0]["fused attention"] == "0.0%" != shares[1]["fused attention"]


def test_sweep_scope_gives_a_curve_of_every_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_report, "MANY_TOKENS", 50)
    output = tmp_path / "found"
    flags = ["--scope", "sweep", "--rows", "anchor_detr_r50_dc5", "--arms", "dense", "paper"]
    report = run(*flags, "--tokens", "48", "108", "192", output=output)
    assert [record["tokens"] for record in report["results"]] == [48, 48, 108, 108, 192, 192]
    assert set(report["exponents"]) == {"anchor_detr_r50_dc5 dense", "anchor_detr_r50_dc5 ENACT paper"}
    for row in table_of(output):
        expected = report["exponents"][f"{row['model']} {row['encoder']}"]
        assert float(row["exponent"]) == pytest.approx(expected, abs=0.01)
    assert output.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize("row", ["detr_r50", "conditional_detr_r101", "anchor_detr_r50_dc5"])
def test_criterion_scope_finds_both_ways_equal(row: str, tmp_path: Path) -> None:
    report = run("--scope", "criterion", "--rows", row, output=tmp_path / "found")
    assert [record["arm"] for record in report["results"]] == ["all layers at once", "layer by layer"]
    assert all(record["largest_difference"] < 1e-5 for record in report["results"])
    assert [line["way"] for line in table_of(tmp_path / "found")] == ["all layers at once", "layer by layer"]


def test_loading_scope_compares_ways_that_end_in_the_same_tensor(tmp_path: Path, cache: Path) -> None:
    output, scenes = tmp_path / "found", str(next(cache.iterdir()))
    report = run("--scope", "loading", output=output, tiny=["--coco_path", scenes])
    ours, published = report["results"]
    assert 4 * ours["bytes"] == published["bytes"]
    assert table_of(output)[0]["images/s a core, training"] == f"{2 / ours['train']['median']:.1f}"
    config = config_of("detr_r50")
    train_set, _ = build_data(replace(config, coco_path=scenes))
    samples = [train_set[0, index] for index in range(4)]
    loaded, floats = benchmark_loading.load_bytes(samples), benchmark_loading.load_floats(samples)
    assert_close(normalize(*loaded), floats.images)
    assert torch.equal(loaded.pad_mask, floats.pad_mask)
    assert benchmark.main([*RUN, "--scope", "loading", "--batch_size", "9999", "--", "--coco_path", scenes]) == 2


def test_arms_are_measured_compiled_and_in_bf16_where_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    flags = ["--scope", "encoder", "--rows", "detr_r50", "--arms", "dense", "--compile", "--repeats", "1"]
    report = run(*flags, "--precisions", "fp32", "bf16", output=tmp_path / "found")
    cells = [(record["precision"], record["compiled"]) for record in report["results"] if record["arm"] == "dense"]
    assert cells == [("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)]
    assert compiled == ["Encoder", "Encoder"]


def test_out_of_memory_becomes_a_cell_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = benchmark.Benchmark.build

    def fails(self: benchmark.Benchmark, cell: Cell) -> Any:
        subject = build(self, cell)
        if cell.arm == "naive":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if cell.arm == "dense":  # in the middle of the timed runs
            subject.steps["train"] = failing(subject.steps["train"], after=3)
        return subject

    monkeypatch.setattr(benchmark.Benchmark, "build", fails)
    output = tmp_path / "found"
    report = run("--rows", "detr_r50", "--arms", "naive", "dense", "paper", output=output)
    assert [record["error"] for record in report["results"]] == ["out of memory", "out of memory", None]
    assert [row["GiB kept"] == "out of memory" for row in table_of(output)] == [True, True, False]


def failing(step: Callable[[], object], after: int) -> Callable[[], object]:
    calls = []

    def run_step() -> object:
        calls.append(None)
        if len(calls) > after:
            raise MemoryError
        return step()

    return run_step


def test_results_name_no_folder_of_this_machine(tmp_path: Path) -> None:
    output = tmp_path / "found"
    weights = tmp_path / "weights.pth"  # never read: arms have random backbones
    run("--scope", "criterion", "--rows", "detr_r50", output=output, tiny=[*TINY, f"--backbone_weights={weights}"])
    for suffix in (".json", ".md"):
        text = output.with_suffix(suffix).read_text()
        assert "--output found" in text
        assert "--backbone_weights=weights.pth" in text
        for folder in (tmp_path, ROOT, Path.home()):
            assert f"{folder}/" not in text


def test_results_come_with_where_they_are_from_and_the_configuration_of_every_arm(tmp_path: Path) -> None:
    output = tmp_path / "found"
    report = run("--scope", "encoder", "--rows", "detr_r50", "--arms", "naive", "dense", output=output)
    assert {"device", "torch", "commit", "command", "threads"} <= report["environment"].keys()
    assert report["environment"]["command"].startswith("python tools/benchmark.py --device cpu")
    assert (report["seed"], report["repeats"], report["scale"]) == (42, 2, 0.05)
    config = report["configs"]["detr_r50"]["dense"]
    assert (config["hidden_dim"], config["dropout"], config["attention_dropout"]) == (32, 0.1, 0.0)
    assert "detr_r50 0.1 and 0 on the attention weights of dense" in output.with_suffix(".md").read_text()


def test_on_a_cpu_no_arm_of_ours_drops_attention_weights() -> None:
    """For with dropout torch's attention would store the maps there, and nothing fused would be measured."""
    for arm, choice in ARMS.items():
        config = config_of("detr_r50", arm)
        weights = None if choice.published else 0.0
        assert (config.enact, config.dropout, config.attention_dropout) == (choice.enact, 0.1, weights)
    assert config_of("detr_r50", "dense", "--estimate").attention_dropout is None


def test_inputs_are_the_same_for_every_arm() -> None:
    steps = [command().build(Cell("detr_r50", arm, batch=3)).steps["train"] for arm in ARMS]
    first: Any = steps[0]
    for step in steps:
        assert_batches_equal(step.batch, first.batch)  # type: ignore[attr-defined]
    encoders = [command("--scope", "encoder").build(Cell("detr_r50", arm, batch=3)).steps for arm in ARMS]
    for name in ("train", "train_long"):
        maps: list[Any] = [steps[name].call.maps for steps in encoders if name in steps]  # type: ignore[attr-defined]
        for tokens, cells in maps:
            assert_close((tokens, cells), tuple(maps[0]), atol=0, rtol=0)


def assert_batches_equal(one: Any, other: Any) -> None:
    assert_close((one.images, one.pad_mask), (other.images, other.pad_mask), atol=0, rtol=0)
    for mine, theirs in zip(one.targets, other.targets, strict=True):
        assert_close(mine["boxes"], theirs["boxes"], atol=0, rtol=0)
        assert_close(mine["labels"], theirs["labels"], atol=0, rtol=0)


def test_arms_that_share_an_encoder_have_the_same_weights() -> None:
    naive, dense = (command().build(Cell("detr_r50", arm)).steps["train"] for arm in ("naive", "dense"))
    ours = dense.model.state_dict()  # type: ignore[attr-defined]
    for name, value in naive.model.state_dict().items():  # type: ignore[attr-defined]
        # Each has been through one step, in which dropout and padding moved the weights a little differently.
        assert_close(value, ours[name], atol=1e-3, rtol=0)


def test_inputs_follow_from_the_seed_alone() -> None:
    config = config_of("detr_r50")
    state = torch.get_rng_state()
    first = training_batch(config, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert_batches_equal(training_batch(config, 3), first)
    alone, other = training_batch(config, 1), training_batch(config, 1, seed=43)
    height, width = alone.images.shape[2:]
    assert torch.equal(alone.images[0], first.images[0, :, :height, :width])
    assert alone.images.shape != other.images.shape or not torch.equal(alone.images, other.images)


def test_sizes_are_those_of_coco_through_the_real_transforms() -> None:
    pictures, config = coco_pictures(), full_size("detr_r50")
    assert len(pictures) == 100
    assert max(max(picture.height, picture.width) for picture in pictures) == 640
    assert inference_batch(config).images.shape[2:] == (800, 1066)
    real = ~largest_batch(config, 2).pad_mask
    assert [(int(mask[:, 0].sum()), int(mask[0].sum())) for mask in real] == [(800, 1333), (1333, 800)]


def test_the_batches_that_goals_are_about_are_fixed() -> None:
    """Figures of different versions are comparable only on the same sizes."""
    found = {}
    for row, images in (("detr_r50", 8), ("detr_r50_dc5", 2)):
        cells = cells_of(training_batch(full_size(row), images), full_size(row))
        found[row] = (tuple(cells.shape), int((~cells).sum()))
    assert found == {"detr_r50": ((8, 29, 28), 3732), "detr_r50_dc5": ((2, 58, 50), 4016)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows", "detr_r5"], "no row detr_r5"),
        (["--rows", "detr_r50_enact", "--arms", "dense"], "no arm is left"),
        (["--rows", "detr_r50", "--", "--hidden_dim", "33"], "hidden_dim must be a multiple"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main([*RUN, "--output", str(tmp_path / "found"), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert not list(tmp_path.iterdir())


def test_rows_of_enact_are_measured_with_its_arms_alone() -> None:
    cells = [cell for group in command("--rows", "detr_r50_enact").groups() for cell in group]
    assert [(cell.row, cell.arm) for cell in cells] == [("detr_r50", arm) for arm in ("official", "paper", "plus")]
