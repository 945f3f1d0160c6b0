"""tools/demo.py and tools/side_by_side.py: what they compare, and the page in a real browser."""

from __future__ import annotations

import dataclasses
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium, complaints, requested_urls
from PIL import Image
from test_clusters_view import TINY
from torch import Tensor, nn
from torch.testing import assert_close

import engine
from configs.schema import recipe
from datasets import Batch, eval_transform
from models import build_model_from, build_postprocessor
from tools import demo, side_by_side
from tools.detector_files import LoadedDetector, load_detector
from tools.side_by_side import Arm, arms_of, look_at, set_smoothing_sigma
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("empty_folder")
NAMES = {1: "circle", 2: "square", 3: "<b>ring</b>"}


def detector(model: str = "detr", enact: str | None = None, **fields: Any) -> LoadedDetector:
    """A small one with new weights that is sure of what it finds."""
    torch.manual_seed(1)
    config = recipe(model, enact, **{**TINY, "num_classes": 4, "shapes_train": 16, "shapes_val": 6, **fields})
    built = build_model_from(config).eval()
    with torch.no_grad():
        built.get_parameter("class_embed.weight").mul_(8)
    return LoadedDetector(built, config, NAMES)


def picture(width: int = 80, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def detections(one: LoadedDetector, image: Image.Image) -> dict[str, Tensor]:
    """What a detector finds in a picture, straight."""
    pixels = eval_transform(one.config.eval_short_side, one.config.max_long_side)(image).unsqueeze(0)
    batch = Batch(pixels, torch.zeros(1, *pixels.shape[2:], dtype=torch.bool), [])
    with torch.no_grad():
        outputs = engine.forward(one.model, batch, amp=False)
    return build_postprocessor(one.config.model)(outputs, torch.tensor([[image.height, image.width]]))[0]


def test_two_detectors_stand_dense_first() -> None:
    dense, clustered = detector(), detector(enact="plus")
    for given in ((dense, clustered), (clustered, dense)):
        arms = arms_of(*given)
        assert [arm.name for arm in arms] == ["detr, dense", "detr, ENACT plus"]
        assert [arm.detector for arm in arms] == [dense, clustered]


def test_a_dense_detector_alone_stands_beside_itself_with_enact() -> None:
    dense = detector()
    before = detections(dense, picture())
    first, second = arms_of(dense)
    assert (first.name, second.name) == ("detr, dense", "the same with enact.apply, untrained")
    looks = look_at(picture(), [first, second], 3.0)
    assert looks[0].tokens_and_clusters()[1] is None
    tokens, clusters = looks[1].tokens_and_clusters()
    assert clusters is not None
    assert 1 <= clusters < tokens == 10 * 14
    assert_close(detections(dense, picture()), before)  # it is as it was
    state = arms_of(dense)[1].detector.model.state_dict()
    assert_close(state, second.detector.model.state_dict())
    assert [arm.name for arm in arms_of(detector("anchor_detr"))] == ["anchor_detr, dense"]
    assert [arm.name for arm in arms_of(detector(enact="paper"))] == ["detr, ENACT paper"]


@pytest.mark.parametrize("model", ["detr", "anchor_detr"])
def test_another_sigma_is_as_if_the_model_had_been_built_with_it(model: str) -> None:
    one, other = detector(model, "paper", smoothing_sigma=3.0), detector(model, "paper", smoothing_sigma=1.0)
    expected = detections(other, picture())
    with pytest.raises(AssertionError):
        assert_close(detections(one, picture()), expected)
    set_smoothing_sigma(one.model, 1.0)
    assert_close(detections(one, picture()), expected)


@pytest.mark.parametrize("model", ["detr", "conditional_detr"])
def test_a_look_holds_what_the_detector_finds(model: str) -> None:
    one = detector(model, "paper")
    [look] = look_at(picture(), [Arm("one", one)], one.config.smoothing_sigma)
    expected = detections(one, picture())
    scores = sorted(expected["scores"].tolist())
    middle = scores[len(scores) // 2]
    found = look.found(middle)
    best_first = sorted(range(len(scores)), key=lambda row: -expected["scores"][row])
    rows = [row for row in best_first if expected["scores"][row] >= middle]
    assert 0 < len(rows) < len(scores)
    for key in ("scores", "labels", "boxes"):
        assert_close(found[key], expected[key][rows])
    assert found["names"] == [NAMES.get(label, str(label)) for label in found["labels"].tolist()]
    assert_close(look.with_score(middle).detections["boxes"], expected["boxes"][rows])
    assert look.milliseconds > look.encoder_milliseconds > 0


def test_times_are_those_of_the_pass_and_of_the_encoder_in_it() -> None:
    class Sleeper(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.seconds = seconds

        def forward(self) -> None:
            time.sleep(self.seconds)

    def arm(seconds: float) -> tuple[Arm, Any]:
        model, encoder = nn.Module(), Sleeper(seconds)
        model.encoder = encoder
        config = recipe("detr", **TINY)
        calls: list[float] = []

        def run() -> None:
            calls.append(time.perf_counter())
            time.sleep(0.01)
            encoder()

        return Arm("one", LoadedDetector(model, config, {})), (run, calls)

    (first, (run, calls)), (second, (other, other_calls)) = arm(0.02), arm(0.005)
    times = side_by_side.measure([run, other], [first, second])
    for found, slept in zip(times, ((30, 20), (15, 5)), strict=True):
        assert all(slow >= quick for slow, quick in zip(found, slept, strict=True))  # by how much, the machine decides
    assert times[0][0] > times[1][0]
    assert times[0][1] > times[1][1]
    assert len(calls) == side_by_side.REPEATS + 1
    assert all(one < two for one, two in zip(calls, other_calls, strict=True))  # they take turns
    assert all(one > two for one, two in zip(calls[1:], other_calls, strict=False))
    assert not first.detector.model.get_submodule("encoder")._forward_hooks


def test_the_page_gets_pictures_a_table_and_the_layers() -> None:
    arms = arms_of(detector(), detector(enact="paper", enc_layers=3))
    looks = look_at(picture(), arms, 3.0)
    shown = demo.show(looks, 0.0, arms)
    assert len(shown) == 2 + 1 + 3
    for image in shown[:2]:
        assert image.size == (640, 480)  # enlarged
    rows = [row for row in shown[2].splitlines() if row.startswith("| detr")]
    assert [row.split("|")[1].strip() for row in rows] == ["detr, dense", "detr, ENACT paper"]
    assert [int(row.split("|")[2]) for row in rows] == [len(look.found(0.0)["scores"]) for look in looks]
    for layer in shown[3:]:
        assert min(layer.size) > 300
        assert np.asarray(layer).std() > 20
    assert not np.array_equal(np.asarray(shown[3]), np.asarray(shown[4]))
    nothing = demo.show(looks, 1.1, arms)
    assert all(int(row.split("|")[2]) == 0 for row in nothing[2].splitlines() if row.startswith("| detr"))
    assert demo.show([], 0.5, arms) == [None, None, "Choose a photograph.", None, None, None]


@pytest.mark.parametrize(
    ("size", "expected"), [((80, 60), (640, 480)), ((800, 600), (800, 600)), ((2560, 640), (1280, 320))]
)
def test_boxes_follow_the_size_in_which_a_picture_is_shown(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    [look] = look_at(picture(*size), [Arm("one", detector())], 3.0)
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(demo, "draw", lambda image, found: drawn.update(image=image, **found))
    demo.annotated(look, 0.0)
    assert drawn["image"].size == expected
    assert_close(drawn["boxes"], look.found(0.0)["boxes"] * expected[0] / size[0])


def test_a_photograph_lies_as_its_camera_says() -> None:
    turned = picture(40, 20)
    turned.getexif()[0x0112] = 6
    assert demo.upright(turned).size == (20, 40)
    assert demo.upright(Image.new("LA", (4, 4))).mode == "RGB"


def save(one: LoadedDetector, path: str) -> None:
    torch.save({"model": one.model.state_dict(), "config": dataclasses.asdict(one.config)}, path)


def test_without_gradio_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(detector(), "model.pth")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert demo.main(["--checkpoint", "model.pth", "--device", "cpu"]) == 2
    assert "pip install gradio" in capsys.readouterr().err.splitlines()[-1]
    assert demo.main(["--checkpoint", "nowhere.pth"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_examples_are_validation_images_if_there_are_any(cache: Path) -> None:
    [root] = cache.iterdir()
    found = demo.example_pictures([Arm("one", detector())])
    assert found == [(root / "val2017" / f"00000000000{number}.jpg").resolve() for number in (1, 2, 3, 4)]
    assert demo.example_pictures([Arm("one", detector(coco_path="nowhere"))]) == []


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def served(arms: list[Arm], examples: list[Path]) -> Iterator[str]:
    """The address of the page."""
    pytest.importorskip("gradio")
    page = demo.build_page(arms, examples)
    try:
        yield demo.serve(page, "127.0.0.1", free_port(), examples, wait=False)
    finally:
        page.close()


def wait_for(condition: Any, seconds: float = 40) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.2)
    pytest.fail("the page did not change")


@pytest.mark.slow
def test_a_browser_uploads_a_photograph_and_sees_both_detectors(monkeypatch: pytest.MonkeyPatch) -> None:
    save(detector(), "dense.pth")
    save(detector(enact="paper"), "enact.pth")
    picture(200, 150).save("photo.jpg")
    cpu = torch.device("cpu")
    arms = arms_of(load_detector(Path("enact.pth"), cpu), load_detector(Path("dense.pth"), cpu))
    with chromium(1400, 1000) as driver, served(arms, demo.example_pictures(arms)) as address:

        def find(selector: str) -> Any:
            return driver.find_elements("css selector", selector)

        def clusters() -> float | None:
            """Of the row of ENACT, once it is there."""
            rows = [row.text for row in find("#table tr") if "ENACT paper" in row.text]
            return float(re.findall(r"(\d+)$", rows[0])[0]) if rows else None

        def enter(slider: str, value: str) -> None:
            [field] = find(f"{slider} input[type=number]")
            driver.execute_script("arguments[0].value = ''", field)
            field.send_keys(value + "\n\t")

        driver.get(address)
        wait_for(lambda: find("#photograph input[type=file]"))[0].send_keys(str(Path("photo.jpg").resolve()))
        first = wait_for(clusters)
        for name in ("arm-0", "arm-1", "layer-0", "layer-1"):
            [image] = wait_for(lambda name=name: find(f"#{name} img"))
            wait_for(lambda image=image: driver.execute_script("return arguments[0].naturalWidth", image) > 300)
        text = find("#table")[0].text
        assert text.index("detr, dense") < text.index("detr, ENACT paper")
        assert text.count(" ms") == 4
        enter("#sigma", "0.5")
        wait_for(lambda: clusters() not in (None, first))
        enter("#score", "1")
        wait_for(lambda: re.search(r"detr, dense 0 ", find("#table")[0].text))
        assert [url for url in requested_urls(driver) if not url.startswith((address, "data:", "blob:"))] == []
        assert complaints(driver) == []
        another, port = demo.build_page(arms), int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(InputError, match="choose another --port"):
            demo.serve(another, "127.0.0.1", port, wait=False)
