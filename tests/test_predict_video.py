"""Detection in videos."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_predict import picture, run, save_checkpoint, save_picture, slow_detections, table
from torch.testing import assert_close

pytestmark = pytest.mark.usefixtures("empty_folder")

IDENTITY = b"".join(number.to_bytes(4, "big") for number in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
QUARTER_TURN = b"".join(
    number.to_bytes(4, "big", signed=True) for number in (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
)


def save_video(name: str, frames: int = 5, turned: bool = False) -> list[Image.Image]:
    """A video, as PyAV decodes it; `turned` marks it as one to be shown a quarter turn to the right."""
    av = pytest.importorskip("av")
    with av.open(name, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 4_000_000
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(picture(64, 96, seed=number))))
        container.mux(stream.encode())
    if turned:
        content = Path(name).read_bytes()
        place = content.index(IDENTITY, content.index(b"tkhd"))
        Path(name).write_bytes(content[:place] + QUARTER_TURN + content[place + len(IDENTITY) :])
    with av.open(name) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


@pytest.mark.parametrize("turned", [False, True])
def test_every_frame_of_a_video_is_looked_at(turned: bool) -> None:
    av = pytest.importorskip("av")
    model = save_checkpoint()
    frames = save_video("clip.mp4", turned=turned)
    save_picture("duck.png")
    assert run("clip.mp4", "duck.png", "--score", "0", "--batch_size", "2") == 0
    rows = table()
    for number, frame in enumerate(frames):
        shown = frame.transpose(Image.Transpose.ROTATE_270) if turned else frame
        expected = slow_detections(model, "detr", shown, 0.0)
        found = [row for row in rows if row["frame"] == str(number)]
        boxes = torch.tensor([[float(row[side]) for side in ("left", "top", "right", "bottom")] for row in found])
        assert_close(boxes, torch.stack([row[2] for row in expected]), atol=1e-3, rtol=0)
    assert {row["file"] for row in rows if row["frame"] == ""} == {"duck.png"}
    assert {entry["file_name"] for entry in json.loads(Path("predictions/detections.json").read_text())} == {"duck.png"}
    with av.open("predictions/clip.mp4") as container:
        assert len(list(container.decode(video=0))) == len(frames)
        assert (container.streams.video[0].width, container.streams.video[0].height) == (
            (64, 96) if turned else (96, 64)
        )
        assert container.streams.video[0].average_rate == 10


def test_a_bad_video_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    save_checkpoint()
    Path("letter.mp4").write_text("Dear reader")
    assert run("letter.mp4", "nowhere.mp4") == 1
    said = capsys.readouterr().err
    assert "skipped: letter.mp4: video cannot be read" in said
    assert "skipped: nowhere.mp4: video cannot be read" in said
    monkeypatch.setitem(sys.modules, "av", None)
    assert run("letter.mp4") == 1
    assert "av is not installed; install it: pip install av" in capsys.readouterr().err
