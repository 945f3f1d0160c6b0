"""README.md and docs/ taken apart: their commands, code, flags, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")
SHELL = ("", "bash", "sh")


class Command(NamedTuple):
    """A command line of a page, and its words without the comment behind it."""

    page: str
    text: str
    words: tuple[str, ...]

    @property
    def script(self) -> str | None:
        """What Python runs, if it is Python alone."""
        plain = self.words[0] == "python" and not {"&&", "||", "|", ">", ";"} & set(self.words)
        return self.words[1] if plain else None


def commands(page: Path) -> list[Command]:
    """The commands of a page, in order; a line that ends in a backslash goes on in the next."""
    lines = (line.strip() for block in _blocks(page, SHELL) for line in block.replace("\\\n", " ").splitlines())
    split = [(line, tuple(shlex.split(line, comments=True))) for line in lines]
    return [Command(page.name, " ".join(words), words) for line, words in split if words]


def python_blocks(page: Path) -> list[str]:
    """The pieces of Python code of a page."""
    return list(_blocks(page, ("python",)))


def _blocks(page: Path, languages: tuple[str, ...]) -> Iterator[str]:
    return (block for language, block in FENCE.findall(page.read_text()) if language in languages)


def prose(page: Path) -> str:
    """A page without its blocks."""
    return FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links within the project that lead nowhere."""
    broken = []
    for link in LINK.findall(page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = anchors(target) if target.suffix == ".md" and target.is_file() else set()
        if not target.exists() or (anchor and anchor not in known):
            broken.append(link)
    return broken
