"""YAML files that may be of any origin: plain values only, of a size that a person writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from util.errors import InputError
from util.files import regular_size

LARGEST_FILE = 2**18  # bytes


def read_yaml(path: Path) -> Any:
    """The content of a YAML file, read without tags of classes and without aliases, of which few become billions.

    Raises:
        InputError: it is missing, too large, or not such YAML.
        OSError: it cannot be read.
    """
    regular_size(path, LARGEST_FILE)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader)  # a kind of SafeLoader
    except (OSError, MemoryError):
        raise
    except RecursionError:
        raise InputError(f"{path} is not valid YAML for us: it is nested too deeply") from None
    except Exception as error:  # the constructors of yaml raise many kinds, whatever the scalar
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{path} is not valid YAML: {reason}") from None


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, f"the alias *{event.anchor} is not allowed", event.start_mark)
        return super().compose_node(parent, index)
