"""Conversations in files: one per context, in one folder, on a local disk."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from ...errors import StateConfigError, StateCorruptedError, StateError
from ...keys import document_stem
from ...operations import Operation, Outcome
from ..base import Settle, StateStorage, one_of, positive_integer
from .access import Access
from .filesystem import FileSystem
from .folder import Folder
from .loglayout import LogLayout

if TYPE_CHECKING:
    from ..statistics import StorageStatistics
    from .documents import DocumentFiles
    from .expiry import ExpirySweep
    from .logrepair import Problem, Repair

CACHE_BYTES: Final = 32 * 1024 * 1024


class FileStorage(StateStorage):
    """Keeps each conversation in a file of its own in the folder `storage_dir`, which is created with the first write.

    Any number of threads and processes on one host may use the same folder, on a local file system with working
    `flock`. A leading ``~`` in `storage_dir` is the user's home folder. Options, beside those of every backend:

    - `layout`: ``"log"`` (append-only JSON Lines; cost does not grow with the conversation) or ``"document"`` (one
      JSON document per conversation, as AgentUp writes it)
    - `fsync`: when what was written is flushed to disk: ``"always"`` (before a call returns: it survives power loss),
      ``"everysec"`` (once a second), or ``"no"`` (whenever the operating system does it)
    - `exclusive`: only this object writes to the folder as long as it is open: no lock per operation, and nothing is
      looked up twice. Another one that tries to write or clean up gets a StateUnavailableError; others may read.
    - `cache_bytes`: about how many bytes of memory the cache of the conversations used last may take

    With a `ttl`, a background thread of each process that writes removes what has expired: every half `ttl`, between a
    second and a minute; more seldom where looking at all conversations would take more than 2 % of the time. It pauses
    for ten minutes after the clock was set, in case that it is wrong only for a while.
    """

    def __init__(
        self,
        storage_dir: str | os.PathLike[str] = "./conversation_states",
        *,
        layout: str = "log",
        fsync: str = "always",
        exclusive: bool = False,
        cache_bytes: int = CACHE_BYTES,
        file_system: FileSystem | None = None,
        **options: Any,
    ) -> None:
        path = _folder_path(storage_dir)
        one_of("layout", layout, ("log", "document"))
        one_of("fsync", fsync, ("always", "everysec", "no"))
        if not isinstance(exclusive, bool):
            raise StateConfigError(f"exclusive must be true or false, got {exclusive!r}")
        positive_integer("cache_bytes", cache_bytes)
        super().__init__(**options)
        self._folder = Folder(path, file_system or FileSystem(), self.tally)
        self._access = access = Access(self._folder, exclusive=exclusive)
        self._layout: LogLayout | DocumentFiles
        if layout == "log":
            self._layout = LogLayout(access, ttl=self.ttl, fsync=fsync, cache_bytes=cache_bytes)
        else:
            from .documents import DocumentFiles

            self._layout = DocumentFiles(access, fsync, ttl=self.ttl)
            self._layout.tally = self.tally
        self._one = self._layout.execute_one
        self._expiry: ExpirySweep | None = None
        if self.ttl is not None:
            from .expiry import ExpirySweep

            self._expiry = ExpirySweep(self, self.ttl)

    @property
    def storage_dir(self) -> str:
        """The absolute path of the folder."""
        return self._folder.path

    def execute(self, operations: Sequence[Operation], settle: Settle) -> None:
        if not self.closed:
            if self._expiry is not None and not self._expiry.started and self._access.is_open:
                self._expiry.start()
            self._layout.execute(operations, settle)
            return
        for index in range(len(operations)):
            try:
                self.check_open()
            except StateError as error:
                settle(index, error)

    def statistics(self) -> StorageStatistics:
        counted = super().statistics()
        if not isinstance(self._layout, LogLayout):  # it keeps nothing
            return counted
        from dataclasses import replace

        on_contexts = sum(counted.operations.values()) - counted.operations["listing"]
        return replace(counted, cache=self._layout.cache_statistics(on_contexts))

    def telemetry_attributes(self) -> dict[str, str | int]:
        return {"db.system.name": "agentstate.file", "db.namespace": os.path.basename(self._folder.path)}

    def execute_one(self, operation: Operation) -> Outcome:
        if self.closed:
            self.check_open()
        if self._expiry is not None and not self._expiry.started and self._access.is_open:
            self._expiry.start()
        return self._one(operation)

    def has_resources(self) -> bool:
        return self._access.is_open or self._folder.open_files > 0

    def verify(self) -> Iterator[Problem]:
        """Look through all that is stored, and say what is damaged. Raises StateUnavailableError."""
        from .logrepair import problems

        return problems(self._folder)

    def repair(self, context_id: str) -> Repair:
        """Save what is intact of a damaged conversation, and keep the damaged file under another name.

        Raises ContextNotFoundError, StateUnavailableError, StateTimeoutError; StateConflictError where another
        program's document is what is wrong; StateCorruptedError with layout="document", where there is no part that
        could be told to be intact.
        """
        if not isinstance(self._layout, LogLayout):
            from .logrepair import NO_PART

            path = self._folder.file(document_stem(context_id) + ".json")
            raise StateCorruptedError(NO_PART.format(path), context_id=context_id)
        return self._layout.repair(context_id, time.monotonic() + self.deadline)

    def close(self) -> None:
        if not self.closed:
            deadline = time.monotonic() + self.deadline
            if self._expiry is not None:
                self._expiry.stop()
            super().close()
            if isinstance(self._layout, LogLayout):
                self._layout.close(deadline)
            else:
                self._layout.close()

    def _after_fork(self) -> None:
        super()._after_fork()
        if self._expiry is not None:
            self._expiry.after_fork()
        if isinstance(self._layout, LogLayout):  # the other one is a storage, and hears of it by itself
            self._layout.after_fork()


def _folder_path(storage_dir: str | os.PathLike[str]) -> str:
    path: Any = os.fspath(storage_dir)
    if not isinstance(path, str) or not path or "\0" in path:
        raise StateConfigError(f"storage_dir must be the path of a folder, got {storage_dir!r}")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        coding = sys.getfilesystemencoding()
        raise StateConfigError(
            f"storage_dir {path!r} cannot be written in {coding}, the encoding of this locale"
        ) from error
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise StateConfigError(
            f"storage_dir {path!r} begins with the home folder of a user that is not known here; write the whole path, "
            f"or ./{path} for a folder of that name"
        )
    return expanded
