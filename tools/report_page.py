"""report.html: one page about a run that opens from disk, with everything in it and nothing outside.

    write_report(folder, coco, image_dir, evaluator.results)

It needs nothing of `main`, which calls it. The figures are made by `analysis`, the charts by `report_charts`, the
pictures by `report_pictures`; this module reads what else lies in the run's folder, and fills in `data/report.html`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pycocotools.coco import COCO

from configs.cli import parse_args
from tools.analysis import MIN_IOU, MIN_SCORE, Analysis, ImageMatch, Result, analyse
from tools.report_charts import FEW_CLASSES, Series, confusion_chart, line_chart, sparkline
from tools.report_pictures import Pair, draw_pair
from tools.results import choices_of, encoder_of
from util.errors import InputError
from util.logs import LOG_NAME
from util.yaml_files import read_yaml

REPORT_NAME = "report.html"
WORST = EXAMPLES = 8
CONFUSIONS = 10
DASH = "\u2013"
METRIC_MEANINGS = {
    "AP": "average precision, mean over IoU 0.50 to 0.95",
    "AP50": "average precision at IoU 0.50",
    "AP75": "average precision at IoU 0.75",
    "APS": "small objects, below 32 x 32 pixels",
    "APM": "medium objects, up to 96 x 96 pixels",
    "APL": "large objects",
    "AR1": "average recall of 1 detection an image",
    "AR10": "average recall of 10 detections",
    "AR100": "average recall of 100 detections",
    "ARS": "average recall, small objects",
    "ARM": "average recall, medium objects",
    "ARL": "average recall, large objects",
}
LOSS_PARTS = {"train_loss_ce": "classes", "train_loss_bbox": "L1 of boxes", "train_loss_giou": "GIoU of boxes"}


def write_report(
    folder: Path, coco: COCO, image_dir: Path, results: Iterable[Result], *, origin: str = "", examples: int = EXAMPLES
) -> Path:
    """Write FOLDER/report.html.

    Args:
        folder: a run's; its log.txt, config.yaml and environment.json are shown where they are there.
        coco: the ground truth.
        image_dir: the folder that its `file_name` entries are relative to.
        results: detections in COCO's results format, on all of its images.
        origin: what made the detections, for the reader.
        examples: the most pictures of either kind, the worst and the first.

    Returns:
        The page's file.

    Raises:
        InputError: a result is malformed, or the page cannot be written.
    """
    analysis = analyse(coco, results)
    seen = analysis.seen()
    records, config = read_log(folder / LOG_NAME), _read_mapping(folder / "config.yaml")
    page = _template().render(
        title=_title(config) or folder.resolve().name,
        folder=folder.resolve().name,
        origin=origin,
        counts=_counts(coco, analysis),
        metrics=[(name, METRIC_MEANINGS[name], value) for name, value in analysis.metrics.items()],
        charts=training_charts(records),
        training=_training_facts(records),
        precision_recall=precision_recall_chart(analysis),
        few_classes=len(seen) <= FEW_CLASSES,
        classes=[(analysis.classes[row], _sparkline(analysis, row)) for row in seen],
        unseen_classes=len(analysis.classes) - len(seen),
        confusion=_confusion_chart(analysis, seen),
        confusions=_named_confusions(analysis),
        worst=_pairs(analysis.worst(examples), coco, image_dir, "worst"),
        examples=_pairs(analysis.matches[:examples], coco, image_dir, "example"),
        config=_config_rows(config),
        environment=_read_mapping(folder / "environment.json"),
        min_score=MIN_SCORE,
        min_iou=MIN_IOU,
    )
    path = folder / REPORT_NAME
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
    return path


def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "data"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = _figure
    return environment.get_template(REPORT_NAME)


def _figure(value: float, digits: int = 3) -> str:
    """A figure in [0, 1]; a dash for one that nothing defines."""
    return DASH if math.isnan(value) or value < 0 else f"{value:.{digits}f}"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.txt; none where there is none, and a line that a crash cut short is left out."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "epoch" in record:
            records.append(record)
    return records


def _read_mapping(path: Path) -> dict[str, Any]:
    """A YAML or JSON file of names and values; nothing where there is none."""
    try:
        values = read_yaml(path)
    except (OSError, InputError):
        return {}
    return values if isinstance(values, dict) else {}


def _title(config: Mapping[str, Any]) -> str:
    if not {"model", "enact"} <= config.keys():
        return ""
    return f"{config['model']}, {encoder_of({'enact': config['enact'], 'choices': choices_of(config)})}"


def _counts(coco: COCO, analysis: Analysis) -> dict[str, int]:
    return {
        "images": len(coco.imgs),
        "objects": sum(len(match.object_labels) for match in analysis.matches),
        "classes": len(analysis.classes),
        "detections": sum(len(match.labels) for match in analysis.matches),
    }


def training_charts(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Series], Markup]]:
    """(name, lines, chart) of losses and of average precision over epochs; none for what the log lacks."""
    losses = [
        _series(records, "train_loss", "training", "line-1"),
        _series(records, "test_loss", "evaluation", "line-2"),
    ]
    parts = [_series(records, key, name, f"line-{row}") for row, (key, name) in enumerate(LOSS_PARTS.items(), start=1)]
    scored = [record for record in records if "test_coco_eval_bbox" in record]
    epochs = [record["epoch"] for record in scored]
    precision = [
        Series(name, epochs, [record["test_coco_eval_bbox"][row] for record in scored], f"line-{row + 1}", dots=True)
        for row, name in enumerate(("AP", "AP50", "AP75"))
    ]
    epochs_shown = (0.0, float(max(1, *(record["epoch"] for record in records)))) if records else None
    charts = []
    for title, lines, y_range in (
        ("Loss", losses, None),
        ("Average precision", precision, (0.0, 1.0)),
        ("Parts of the training loss", parts, None),
    ):
        drawn = [line for line in lines if line.points()]
        if drawn:
            chart = line_chart(
                title, drawn, x_label="epoch", y_label=title.lower(), x_range=epochs_shown, y_range=y_range, whole=True
            )
            charts.append((title, drawn, chart))
    return charts


def _series(records: Sequence[Mapping[str, Any]], key: str, name: str, style: str) -> Series:
    having = [record for record in records if isinstance(record.get(key), int | float)]
    epochs, values = [record["epoch"] for record in having], [float(record[key]) for record in having]
    return Series(name, epochs, values, style, dots=len(values) <= 60)


def _training_facts(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the log says beside its curves."""
    facts: dict[str, str] = {}
    seconds = [record["train_seconds"] for record in records if "train_seconds" in record]
    if seconds:
        facts["epochs"] = str(len(records))
        facts["time of training"] = _duration(sum(seconds))
        facts["an epoch"] = f"{_duration(statistics.median(seconds))} (median)"
    scored = [record for record in records if "test_coco_eval_bbox" in record]
    if scored:
        best = max(scored, key=lambda record: record["test_coco_eval_bbox"][0])
        facts["best AP"] = f"{best['test_coco_eval_bbox'][0]:.3f} in epoch {best['epoch']}"
    if records and "n_parameters" in records[-1]:
        facts["trained parameters"] = f"{records[-1]['n_parameters']:,}"
    return facts


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def precision_recall_chart(analysis: Analysis) -> tuple[list[Series], Markup]:
    """The lines of the legend, and the chart: the mean over the classes, and each class faintly behind it."""
    recalls = analysis.recalls.tolist()
    means = [
        Series(f"IoU {iou:g}", recalls, analysis.mean_curve(iou).tolist(), f"line-{row}")
        for row, iou in enumerate(analysis.curves, start=1)
    ]
    each = [
        Series(f"{one.name}, IoU {iou:g}", recalls, curve.tolist(), f"line-{row} faint")
        for row, (iou, curves) in enumerate(analysis.curves.items(), start=1)
        for one, curve in zip(analysis.classes, curves, strict=True)
    ]
    whole = (0.0, 1.0)
    lines = [*each, *means]
    chart = line_chart(
        "precision over recall", lines, x_label="recall", y_label="precision", x_range=whole, y_range=whole
    )  # fmt: skip
    return means, chart


def _sparkline(analysis: Analysis, row: int) -> Markup:
    curves = [(f"line-{number}", curves[row]) for number, curves in enumerate(analysis.curves.values(), start=1)]
    return sparkline(f"precision over recall of {analysis.classes[row].name}", analysis.recalls, curves)


def _confusion_chart(analysis: Analysis, seen: Sequence[int]) -> Markup:
    """Of the classes that there is something to say about."""
    shown = [*seen, len(analysis.classes)]
    return confusion_chart(analysis.confusion[shown][:, shown], [analysis.classes[row].name for row in seen])


def _named_confusions(analysis: Analysis) -> list[tuple[str, str, int]]:
    """(what is there, what is detected, how often) of the most frequent errors."""
    names = [one.name for one in analysis.classes]
    rows, columns = [*names, "nothing there"], [*names, "not found"]
    return [(rows[row], columns[column], count) for row, column, count in analysis.confusions(CONFUSIONS)]


def _pairs(matches: Sequence[ImageMatch], coco: COCO, image_dir: Path, kind: str) -> list[Pair]:
    names = {key: str(category["name"]) for key, category in coco.cats.items()}
    return [
        draw_pair(match, coco.imgs[match.image_id], image_dir, names, f"{kind}-{number}")
        for number, match in enumerate(matches)
    ]


def _config_rows(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """(field, value, whether it differs from what the model's recipe would have) of a run's configuration."""
    usual = _usual(config)
    return [
        (str(name), json.dumps(value, ensure_ascii=False), name in usual and usual[name] != value)
        for name, value in config.items()
    ]


def _usual(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the run would have been with its model, its variant of ENACT and its data set alone."""
    flags = [f"--{name}={config[name]}" for name in ("model", "enact", "coco_path") if config.get(name) is not None]
    try:
        values = dataclasses.asdict(parse_args(flags))
    except InputError:  # a model or variant that is not known any more
        return {}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
