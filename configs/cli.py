"""Command line and YAML -> Config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from configs.schema import FIELD_NAMES, Config, recipe_files
from util.errors import InputError
from util.yaml_files import read_yaml

BOOLEAN_FIELDS = frozenset(field.name for field in fields(Config) if field.type == "bool")


def parse_args(argv: Sequence[str]) -> Config:
    """The configuration of a run.

    Args:
        argv: the flags, without the program's name. Flags hold over files wherever they stand. A switch may be bare
            (`--dilation`), negated (`--no_aux_loss`) or have a value (`--amp false`); a bare `--enact` means "paper".

    Raises:
        InputError: an unknown flag or key, a wrong type, an unreadable file; one line.
    """
    files, flags = _split_config_files(_complete_switches(argv))
    try:
        recipe = recipe_files(*_pick_recipe(files, flags))
        config_flags = [word for file in (*recipe, *files) for word in ("--config", str(file))]
        parsed = build_parser().parse_args([*config_flags, *flags]).as_dict()
        parsed.pop("config")
        return Config(**parsed)
    except InputError:
        raise
    except (argparse.ArgumentError, ValueError) as error:
        raise InputError(_one_line(error)) from None


def build_parser() -> ArgumentParser:
    """A parser of every field of `Config`, and of --config, --print_config and --help."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="main.py", exit_on_error=False, allow_abbrev=False, description=(
        "Train and evaluate a detection transformer, dense or with ENACT. Without --coco_path it trains a small "
        "detector on scenes that it draws."
    ))
    parser.add_argument("--config", action="config", help="YAML with any of the fields below; flags hold over it.")
    parser.add_class_arguments(Config, None)
    return parser


def to_yaml(config: Config) -> str:
    """`config` as YAML that --config reads back."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False)


def _complete_switches(argv: Sequence[str]) -> list[str]:
    """Give every bare switch its value: --eval -> --eval true, --no_amp -> --amp false, --enact -> --enact paper."""
    completed: list[str] = []
    for position, word in enumerate(argv):
        name = word.removeprefix("--") if word.startswith("--") else ""
        bare = position + 1 == len(argv) or argv[position + 1].startswith("--")
        if name.removeprefix("no_") in BOOLEAN_FIELDS and name.startswith("no_"):
            completed += [f"--{name.removeprefix('no_')}", "false"]
        elif bare and name in BOOLEAN_FIELDS:
            completed += [word, "true"]
        elif bare and name == "enact":
            completed += [word, "paper"]
        else:
            completed.append(word)
    return completed


def _split_config_files(argv: list[str]) -> tuple[list[Path], list[str]]:
    """The files of --config, and the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[], type=Path)
    try:
        known, flags = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(_one_line(error)) from None
    return known.config, flags


def _pick_recipe(files: list[Path], flags: list[str]) -> tuple[str, str | None, bool]:
    """Model, variant of ENACT, and whether the built-in data is used, as files and flags say."""
    chosen: dict[str, Any] = {"model": "detr", "enact": None, "coco_path": None}
    for file in files:
        chosen |= {key: value for key, value in _read_yaml(file).items() if key in chosen}
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for key, value in chosen.items():
        parser.add_argument(f"--{key}", default=value)
    try:
        chosen = vars(parser.parse_known_args(flags)[0])
    except argparse.ArgumentError as error:
        raise InputError(_one_line(error)) from None
    enact, coco_path = (None if chosen[key] in ("null", "None", "") else chosen[key] for key in ("enact", "coco_path"))
    return chosen["model"], enact, coco_path is None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        values = read_yaml(file)
    except OSError as error:
        raise InputError(f"cannot read the config {file}: {error.strerror}") from None
    if not isinstance(values, dict):
        raise InputError(f"{file} must hold fields and values, such as `lr: 1.0e-4`")
    # jsonargparse takes more keys than fields: with `config` a file would have it read another one.
    unknown = [str(key)[:80] for key in values if key not in FIELD_NAMES]
    if unknown:
        raise InputError(f"{file} has {unknown[0]!r}, which is no field; --help lists them")
    return values


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:1000]
