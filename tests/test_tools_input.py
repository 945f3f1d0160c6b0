"""Files that a user gives to the tools and that hold something else: one line, exit status 2."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from test_predict import save_checkpoint, save_picture
from test_results_table import write_run

from tools import ablation, predict, report, results
from tools.detection_graph import Metadata
from tools.pictures import find_inputs, read_picture
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("empty_folder")


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def holding(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


BAD: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None, "folder": folder, "pipe": pipe, "empty": holding(b""),
    "cut off": holding(b'{"a": [1,'), "binary": holding(b"\x89PNG\r\n\xff\xfe\x00"),
    "another shape": holding(b"[1, 2]"), "a number": holding(b"3"), "nested": holding(b"[" * 100_000),
    "objects": holding(b'[{"model": "detr"}]'),
}  # fmt: skip


def one_line(capsys: pytest.CaptureFixture[str], name: str) -> None:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert name in last


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_config_of_a_detector(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint()
    save_picture("duck.png")
    BAD[bad](Path("sizes.yaml"))
    assert predict.main(["duck.png", "--checkpoint", "model.pth", "--config", "sizes.yaml", "--device", "cpu"]) == 2
    one_line(capsys, "sizes.yaml")


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad not in ("missing", "folder", "pipe")])
def test_bad_detections_of_a_run(bad: str, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    run = write_run(Path("run"), None, 1, 0.2)
    run.joinpath("config.yaml").write_text("shapes_train: 16\nshapes_val: 6\n")
    BAD[bad](run / "detections.json")
    assert report.main(["run", "--device", "cpu"]) == 2
    one_line(capsys, "detection")


@pytest.mark.parametrize("bad", [bad for bad in BAD if bad != "objects"])
@pytest.mark.parametrize("name", ["config.yaml", "log.txt", "environment.json"])
def test_a_bad_file_of_a_finished_run(name: str, bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(Path("run"), None, 1, 0.2) / name
    path.unlink()
    BAD[bad](path)
    if name == "environment.json" and bad in ("another shape", "a number"):
        assert results.main(["run", "--output", "table"]) == 0  # copied into the table as it is
        return
    assert results.main(["run", "--output", "table"]) == 2
    one_line(capsys, "run is not the folder of a finished run")
    assert not Path("table.json").exists()


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_table_is_known_before_hours_of_training(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    BAD[bad](Path("other.json"))
    words = ["--arms", "dense", "--seeds", "1", "--output_dir", "runs", "--include", "other.json", "--output", "table"]
    assert ablation.main(words) == 2
    one_line(capsys, "other.json")
    assert not Path("runs").exists()


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_image(bad: str) -> None:
    BAD[bad](Path("photo.jpg"))
    with pytest.raises(InputError, match=r"photo\.jpg: image cannot be read"):
        read_picture(Path("photo.jpg"))


def test_a_folder_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    Path("mine").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="cannot read mine: Permission denied"):
        find_inputs(["mine"])


def test_names_of_an_exported_file_that_are_none() -> None:
    text = dict.fromkeys(Metadata.__dataclass_fields__, "[]")
    with pytest.raises(InputError, match=r"x\.onnx was not written by tools/export\.py"):
        Metadata.from_text(text, Path("x.onnx"))
