"""What was measured, as JSON and as Markdown tables with the published figures beside ours."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.benchmark_arms import ARMS
from tools.benchmark_criterion import AT_ONCE, BY_LAYER
from tools.benchmark_loading import FLOATS
from tools.benchmark_measure import GIB, KINDS, OTHER_KIND
from tools.benchmark_subjects import PRODUCT

Record = Mapping[str, Any]
Report = Mapping[str, Any]
Line = tuple[str, str]
NOTHING = "-"
# Over more tokens than this, attention outweighs what grows in proportion to the tokens.
MANY_TOKENS = 4000


class Published(NamedTuple):
    """ENACT's table (spec 1.3): memory in GB, which is most likely the sum over 4 GPUs, and seconds an image."""

    memory: float
    train: float
    inference: float


PUBLISHED = {
    ("detr_r50", False): Published(36.5, 0.0541, 0.0482),
    ("detr_r50", True): Published(23.5, 0.0488, 0.0472),
    ("conditional_detr_r101", False): Published(46.6, 0.0826, 0.0637),
    ("conditional_detr_r101", True): Published(36.7, 0.0779, 0.0605),
    ("anchor_detr_r50_dc5", False): Published(29.7, 0.0999, 0.0712),
    ("anchor_detr_r50_dc5", True): Published(17.7, 0.0845, 0.0608),
}


class Results:
    """Records, and the ones that they are compared with."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)

    def other(self, record: Record, **different: Any) -> Record:
        """The record that differs from another only in what is named; empty where there is none."""
        keys = {key: record[key] for key in ("row", "arm", "precision", "compiled", "batch", "tokens")} | different
        found = [other for other in self.records if all(other[key] == value for key, value in keys.items())]
        return found[0] if found else {}

    def published_way(self, record: Record) -> Record:
        """The dense encoder as published, in fp32, for a record of the same row."""
        return self.other(record, arm="naive", precision="fp32", compiled=False)

    def machine_rate(self, record: Record) -> float:
        """Operations a second of a matrix product."""
        product = self.other(record, arm=PRODUCT, compiled=False)
        return number(product, "operations") / seconds(product, "product")


def seconds(record: Record, step: str) -> float:
    """The median of a step, NaN where there is none."""
    return float(record[step]["median"]) if step in record else math.nan


def number(record: Record, name: str) -> float:
    """A figure, NaN where there is none."""
    value = record.get(name)
    return math.nan if value is None else float(value)


def write(report: Report, output: Path) -> None:
    """OUTPUT.json and OUTPUT.md."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    output.with_suffix(".md").write_text(to_markdown(report))


def to_markdown(report: Report) -> str:
    """The tables of a report, under a line that says where they are from."""
    where = report["environment"]
    origin = f"{where['device']}, {where['threads']} threads, torch {where['torch']}, commit {where['commit']}"
    parts = [f"`{where['command']}`: {origin}.", *SCOPES[report["scope"]](report)]
    if report["scope"] not in ("criterion", "loading"):
        parts.insert(1, _dropout(report))
    return "\n\n".join(parts) + "\n"


def _dropout(report: Report) -> str:
    """The rates of every row, which decide what a CPU can do without storing maps."""
    rates = []
    for row, arms in report["configs"].items():
        apart: dict[float, list[str]] = {}
        for arm, config in arms.items():
            if config["attention_dropout"] not in (None, config["dropout"]):
                apart.setdefault(config["attention_dropout"], []).append(arm)
        details = (f"{rate:g} on the attention weights of {', '.join(names)}" for rate, names in apart.items())
        rates.append(" and ".join([f"{row} {config['dropout']:g}", *details]))
    return f"Dropout: {'; '.join(rates)}. The configuration of every arm is in the JSON."


def _model_tables(report: Report) -> list[str]:
    results = Results(report["results"])
    memory = "peak GiB" if report["device"] == "cuda" else "GiB kept"

    def costs(record: Record) -> list[str]:
        published = PUBLISHED.get((record["row"], ARMS[record["arm"]].enact is not None))
        naive, dense = results.published_way(record), results.other(record, arm="dense")
        cells = [*line_of(record), str(record["batch"]), _of(published, "memory", ".1f"), _memory(record)]
        cells += _ratios(number(record, "bytes"), number(naive, "bytes"), number(dense, "bytes"))
        for step, images in (("train", record["batch"]), ("inference", 1)):
            medians = (seconds(other, step) for other in (record, naive, dense))
            cells += [_of(published, step, ".4f"), _spread(record, step, images), *_ratios(*medians)]
        return cells

    header = ["model", "encoder", "images a step", "GB published", memory, "of naive", "of dense"]
    for name in ("train", "inference"):
        header += [f"{name} s/image published", f"{name} s/image", "of naive", "of dense"]
    return [_table(header, map(costs, results.records)), _MODEL_NOTES, _sizes_table(results)]


def _sizes_table(results: Results) -> str:
    rows = {}
    for record in results.records:
        if record.get("flops"):
            rows[record["row"], record["arm"]] = [
                record["row"],
                encoder_name(record["arm"]),
                f"{record['parameters'] / 1e6:.2f}",
                f"{record['flops'] / 1e9:.1f}",
                f"{record['flops_encoder'] / 1e9:.1f}",
                str(record["tokens"]),
                _clusters(record),
            ]
    header = ["model", "encoder", "parameters, M", "GFLOP an image", "of these encoder", "tokens", "clusters by layer"]
    return _table(header, rows.values())


def _encoder_tables(report: Report) -> list[str]:
    results = Results(report["results"])

    def costs(record: Record) -> list[str]:
        naive, official, dense = (results.other(record, arm=arm) for arm in ("naive", "official", "dense"))
        work = 3 * number(record, "flops")  # backward has two products for each one forward
        rate = work / seconds(record, "train") / results.machine_rate(record)
        cells = [*line_of(record), f"{record.get('tokens_real', NOTHING)} of {record.get('tokens_padded', NOTHING)}"]
        cells += [_clusters(record), _spread(record, "train", 1)]
        cells += _ratios(*(seconds(other, "train") for other in (record, naive, official, dense)))
        cells += [_fraction(rate), _memory(record)]
        cells += _ratios(*(number(other, "bytes") for other in (record, naive, official, dense)))
        for step in ("train_long", "inference"):
            cells += [_spread(record, step, 1), *_ratios(seconds(record, step), seconds(dense, step))]
        return cells

    references = ["of naive", "of official", "of dense"]
    header = ["model", "encoder", "real tokens", "clusters by layer", "train s/batch", *references]
    header += ["of the machine's rate", "GiB", *references]
    header += ["train s, one long image", "of dense", "inference s, 800 x 1066", "of dense"]
    records = (record for record in results.records if record["arm"] != PRODUCT)
    return [_table(header, map(costs, records)), _ENCODER_NOTES, _shares_table(results), _SHARES_NOTES]


def _shares_table(results: Results) -> str:
    kinds = [*KINDS, OTHER_KIND]
    rows = [
        [*line_of(record), *(f"{record['shares'][kind]:.1%}" for kind in kinds)]
        for record in results.records
        if "shares" in record
    ]
    return _table(["model", "encoder", *kinds], rows)


def _sweep_tables(report: Report) -> list[str]:
    by_line: dict[Line, dict[int, Record]] = {}
    for record in report["results"]:
        by_line.setdefault(line_of(record), {})[record["tokens"]] = record
    tokens = sorted({record["tokens"] for record in report["results"]})
    fitted = exponents(report["results"])
    rows = []
    for line, found in by_line.items():
        times = [_spread(found.get(count, {}), "train", 1) for count in tokens]
        rows.append([*line, *times, _fixed(fitted[line], ".2f")])
    return [_table(["model", "encoder", *(f"{count:,}" for count in tokens), "exponent"], rows), _SWEEP_NOTES]


def exponents(records: Iterable[Record]) -> dict[Line, float]:
    """How the time of a layer grows with the tokens above `MANY_TOKENS`: the slope of its logarithm over theirs."""
    points: dict[Line, list[tuple[float, float]]] = {}
    for record in records:
        line = points.setdefault(line_of(record), [])
        if record["tokens"] > MANY_TOKENS and "train" in record:
            line.append((math.log(record["tokens"]), math.log(seconds(record, "train"))))
    return {line: _slope(of_line) for line, of_line in points.items()}


def _slope(points: Sequence[tuple[float, float]]) -> float:
    if len(points) < 2:
        return math.nan
    x_mean, y_mean = (sum(values) / len(points) for values in zip(*points, strict=True))
    covariance = sum((x - x_mean) * (y - y_mean) for x, y in points)
    return float(covariance / sum((x - x_mean) ** 2 for x, _ in points))


def _criterion_tables(report: Report) -> list[str]:
    results = Results(report["results"])

    def costs(record: Record) -> list[str]:
        other = results.other(record, arm=BY_LAYER)
        cells = [record["row"], record["arm"], str(record["batch"])]
        for step in ("losses", "train"):
            cells += [_spread(record, step, 1), *_ratios(seconds(record, step), seconds(other, step))]
        return [*cells, f"{number(record, 'largest_difference'):.1e}" if record["arm"] == AT_ONCE else NOTHING]

    beside = f"of {BY_LAYER}"
    header = ["model", "way", "images", "matching and losses, s", beside, "with backward, s", beside]
    return [_table([*header, "losses differ by"], map(costs, results.records))]


def _loading_tables(report: Report) -> list[str]:
    results = Results(report["results"])

    def costs(record: Record) -> list[str]:
        other = results.other(record, arm=FLOATS)
        cells = [record["arm"], str(record["batch"])]
        for step in ("train", "inference"):
            rate, reference = (each["batch"] / seconds(each, step) for each in (record, other))
            cells += [_fixed(rate, ".1f"), _fraction(rate / reference)]
        own, reference = (number(each, "bytes") for each in (record, other))
        cells += [_fixed(own / 2**20, ".1f"), *_ratios(own, reference)]
        return [*cells, _spread(record, "device", 1)]

    beside = f"of {FLOATS}"
    header = ["images", "a batch", "images/s a core, training", beside, "images/s a core, evaluation", beside]
    header += ["MiB a batch", beside, "then on the device, s"]
    return [_table(header, map(costs, results.records)), _LOADING_NOTES]


def _estimate_tables(report: Report) -> list[str]:
    results = Results(report["results"])

    def costs(record: Record) -> list[str]:
        published = PUBLISHED.get((record["row"], ARMS[record["arm"]].enact is not None))
        naive, dense = results.published_way(record), results.other(record, arm="dense")
        cells = [*line_of(record), str(record["batch"]), _fixed(published.memory / 4, ".1f") if published else NOTHING]
        for name in ("bytes", "bytes_largest"):
            figures = (number(other, name) for other in (record, naive, dense))
            cells += [_fixed(number(record, name) / GIB, ".2f"), *_ratios(*figures)]
        return cells

    beside = ["of naive", "of dense"]
    header = ["model", "encoder", "images a step", "GB a GPU published", "peak GiB, a usual batch", *beside]
    return [_table([*header, "the largest batch", *beside], map(costs, results.records)), _ESTIMATE_NOTES]


def line_of(record: Record) -> Line:
    """The row of a record, and what tables and plots call its encoder."""
    extras = [record["precision"]] * (record["precision"] != "fp32") + ["compiled"] * record["compiled"]
    return record["row"], ", ".join([encoder_name(record["arm"]), *extras])


def encoder_name(arm: str) -> str:
    """What an arm is called, whatever its precision."""
    if arm not in ARMS:
        return arm
    return f"ENACT {arm}" if ARMS[arm].enact else {"naive": "dense naive"}.get(arm, arm)


def _memory(record: Record) -> str:
    return str(record["error"]) if record["error"] else _fixed(number(record, "bytes") / GIB, ".4g")


def _clusters(record: Record) -> str:
    return " ".join(f"{count:.0f}" for count in record.get("clusters", ())) or NOTHING


def _spread(record: Record, step: str, divisor: int) -> str:
    """Median (lowest to highest)."""
    if step not in record:
        return str(record.get("error") or NOTHING)
    median, lowest, highest = (record[step][name] / divisor for name in ("median", "lowest", "highest"))
    return f"{median:.4g} ({lowest:.4g} to {highest:.4g})"


def _ratios(value: float, *references: float) -> list[str]:
    return [_fraction(value / reference) for reference in references]


def _fraction(value: float) -> str:
    return _fixed(value, ".2f")


def _fixed(value: float, form: str) -> str:
    return NOTHING if math.isnan(value) else format(value, form)


def _of(published: Published | None, name: str, form: str) -> str:
    return format(getattr(published, name), form) if published else NOTHING


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_MODEL_NOTES = """\
Published: 8 (Anchor DETR 4) images a step on 4 GPUs, memory most likely summed over them, dense for both dense encoders
and ENACT for all of its variants. Ours: one device. "Of naive" is the ratio to the dense encoder as published, in fp32;
"of dense" to our dense encoder in the same precision. Times are medians (lowest to highest) of a full step (forward,
matching, losses, backward, clipping, optimizer) and of one image of 800 x 1066 pixels at full size. GiB kept is what
autograd keeps for backward, weights left out."""
_ENCODER_NOTES = """\
Forward and backward of all encoder layers on random tokens: a batch with the sizes that images have in training, and
one long image (3,400 tokens at full size); and forward alone for 800 x 1066 pixels. Naive and official are as
published, on the padded map with every attention map stored; their long image is left to the sweep. The machine's rate
is that of a product of large square matrices in the same rounds; the work set against it is three times the operations
of the forward pass."""
_SHARES_NOTES = """\
What one training step of the batch spends its time on, by torch's profiler, which slows small operations down a
little."""
_SWEEP_NOTES = f"""\
Seconds of forward and backward of one encoder layer on one image of so many tokens, median (lowest to highest). The
exponent is the slope of log seconds over log tokens above {MANY_TOKENS:,} tokens."""
_LOADING_NOTES = """\
Reading, decoding, augmenting and batching in one process on one thread, as a loader process does, medians; then, per
batch, the copy to the device and, of 8-bit images, the standardisation there."""
_ESTIMATE_NOTES = """\
Estimated on fake tensors for one GPU: what `torch.cuda.max_memory_allocated` would say, without the workspaces of
kernels and the half GiB or so of the CUDA context. A usual batch has sizes drawn as in training; the largest has images
as large as they get, lying and upright by turns, and is what a GPU must hold in an epoch. Published: a quarter of the
table's figure, which most likely is the sum over 4 GPUs."""

SCOPES: dict[str, Callable[[Report], list[str]]] = {
    "model": _model_tables,
    "encoder": _encoder_tables,
    "sweep": _sweep_tables,
    "criterion": _criterion_tables,
    "loading": _loading_tables,
    "estimate": _estimate_tables,
}
