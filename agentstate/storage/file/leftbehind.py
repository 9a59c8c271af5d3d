"""The JSON document that AgentUp left for a context: read as it is, until the first write converts it to a log.

The log names the document that it was made from, by size and SHA-256. So a crash between the two steps of a
conversion (the log gets its name, the document gets another one) is recognised and finished, and a document that
another program writes later is not taken for it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from ...errors import StateConflictError
from ...keys import document_stem
from .documentfile import DOCUMENT, read_document_file
from .filesystem import unavailable
from .folder import Folder
from .lateimports import importing

if TYPE_CHECKING:
    from ..documentformat import Document

ADOPTED: Final = ".adopted"
"""The suffix of a document that was converted to a log."""


class LeftDocument:
    """The document of one context, if there is one. Methods raise StateUnavailableError."""

    __slots__ = ("context_id", "folder", "path", "stem")

    def __init__(self, folder: Folder, context_id: str) -> None:
        self.folder = folder
        self.context_id = context_id
        self.stem = document_stem(context_id)
        self.path = folder.file(self.stem + DOCUMENT)

    def read(self) -> tuple[Document, list[Any]] | None:
        """The document, and the value of `adopted` for its log. Raises StateCorruptedError, StateConflictError."""
        data = read_document_file(self.folder, self.stem, self.context_id)
        if data is None:
            return None
        with importing:
            from ..documentformat import parse_document  # there is seldom a document

        return parse_document(data, self.context_id), _name(data)

    def is_there(self, adopted: list[Any] | None) -> bool:
        """Whether it exists beside the log made from it. Raises StateConflictError if it is another document."""
        try:
            self.folder.fs.stat(self.path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unavailable(error, "look at", self.path, self.context_id) from error
        data = read_document_file(self.folder, self.stem, self.context_id)
        if data is not None and _name(data) != adopted:
            raise StateConflictError(
                f"{self.path} appeared beside the log of {self.context_id!r}: another program writes documents here. "
                "Nothing was merged; stop that program and move the document away, or use layout='document'",
                context_id=self.context_id,
            )
        return data is not None

    def put_away(self) -> None:
        """Rename it after its log was created."""
        try:
            self.folder.sync()  # or a power cut could undo the log's name, and not this
            with suppress(FileNotFoundError):
                self.folder.fs.replace(self.path, self.path + ADOPTED)
        except OSError as error:
            raise unavailable(error, "put away", self.path, self.context_id) from error

    def remove(self) -> None:
        """Remove it after the context was cleared."""
        try:
            self.folder.sync()
            with suppress(FileNotFoundError):
                self.folder.fs.unlink(self.path)
        except OSError as error:
            raise unavailable(error, "remove", self.path, self.context_id) from error

    def remove_adopted(self) -> None:
        """Remove the renamed document."""
        try:
            with suppress(FileNotFoundError):
                self.folder.fs.unlink(self.path + ADOPTED)
        except OSError as error:
            raise unavailable(error, "remove", self.path + ADOPTED, self.context_id) from error


def _name(data: bytes) -> list[Any]:
    with importing:
        from hashlib import sha256  # loads OpenSSL

    return [len(data), sha256(data).hexdigest()]
