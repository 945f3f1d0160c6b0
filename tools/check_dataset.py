"""Check a data set before days of training: everything that is wrong with it, counted, with examples.

    python tools/check_dataset.py COCO
    python tools/check_dataset.py pets/data.yaml --json report.json

Errors are what a run would refuse, stop at or evaluate wrongly; warnings are what it takes as it is. The exit status is
1 if there are errors, 0 if not, 2 if the check could not start.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.annotations import UNUSED, Problem, problems
from datasets.check import EXAMPLES, LACKING, differences, oddities
from datasets.check_images import Job, Seen, examine_all, jobs_of
from datasets.coco import coco_paths
from datasets.json_files import read_json
from datasets.yolo import is_yolo, read_yolo, yaml_path
from tools.commands import one_line_errors
from util.errors import InputError

SPLITS = ("train", "val")


@dataclass
class Findings:
    """Of each severity, split and kind: how many, and the first few."""

    counts: dict[tuple[str, str, str], int] = field(default_factory=dict)
    examples: dict[tuple[str, str, str], list[str]] = field(default_factory=dict)

    def add(self, severity: str, split: str, found: Iterable[Problem]) -> None:
        for kind, text in found:
            key = (severity, split, kind)
            self.counts[key] = self.counts.get(key, 0) + 1
            if self.counts[key] <= EXAMPLES:
                self.examples.setdefault(key, []).append(text)

    def number(self, severity: str) -> int:
        return sum(count for key, count in self.counts.items() if key[0] == severity)

    def as_list(self) -> list[dict[str, Any]]:
        """Plain values, errors first."""
        return [
            {"severity": key[0], "split": key[1], "kind": key[2], "count": self.counts[key],
             "examples": self.examples[key]}
            for key in sorted(self.counts)
        ]  # fmt: skip


class Split(NamedTuple):
    """The content of a split's annotations, and the images that it names."""

    content: dict[str, Any]
    jobs: list[Job]


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """The command; see the module for its exit status."""
    options = build_parser().parse_args(argv)
    report = check(options.folder, options.workers)
    if options.json is not None:
        _write(report, options.json)
    print(as_text(report))
    return 1 if report["errors"] else 0


def build_parser() -> argparse.ArgumentParser:
    """A parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="in COCO's layout; or a YOLO folder, or its data.yaml")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that decode (default: one a core)"
    )
    return parser


def check(root: Path, processes: int) -> dict[str, Any]:
    """Check both splits of a data set.

    Args:
        root: as --coco_path of main.py.
        processes: that decode images.

    Returns:
        "folder", "images" and "objects" of each split, "errors" and "warnings" (numbers), "findings" (see `Findings`).

    Raises:
        InputError: there is no data set at `root`.
    """
    findings = Findings()
    splits = {split: found for split in SPLITS if (found := _read(root, split, findings)) is not None}
    if not splits and not root.exists():
        raise InputError(f"{root} is missing; give a folder in COCO's layout, or a YOLO folder")
    seen = {split: _examine(found.jobs, split, processes, findings) for split, found in splits.items()}
    if len(splits) == len(SPLITS):
        _compare(splits, seen, findings)
    return {
        "folder": str(root),
        **{name: {split: len(found.content[section]) for split, found in splits.items()}
           for name, section in (("images", "images"), ("objects", "annotations"))},
        "errors": findings.number("error"),
        "warnings": findings.number("warning"),
        "findings": findings.as_list(),
    }  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    sizes = (f"{split} {count} images, {report['objects'][split]} objects" for split, count in report["images"].items())
    lines = [f"{report['folder']}: {', '.join(sizes)}"]
    for found in report["findings"]:
        lines.append(f"{found['severity']}: {found['split']}: {found['kind']}: {found['count']}")
        lines += [f"    {example}" for example in found["examples"]]
        if found["count"] > len(found["examples"]):
            lines.append(f"    and {found['count'] - len(found['examples'])} more")
    return "\n".join([*lines, f"{report['errors']} errors, {report['warnings']} warnings"])


def _read(root: Path, split: str, findings: Findings) -> Split | None:
    """The annotations of a split with all that is wrong in them noted; None if they cannot be used at all."""
    try:
        if is_yolo(root):
            lines: list[str] = []
            image_dir, source, content = read_yolo(root, split, lines.append)
            findings.add("error", split, [Problem("images or labels that cannot be read", line) for line in lines])
            place = yaml_path(root).parent
        else:
            image_dir, source = coco_paths(root, split)
            content, place = read_json(source, UNUSED), root
    except InputError as error:
        findings.add("error", split, [Problem("the split cannot be read", str(error))])
        return None
    wrong = list(problems(content))
    findings.add("error", split, wrong)
    if any(problem.kind == "not a COCO file" for problem in wrong):
        return None
    findings.add("warning", split, oddities(content))
    return Split(content, jobs_of(content["images"], image_dir, place))


def _examine(jobs: list[Job], split: str, processes: int, findings: Findings) -> list[Seen]:
    found = []
    with tqdm(total=len(jobs), desc=f"decoding {split}", unit="image", leave=False) as bar:
        for seen in examine_all(jobs, processes):
            findings.add("error", split, seen.errors)
            findings.add("warning", split, seen.warnings)
            found.append(seen)
            bar.update()
    findings.add("warning", split, _copies(found))
    return found


def _copies(found: Iterable[Seen]) -> Iterable[Problem]:
    """Files of the same content within a split."""
    first: dict[str, Path] = {}
    for seen in found:
        if seen.digest and first.setdefault(seen.digest, seen.path) != seen.path:
            yield Problem("files of the same content", f"{seen.path} is {first[seen.digest].name}")


def _compare(splits: dict[str, Split], seen: dict[str, list[Seen]], findings: Findings) -> None:
    """What the splits should not have in common, and what they should."""
    train, val = (splits[split].content["categories"] for split in SPLITS)
    for problem in differences(train, val):
        findings.add("warning" if problem.kind == LACKING else "error", "both", [problem])
    digests = {one.digest: one.path for one in seen["train"] if one.digest}
    names = {one.path.name for one in seen["train"]}
    for one in seen["val"]:
        if one.digest in digests:
            text = f"{one.path} is {digests[one.digest]}"
            findings.add("error", "both", [Problem("validation images that are trained on", text)])
        elif one.path.name in names:
            findings.add("warning", "both", [Problem("file names that both splits have", one.path.name)])


def _write(report: dict[str, Any], path: Path) -> None:
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another --json") from None


if __name__ == "__main__":
    sys.exit(main())
