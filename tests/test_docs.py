"""README.md and docs/: what they tell a reader to type works, and what they name exists.

Each page's commands run as written, in order, in a copy of the project, beside data and checkpoints of the names that
the pages use. `SCALE` adds flags that make them small. What cannot run here stands in `CANNOT_RUN`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documentation import FLAG, LINK, PAGES, ROOT, Command, broken_links, commands, prose, python_blocks
from PIL import Image
from test_export import assert_same_rows
from test_predict import table
from torch import nn
from torchvision.ops import box_convert

from configs.schema import FIELD_NAMES, recipe
from models import build_model_from
from models.checkpoints import to_published
from tools import method_picture

TINY: dict[str, Any] = {
    "backbone": "resnet10", "backbone_weights": None, "dilation": False, "enc_layers": 1, "dec_layers": 1,
    "dim_feedforward": 32, "hidden_dim": 32, "nheads": 2, "num_queries": 8, "num_query_position": 8,
    "num_query_pattern": 1,
}  # fmt: skip
SMALL_RUN: dict[str, Any] = {
    **TINY, "eval_short_side": 160, "max_long_side": 200, "train_short_sides": [160], "crop_short_sides": [],
    "epochs": 1, "lr_drop": 1, "shapes_train": 16, "shapes_val": 6, "num_workers": 0, "device": "cpu",
    "backbone_norm": "frozen", "backbone_stage": 4,
}  # fmt: skip


def flags(values: dict[str, Any]) -> list[str]:
    """Of main.py."""
    return [word for name, value in values.items() for word in (f"--{name}", json.dumps(value).strip('"'))]


CPU = ["--device", "cpu"]
QUICK = ["--scale", "0.2", "--repeats", "1", "--batch_size", "2", "--arms", "dense", "paper", *CPU, "--", *flags(TINY)]
# What is added to the commands of each script, so that they take seconds.
SCALE: dict[str, list[str]] = {
    "main.py": flags(SMALL_RUN),
    "tools/ablation.py": ["--arms", "dense", "paper", "--seeds", "1", "--", *flags(SMALL_RUN)],
    "tools/benchmark.py": QUICK,
    "tools/browse.py": ["--count", "2", *flags({**SMALL_RUN, "batch_size": 2})],
    "tools/check_dataset.py": ["--workers", "0"],
    "tools/demo.py": CPU,
    "tools/export.py": [],
    "tools/predict.py": CPU,
    "tools/report.py": CPU,
    "tools/transformer_detr.py": ["--epochs", "1", *CPU],
    "tools/visualize.py": CPU,
    "tools/without_training.py": ["--sigmas", "3", "--kinds", "paper", "uniform", "--draws", "1", *CPU],
}
CANNOT_RUN = {
    "pip install -r requirements.txt && python main.py --model detr --enact":
        "installs from the net; the second half is test_main's",
    "pip install -r requirements.txt -r requirements-dev.txt && pytest": "installs from the net; .ci/run does it",
    "torchrun --nproc_per_node=8 main.py --model detr --enact --coco_path COCO --output_dir runs/detr_enact":
        "needs 8 GPUs; test_launch runs torchrun with 2 processes",
    "torchrun --nproc_per_node=4 main.py --model detr --enact --coco_path COCO --output_dir runs/detr_enact":
        "needs 4 GPUs",
    "torchrun --nproc_per_node=4 main.py --model conditional_detr --enact --coco_path COCO --output_dir "
    "runs/conditional_enact": "needs 4 GPUs",
    "torchrun --nproc_per_node=4 main.py --model anchor_detr --enact --coco_path COCO --output_dir runs/anchor_enact":
        "needs 4 GPUs",
    "torchrun --nproc_per_node=8 --max-restarts=3 main.py --model detr --enact --coco_path COCO --output_dir "
    "runs/detr_enact --resume auto": "needs 8 GPUs; test_survival kills two processes",
    "python tools/replay.py runs/detr_enact/bad_steps/step00000123_rank0.pth":
        "needs a step that went wrong; test_bad_steps makes some again",
    "scripts/detr.sh --enact --coco_path COCO --output_dir runs/detr_enact": "test_launch runs the scripts",
    "sbatch --nodes=2 --gpus-per-node=8 scripts/slurm.sh --model detr --enact --coco_path COCO --output_dir "
    "runs/detr_enact": "needs SLURM; test_launch runs the script with a pretended srun",
    "docker build --build-arg UID=$(id -u) --tag enact .": "pulls an image; test_docker lints the file",
    "docker run --rm --gpus all --shm-size 8g --volume $PWD/outputs:/enact/outputs enact python main.py --model detr "
    "--enact": "needs docker and a GPU",
}  # fmt: skip
# Flags that are not ours.
FOREIGN_FLAGS = {
    "--nproc_per_node", "--nodes", "--gpus-per-node", "--help", "--build-arg", "--tag", "--rm", "--gpus", "--shm-size",
    "--volume", "--max-restarts",
}  # fmt: skip
names = [page.name for page in PAGES]


def everything() -> list[Command]:
    return [command for page in PAGES for command in commands(page)]


def is_runnable(command: Command) -> bool:
    return command.script in SCALE and command.text not in CANNOT_RUN


def test_every_command_runs_here_or_says_why_not() -> None:
    found = everything()
    assert len(found) > 30
    unknown = [command.text for command in found if not is_runnable(command) and command.text not in CANNOT_RUN]
    assert unknown == []
    assert CANNOT_RUN.keys() - {command.text for command in found} == set()
    assert SCALE.keys() - {command.script for command in found} == set()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_the_readme_leads_to_every_page() -> None:
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= {link.partition("#")[0] for link in LINK.findall(
        PAGES[0].read_text())}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_flags_that_a_page_names_exist(page: Path) -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "tools").glob("*.py"))
    known = {f"--{name}" for name in FIELD_NAMES} | {"--config", "--print_config"} | FOREIGN_FLAGS
    known |= set(re.findall(r'["\'](--[a-z_]+)["\']', sources))
    assert set(FLAG.findall(page.read_text())) - known == set()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`((?:tools|scripts|configs|tests|enact|models|results)/[\w./]*)[` ]", prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def published(name: str, enact: str | None, file: str, num_classes: int = 91) -> None:
    """A small detector in the layout of the published ones."""
    sizes = {key: SMALL_RUN[key] for key in ("eval_short_side", "max_long_side", "backbone_norm", "backbone_stage")}
    config = recipe(name, enact, **TINY, **sizes, num_classes=num_classes)
    torch.manual_seed(0)
    model = build_model_from(config)
    for head, spread in (("class_embed.weight", 2.0), ("bbox_embed.layers.2.weight", 0.3)):
        nn.init.normal_(model.get_parameter(head), std=spread)
    arguments = argparse.Namespace(backbone="resnet10", dilation=False, nheads=TINY["nheads"])
    torch.save({"model": to_published(model.state_dict()), "args": arguments}, file)


def part_of(coco: Path, target: str, count: int) -> None:
    """The first images of each split of a folder in COCO's layout, those without objects left out."""
    (Path(target) / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (Path(target) / split).mkdir()
        content = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
        having = {annotation["image_id"] for annotation in content["annotations"]}
        content["images"] = [image for image in content["images"] if image["id"] in having][:count]
        kept = {image["id"]: image["file_name"] for image in content["images"]}
        content["annotations"] = [found for found in content["annotations"] if found["image_id"] in kept]
        (Path(target) / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for file in kept.values():
            shutil.copy(coco / split / file, Path(target) / split)


def as_yolo(coco: Path, target: str) -> None:
    """The same images and boxes as a YOLO folder."""
    folder, split_names = Path(target), {"train2017": "train", "val2017": "val"}
    for split, short in split_names.items():
        content = json.loads((coco / "annotations" / f"instances_{split}.json").read_text())
        ids = [category["id"] for category in content["categories"]]
        shutil.copytree(coco / split, folder / "images" / short)
        (folder / "labels" / short).mkdir(parents=True)
        for image in content["images"]:
            sides = torch.tensor([image["width"], image["height"]] * 2)
            found = [one for one in content["annotations"] if one["image_id"] == image["id"]]
            boxes = box_convert(torch.tensor([one["bbox"] for one in found]), "xywh", "cxcywh") / sides
            rows = [[ids.index(one["category_id"]), *box] for one, box in zip(found, boxes.tolist(), strict=True)]
            label = (folder / "labels" / short / image["file_name"]).with_suffix(".txt")
            label.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    names = [category["name"] for category in content["categories"]]
    splits = {short: f"images/{short}" for short in split_names.values()}
    (folder / "data.yaml").write_text(json.dumps({"names": names, **splits}))


@pytest.fixture
def project(tmp_path: Path, cache: Path, tiny_coco: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project beside what its pages speak of."""
    copy = tmp_path / "project"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "outputs", "runs", "tests")
    shutil.copytree(ROOT, copy, ignore=left_out)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("ENACT_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", list(sys.path))
    part_of(tiny_coco, "COCO", 4)
    part_of(tiny_coco, "my_data", 4)
    part_of(tiny_coco, "my_four", 4)
    as_yolo(Path("my_data"), "my_yolo")
    photographs = sorted((tiny_coco / "val2017").iterdir())
    Path("photographs").mkdir()
    for file in photographs[:2]:
        shutil.copy(file, "photographs")
    shutil.copy(photographs[2], "photo.jpg")
    published("detr", None, "detr-r50.pth")
    published("detr", "official", "detr-enact.pth")
    return copy


def halves(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before -- and what stands behind it."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def merged(words: list[str], added: list[str]) -> list[str]:
    """Flags added to a command, what stands behind -- behind what stands behind its own."""
    own, own_behind = halves(words)
    more, more_behind = halves(added)
    behind = [*own_behind, *more_behind]
    return [*own, *more, *["--"] * bool(behind), *behind]


def run(command: Command) -> None:
    """As `python SCRIPT ...` would, in this process, which has imported torch already."""
    script = command.script
    assert script is not None
    added = SCALE[script]
    if script == "tools/export.py" or ("detr-r50.pth" in command.words and script != "main.py"):
        added = [*added, *reading_flags(command)]
    argv, status = list(command.words[1:]), 0
    if script == "tools/demo.py":
        return serve([*argv, *added])
    sys.argv = merged(argv, added)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    assert status == 0, command.text


def reading_flags(command: Command) -> list[str]:
    """A published file does not say that its images are small."""
    Path("small.yaml").write_text("".join(f"{key}: {value}\n" for key, value in {
        "eval_short_side": 160, "max_long_side": 200, "dilation": "false"}.items()))  # fmt: skip
    return ["--config", "small.yaml"]


def serve(argv: list[str]) -> None:
    """Start a page, wait until it can be opened, end it."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = subprocess.Popen([sys.executable, *argv, "--port", str(port)])
    deadline = time.monotonic() + 90
    while started.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.3)
    else:
        pytest.fail("the page was not served")
    started.terminate()
    started.wait(30)


@pytest.mark.slow
@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("page", PAGES, ids=names)
def test_the_commands_and_the_code_of_a_page_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    resumed = Path("runs/detr_enact/checkpoint.pth")
    if any(str(resumed) in command.words for command in commands(page) if is_runnable(command)):
        train_what_needs_gpus(resumed.parent)
    for command in filter(is_runnable, commands(page)):
        run(command)
    given = {"images": torch.rand(1, 3, 64, 64), "pad_mask": torch.zeros(1, 64, 64, dtype=torch.bool),
             "sizes": torch.tensor([[64, 64]]),
             "targets": [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]}  # fmt: skip
    for code in python_blocks(page):
        exec(compile(code, str(page), "exec"), dict(given))
    if page.name == "predict-and-export.md":
        expected = table("found")
        for folder in ("found_onnx", "found_pt2"):
            assert_same_rows(table(folder), expected, 1e-3)


def test_the_picture_of_the_method_is_drawn(tmp_path: Path) -> None:
    assert method_picture.main(["--output", str(tmp_path / "new" / "row.png")]) == 0
    with Image.open(tmp_path / "new" / "row.png") as drawn, Image.open(ROOT / "docs" / "pictures" / "row.png") as kept:
        assert drawn.size == kept.size
        assert np.asarray(drawn).std() > 20


def train_what_needs_gpus(folder: Path) -> None:
    """The run of the torchrun command."""
    sys.argv = ["main.py", "--model", "detr", "--enact", "--coco_path", "COCO", "--output_dir", str(folder),
                *flags(SMALL_RUN)]  # fmt: skip
    with contextlib.suppress(SystemExit):
        runpy.run_path("main.py", run_name="__main__")
