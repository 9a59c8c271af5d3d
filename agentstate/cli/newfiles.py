"""New files that a command writes: all of them or none, never replacing an existing one."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .interrupts import undisturbed


class NewFile(NamedTuple):
    """A file to be written."""

    path: Path
    text: str


def write_all(files: list[NewFile]) -> None:
    """Write all files or none. Raises OSError with the name of the file, FileExistsError included."""
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
                    error.filename = str(path)  # an error of a full disk has none
                    raise
        except OSError:
            for path in done:
                path.unlink(missing_ok=True)
            raise
