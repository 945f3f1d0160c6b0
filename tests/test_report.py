"""report.html: that nothing is outside of it, that names stay text, and that its numbers are the run's."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import chromium, complaints, requested_urls
from PIL import Image
from test_clusters_view import TINY

from configs.cli import parse_args, to_yaml
from configs.schema import recipe
from datasets import CocoDetection, build_coco, eval_transform
from models import build_model_from
from tools import report
from tools.analysis import analyse
from tools.report_charts import Series, line_chart
from tools.report_page import read_log, training_charts, write_report

pytestmark = pytest.mark.usefixtures("empty_folder")
HOSTILE = "<script>alert(1)</script> & \"quotes\" 'here'"
VOID = {"meta", "link", "br", "img", "input", "hr"}
DATA_FLAGS = ["--shapes_train", "16", "--shapes_val", "6"]


class Page(HTMLParser):
    """A page's elements, texts and the addresses in it; unbalanced tags fail."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "action", "data", "poster", "srcset"):
                self.addresses.append(value or "")
            elif name == "id":
                self.ids.append(value or "")
            elif name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def section(self, name: str) -> list[str]:
        """The texts after a heading, up to the next one like it."""
        start = self.texts.index(name)
        return [text.strip() for text in self.texts[start : start + 400] if text.strip()]


def validation_set(cache: Path, rename: str | None = None) -> CocoDetection:
    """The six drawn scenes for evaluation; class 1 under another name if wanted."""
    [root] = cache.iterdir()
    dataset = build_coco(root, "val", eval_transform(40, 64))
    if rename is not None:
        dataset.coco.cats[1]["name"] = rename
    return dataset


def detections(dataset: CocoDetection, seed: int = 0) -> list[dict[str, Any]]:
    """Of most objects, a little aside, some as another class."""
    random = np.random.default_rng(seed)
    found = []
    for one in dataset.coco.dataset["annotations"]:
        box = (np.array(one["bbox"]) + random.normal(0, 2, 4)).clip(1).tolist()
        category = one["category_id"] if random.random() < 0.7 else 1 + one["category_id"] % 5
        found.append({"image_id": one["image_id"], "category_id": category, "bbox": box, "score": random.random()})
    return found


def records(epochs: int = 3) -> list[dict[str, Any]]:
    same = {"train_loss_ce": 1.0, "train_seconds": 90.0, "n_parameters": 1234567}
    return [
        {"epoch": epoch, "train_loss": 9.0 - epoch, "test_loss": 8.5 - epoch, **same,
         "test_coco_eval_bbox": [0.1 * epoch, 0.2 * epoch, 0.05 * epoch, *[-1.0] * 9]}
        for epoch in range(epochs)
    ]  # fmt: skip


def run_folder(name: str = "run", **fields: Any) -> Path:
    folder = Path(name)
    folder.mkdir()
    (folder / "log.txt").write_text("".join(json.dumps(record) + "\n" for record in records()))
    flags = [f"--{key}={value}" for key, value in {"model": "anchor_detr", "enact": "plus", **fields}.items()]
    (folder / "config.yaml").write_text(to_yaml(parse_args([*DATA_FLAGS, *flags])))
    (folder / "environment.json").write_text(json.dumps({"device": "abacus", "command": HOSTILE}))
    return folder


def page_of(folder: Path, dataset: CocoDetection, found: list[dict[str, Any]]) -> Page:
    return Page(write_report(folder, dataset.coco, dataset.image_dir, found).read_text(encoding="utf-8"))


def test_the_page_needs_nothing_outside_and_runs_nothing(cache: Path) -> None:
    dataset = validation_set(cache)
    page = page_of(run_folder(), dataset, detections(dataset))
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert page.handlers == []
    embedded = [address for address in page.addresses if address.startswith("data:image/jpeg;base64,")]
    pointers = [address.removeprefix("#") for address in page.addresses if address.startswith("#")]
    assert len(embedded) >= 6
    assert len(embedded) + len(pointers) == len(page.addresses)
    assert set(pointers) <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    style = "".join(text for text in page.texts if "color-scheme" in text)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_names_stay_text(cache: Path) -> None:
    dataset = validation_set(cache, rename=HOSTILE)
    folder = run_folder()
    image = dataset.coco.imgs[dataset.image_ids[0]]
    image["file_name"] = "<b>no such file"
    page = page_of(folder, dataset, detections(dataset))
    assert not {"script", "b>no"} & set(page.tags)
    assert "alert" not in "".join(page.tags)
    assert page.texts.count(HOSTILE) >= 2  # in the table of classes, and as the command
    assert "<b>no such file" in page.texts
    assert any("the picture cannot be read (No such file" in text for text in page.texts)


def test_the_tables_hold_what_the_analysis_finds(cache: Path) -> None:
    dataset = validation_set(cache)
    found = detections(dataset)
    analysis, page = analyse(dataset.coco, found), page_of(run_folder(), dataset, found)
    table = page.section("COCO's twelve figures")
    for name, value in analysis.metrics.items():
        assert table[table.index(name) + 1] == ("\u2013" if value < 0 else f"{value:.3f}")
    rows = page.section("recall")  # the head of the last column with a name
    for one in analysis.classes:
        start = rows.index(one.name)
        figures = (one.ap, one.ap50, one.ap75, one.precision, one.recall)
        shown = ["\u2013" if np.isnan(value) else f"{value:.3f}" for value in figures]
        assert rows[start + 1 : start + 7] == [str(one.objects), *shown]
    errors = page.section("Most frequent errors")
    for row, column, count in analysis.confusions(3):
        names = [one.name for one in analysis.classes]
        there, shown_as = [*names, "nothing there"][row], [*names, "not found"][column]
        start = next(place for place in range(len(errors)) if errors[place : place + 2] == [there, shown_as])
        assert errors[start + 2] == str(count)
    titles = [text for text in page.texts if re.fullmatch(r".*(detected as .*|, not found): \d+", text)]
    counts = [int(text.rpartition(": ")[2]) for text in titles]
    assert sorted(counts) == sorted([*analysis.confusion.flatten().tolist()[:-1]])


def test_classes_that_are_neither_there_nor_detected_are_counted_only(cache: Path) -> None:
    dataset = validation_set(cache)
    there = sorted({one["category_id"] for one in dataset.coco.dataset["annotations"]})
    dataset.coco.dataset["categories"] += [{"id": number, "name": f"unseen {number}"} for number in range(40, 120)]
    dataset.coco.createIndex()
    image = dataset.coco.dataset["images"][0]["id"]
    detected = {"image_id": image, "category_id": 50, "bbox": [1, 1, 9, 9], "score": 0.9}
    analysis = analyse(dataset.coco, [*detections(dataset), detected])
    assert [analysis.classes[row].category_id for row in analysis.seen()] == [*there, 50]
    page = page_of(run_folder(), dataset, [*detections(dataset), detected])
    assert "unseen 50" in page.texts
    assert "unseen 51" not in page.texts
    assert any(text.startswith("Left out here and below: 79 ") for text in map(str.strip, page.texts))


def test_pictures_show_the_worst_images_and_what_is_right_in_them(cache: Path) -> None:
    dataset = validation_set(cache)
    found = detections(dataset)
    path = write_report(run_folder(), dataset.coco, dataset.image_dir, found, examples=3)
    text, worst = path.read_text(), analyse(dataset.coco, found).worst(3)
    part = text.partition('<section id="worst">')[2].partition("</section>")[0]
    figures = part.split("<figure>")[1:]
    assert len(figures) == len(worst) == 3
    for figure, match in zip(figures, worst, strict=True):
        assert dataset.coco.imgs[match.image_id]["file_name"] in figure
        assert f"F1 {match.f1:.2f}: {match.found.sum()} of {len(match.found)} found" in figure
        left, right = figure.split("</svg>")[:2]
        assert left.count('class="found"') == match.found.sum()
        assert left.count('class="missed"') == (~match.found).sum()
        assert right.count('class="found"') == match.correct.sum()
        assert right.count('class="wrong"') == (~match.correct).sum()
        for box in match.object_boxes:
            x, y, width, height = (f"{value:.2f}" for value in box)
            assert f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" />' in left


def test_a_chart_puts_its_points_in_proportion() -> None:
    series = Series("name", [0, 5, 10], [2.0, float("nan"), 4.0], "line-1", dots=True)
    chart = str(line_chart("title", [series], x_label="x", y_label="y", x_range=(0, 20), y_range=(0, 4)))
    [line] = re.findall(r'<polyline points="([^"]*)"', chart)
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in line.split())
    ticks_x = re.findall(r'text-anchor="middle" x="([\d.]+)" y="[\d.]+">(\d+)<', chart)
    ticks_y = re.findall(r'text-anchor="end" x="[\d.]+" y="([\d.]+)">(\d+)<', chart)
    ticks = {float(text): float(x) for x, text in ticks_x}
    levels = {float(text): float(y) - 4 for y, text in ticks_y}  # texts hang 4 lower than their lines
    assert x0 == pytest.approx(ticks[0], abs=0.1)
    assert x1 == pytest.approx(ticks[10], abs=0.1)
    assert ticks[20] - ticks[0] == pytest.approx(2 * (x1 - x0), abs=0.2)
    assert y0 == pytest.approx(levels[2], abs=0.1)
    assert y1 == pytest.approx(levels[4], abs=0.1)
    assert y1 < y0
    assert "name: 4 at 10" in chart


def test_the_curves_are_the_logs() -> None:
    charts = {title: lines for title, lines, _ in training_charts(records(4))}
    loss, validation = charts["Loss"]
    assert loss.points() == [(0, 9), (1, 8), (2, 7), (3, 6)]
    assert validation.points() == [(0, 8.5), (1, 7.5), (2, 6.5), (3, 5.5)]
    assert [line.name for line in charts["Average precision"]] == ["AP", "AP50", "AP75"]
    assert charts["Average precision"][1].points() == [(epoch, 0.2 * epoch) for epoch in range(4)]
    assert [line.name for line in charts["Parts of the training loss"]] == ["classes"]
    assert training_charts([]) == []


def test_epochs_are_whole_numbers_on_the_axis() -> None:
    for epochs in (1, 2, 3, 40):
        for _, _, chart in training_charts(records(epochs)):
            ticks = re.findall(r'text-anchor="middle" x="[\d.]+" y="[\d.]+">([^<]*)<', str(chart))
            assert len(ticks) > 1
            assert all(tick.isdecimal() for tick in ticks)


def test_a_log_that_was_cut_off_is_read_as_far_as_it_goes() -> None:
    Path("log.txt").write_text('{"epoch": 0, "train_loss": 3}\n[1]\n{"epoch": 1, "train_lo')
    assert read_log(Path("log.txt")) == [{"epoch": 0, "train_loss": 3}]
    assert read_log(Path("nowhere")) == []


def test_a_folder_without_log_and_configuration_still_gets_its_page(cache: Path) -> None:
    dataset = validation_set(cache)
    Path("bare").mkdir()
    page = page_of(Path("bare"), dataset, [])
    assert "bare" in page.texts
    assert "There is no log of epochs in this folder." in page.texts
    assert "There is no config.yaml in this folder." in page.texts
    Path("old").mkdir()
    Path("old/config.yaml").write_text("model: abacus\nenact: null\nseed: 1\n")
    assert "abacus, dense" in page_of(Path("old"), dataset, []).texts


def test_fields_that_were_chosen_are_marked(cache: Path) -> None:
    dataset = validation_set(cache)
    folder = run_folder(seed=7, lr=0.25)
    text = write_report(folder, dataset.coco, dataset.image_dir, []).read_text()
    marked = set(re.findall(r'<tr class="changed"><td><code>(\w+)</code>', text))
    assert marked == {"seed", "lr", "shapes_train", "shapes_val"}
    heading = "<h1>anchor_detr, ENACT plus</h1>"
    facts = (heading, "1,234,567", "0.200 in epoch 2", "4.5 min", "90.0 s (median)", "abacus")
    assert [fact for fact in facts if fact not in text] == []


def test_photographs_are_embedded_smaller(cache: Path) -> None:
    dataset = validation_set(cache)
    entry = dataset.coco.imgs[1]
    Path("images").mkdir()
    for image in dataset.coco.imgs.values():
        shutil.copy(dataset.image_dir / image["file_name"], "images")
    Image.effect_noise((1600, 1200), 40).save(Path("images") / entry["file_name"])
    entry.update(width=1600, height=1200)
    text = write_report(run_folder(), dataset.coco, Path("images"), []).read_text()
    assert len(text) < 1_000_000
    assert 'viewBox="0 0 1600 1200"' in text


def save_checkpoint(folder: Path) -> None:
    config = recipe("detr", "paper", **{**TINY, "shapes_train": 16, "shapes_val": 6, "eval_short_side": 40,
                                        "max_long_side": 64, "num_workers": 0, "num_classes": 6})  # fmt: skip
    model = build_model_from(config)
    with torch.no_grad():
        model.get_parameter("class_embed.bias")[1] += 8  # so that something is detected
    torch.save({"model": model.state_dict(), "config": dataclasses.asdict(config)}, folder / "checkpoint.pth")
    (folder / "config.yaml").write_text(to_yaml(config))


def test_the_command_evaluates_a_checkpoint_or_takes_detections(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder()
    save_checkpoint(folder)
    assert report.main([str(folder), "--device", "cpu", "--pictures", "2"]) == 0
    evaluated = (folder / "report.html").read_text()
    assert "checkpoint.pth evaluated on the 6 validation images" in evaluated
    assert "run/report.html" in capsys.readouterr().err
    assert evaluated.count("<figure>") == 4
    options = report.build_parser().parse_args([str(folder), "--device", "cpu"])
    _, found = report.detect_all(folder / "checkpoint.pth", options)
    assert any(one["score"] > 0.5 for one in found)
    (folder / "detections.json").write_text(json.dumps(found))
    (folder / "checkpoint.pth").unlink()
    assert report.main([str(folder), "--pictures", "2"]) == 0
    origin = "detections of detections.json on", "checkpoint.pth evaluated on"
    assert (folder / "report.html").read_text().replace(*origin) == evaluated


def test_the_data_may_have_moved(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(coco_path="elsewhere")
    (folder / "detections.json").write_text("[]")
    assert report.main([str(folder)]) == 2
    assert "elsewhere is missing" in capsys.readouterr().err
    [root] = cache.iterdir()
    assert report.main([str(folder), "--coco_path", str(root)]) == 0


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(text: str, folder: str | Path) -> None:
        assert report.main([str(folder), "--device", "cpu"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        assert text in error

    broken("nowhere is not a folder", "nowhere")
    Path("empty").mkdir()
    broken("empty holds neither checkpoint.pth nor detections.json", "empty")
    folder = run_folder()
    (folder / "detections.json").write_text("{]")
    broken("detections.json: malformed JSON at line 1", folder)
    (folder / "detections.json").write_text("{}")
    broken("detections.json is not a list of detections", folder)
    (folder / "detections.json").write_text('[{"image_id": 77, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}]')
    broken("detection 0 is of image 77", folder)
    (folder / "config.yaml").write_text("- a\n")
    broken("config.yaml is no configuration of a run", folder)
    (folder / "config.yaml").unlink()
    broken("cannot read run/config.yaml", folder)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page_from_disk(cache: Path, dark: bool) -> None:
    dataset = validation_set(cache, rename=HOSTILE)
    path = write_report(run_folder(), dataset.coco, dataset.image_dir, detections(dataset)).resolve()
    with chromium(1240, 900, dark) as driver:
        driver.get(path.as_uri())
        outside = [url for url in requested_urls(driver) if not url.startswith("data:") and url != path.as_uri()]
        assert outside == []
        assert complaints(driver) == []
        assert HOSTILE in driver.find_element("css selector", "#classes").text
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
        for svg in driver.find_elements("css selector", "svg"):
            assert svg.size["width"] > 50
            assert svg.size["height"] > 20
        for width in (1240, 500):
            driver.set_window_size(width, 900)
            wide = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"the page is {wide} pixels wider than a window of {width}"
        captions = driver.find_elements("css selector", ".pair text")
        assert captions
        assert all(8 < text.size["height"] < 40 for text in captions if text.is_displayed())
