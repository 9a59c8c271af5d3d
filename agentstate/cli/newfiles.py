"""Files that commands write: all of them or none, and never over one that is there."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .interrupts import undisturbed


class NewFile(NamedTuple):
    """A file to be written."""

    path: Path
    text: str


def write_all(files: list[NewFile]) -> None:
    """Write all files, or none. Raises OSError that names the file, FileExistsError among them."""
    done: list[Path] = []
    with undisturbed():
        try:
            for path, text in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    with open(path, "x", encoding="utf-8") as file:
                        done.append(path)
                        file.write(text)
                except OSError as error:
                    error.filename = str(path)  # a full disk is told without one
                    raise
        except OSError:
            for path in done:
                path.unlink(missing_ok=True)
            raise
