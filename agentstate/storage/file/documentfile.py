"""The files of JSON documents: their names, their content, and their contexts."""

from __future__ import annotations

import logging
from typing import Final

from ...errors import StateCorruptedError
from ...keys import document_stem, file_stem
from .filesystem import READ, unavailable
from .folder import Folder
from .lateimports import importing

DOCUMENT: Final = ".json"
LOG: Final = ".jsonl"

_PIECE: Final = 1 << 20

_logger = logging.getLogger("agentstate.storage.file")


def read_document_file(folder: Folder, stem: str, context_id: str | None) -> bytes | None:
    """The bytes of a document; None if there is no such file. Raises StateUnavailableError."""
    path = folder.file(stem + DOCUMENT)
    fs = folder.fs
    try:
        fd = fs.open(path, READ)
        try:
            pieces = []
            offset = 0
            while piece := fs.read_at(fd, _PIECE, offset):
                pieces.append(piece)
                offset += len(piece)
        finally:
            fs.close(fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unavailable(error, "read", path, context_id) from error
    return b"".join(pieces)


def context_of_document(folder: Folder, stem: str) -> str | None:
    """The id of the context whose document has this name; None for a file of another program."""
    try:
        stem.encode()
    except UnicodeEncodeError:  # its name is not valid UTF-8, so it is not the name of any context
        return None
    try:
        if document_stem(stem) == stem:
            return stem
        with importing:
            from ..documentformat import document_id

        data = read_document_file(folder, stem, None)
        context_id = None if data is None else document_id(data)
        return context_id if context_id is not None and document_stem(context_id) == stem else None
    except StateCorruptedError as error:
        _logger.warning("%s%s was passed over in a listing: %s", folder.file(stem), DOCUMENT, error)
        return None


def is_log_there(folder: Folder, context_id: str) -> bool:
    """Whether a context has a log that is not empty (an empty one is left by a crash). Raises StateUnavailableError."""
    path = folder.file(file_stem(context_id) + LOG)
    try:
        return folder.fs.stat(path).st_size > 0
    except FileNotFoundError:
        return False
    except OSError as error:
        raise unavailable(error, "look at", path, context_id) from error
