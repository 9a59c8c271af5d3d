"""The document layout in Valkey: one JSON text per context, exactly as AgentUp writes it.

A write reads the text and replaces it by a compare-and-set, one atomic step on the server. Retries are safe: the text
holds the ids of commits, so a commit that was applied is found in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from time import monotonic, sleep
from typing import Any, Final

from ...errors import StateCorruptedError, StateOutcomeUnknownError, StateTimeoutError
from ...keys import KeySpace
from ...operations import NEVER, Page
from ..document import DocumentStorage, DocumentUpdate
from ..documentformat import document_id
from .failures import failure, passes, pauses, repeat
from .listing import checked, scan_page
from .nodes import Servers
from .script import ATTEMPT, MICROSECONDS
from .wire import Connection, LostConnectionError, NoTimeLeftError, ServerError, command

_SCRIPT: Final = b"""\
-- KEYS: the text. ARGV: not_after, 1 if there is a text now, that text, 1 if there is to be one, the new text, when
-- it expires (milliseconds since 1970, 'keep', or '' for never). Answers 1 if it was replaced, 0 if it was another one,
-- -1 if it is too late.
local clock = redis.call('TIME')
if clock[1] * 1000000 + clock[2] > tonumber(ARGV[1]) then
  return -1
end
if redis.call('GET', KEYS[1]) ~= (ARGV[2] == '1' and ARGV[3]) then
  return 0
end
if ARGV[4] ~= '1' then
  redis.call('DEL', KEYS[1])
elseif ARGV[6] == '' then
  redis.call('SET', KEYS[1], ARGV[5])
elseif ARGV[6] == 'keep' then
  redis.call('SET', KEYS[1], ARGV[5], 'KEEPTTL')
else
  redis.call('SET', KEYS[1], ARGV[5], 'PXAT', ARGV[6])
end
return 1
"""
_SHA: Final = hashlib.sha1(_SCRIPT, usedforsecurity=False).hexdigest()


class ValkeyDocuments(DocumentStorage):
    """Contexts as documents in a Valkey."""

    load_script = command("SCRIPT", "LOAD", _SCRIPT)

    def __init__(self, servers: Servers, keys: KeySpace, *, min_replicas: int, **options: Any) -> None:
        super().__init__(**options)
        self._servers = servers
        self._keys = keys
        self._min_replicas = min_replicas
        self._offset = 0  # from this process's monotonic clock to the server's time, in microseconds

    def missing_permissions(self, connection: Connection) -> str:
        """A write is one command, so nothing can be left half done."""
        return ""

    def slot(self, context_id: str) -> int:
        """The cluster slot of a context."""
        return self._servers.slot(self._key(context_id))

    def clock(self) -> int:
        return int(monotonic() * MICROSECONDS) + self._offset

    def read_document(self, context_id: str, *, deadline: float) -> bytes | None:
        deadline = self._limited(deadline)
        return repeat(lambda: self._get(context_id, deadline), deadline, self._servers, context_id)

    def replace_document(self, context_id: str, update: DocumentUpdate, *, deadline: float) -> None:
        deadline = self._limited(deadline)
        unknown: Exception | None = None
        problem: Exception | None = None
        for pause in pauses():
            try:
                current = self._get(context_id, deadline)
                new = update(current)
                expiry: int | bytes = b"" if new is None or update.remove_at is None else -(-update.remove_at // 1000)
                if new is current:
                    if new is None or not self._min_replicas:
                        return
                    expiry = b"keep"  # written again: perhaps it is applied, but was not confirmed
                try:
                    if self._compare_and_set(context_id, current, new, expiry, deadline):
                        return
                except LostConnectionError as error:
                    unknown = error
                    raise
                problem = None
            except (LostConnectionError, ServerError) as error:
                self._servers.changed(error)
                if problem is None or not isinstance(error, NoTimeLeftError):
                    problem = error
                if not passes(error):
                    break
            left = deadline - monotonic()
            if left <= 0:
                break
            if problem is not None:
                sleep(min(left, pause))
        if unknown is not None:
            raise StateOutcomeUnknownError(f"sent, but not confirmed: {unknown}", context_id=context_id) from unknown
        if problem is not None:
            raise failure(problem, context_id, reads=False) from problem
        raise StateTimeoutError(f"{context_id!r} kept changing until the deadline; not done", context_id=context_id)

    def list_documents(self, cursor: str, size: int, *, deadline: float) -> Page:
        deadline = self._limited(deadline)
        return repeat(
            lambda: scan_page(self._servers, self._keys, cursor, size, self._attempt_end(deadline), _with_documents),
            deadline,
            self._servers,
        )

    def _limited(self, deadline: float) -> float:
        return monotonic() + self.deadline if deadline == NEVER else deadline

    def _attempt_end(self, deadline: float) -> float:
        return min(deadline, monotonic() + ATTEMPT)

    def _key(self, context_id: str) -> bytes:
        return self._keys.keys(context_id).state.encode()

    def _get(self, context_id: str, deadline: float) -> bytes | None:
        key = self._key(context_id)
        time, data = checked(self._servers.ask(key, self._attempt_end(deadline), command("TIME"), command("GET", key)))
        self._offset = int(time[0]) * MICROSECONDS + int(time[1]) - int(monotonic() * MICROSECONDS)
        text: bytes | None = data
        return text

    def _compare_and_set(
        self, context_id: str, current: bytes | None, new: bytes | None, expiry: int | bytes, deadline: float
    ) -> bool:
        """Replace exactly that text. False if it was another one."""
        key = self._key(context_id)
        end = self._attempt_end(deadline)
        arguments = (
            int(end * MICROSECONDS) + self._offset,
            *((0, b"") if current is None else (1, current)),
            *((0, b"") if new is None else (1, new)),
            expiry,
        )
        call = command("EVALSHA", _SHA, 1, key, *arguments)
        wait = []
        if self._min_replicas:
            wait = [command("WAIT", self._min_replicas, max(1, int((end - monotonic()) * 800)))]
        replies = self._servers.ask(key, end, call, *wait)
        if isinstance(replies[0], ServerError) and replies[0].code == "NOSCRIPT":
            replies = self._servers.ask(key, end, self.load_script, call, *wait)[1:]
        replaced = checked(replies)[0] == 1
        if replaced and wait and replies[1] < self._min_replicas:
            raise LostConnectionError(f"only {replies[1]} of {self._min_replicas} replicas confirmed it in time")
        return bool(replaced)


def _with_documents(connection: Connection, found: dict[str, bytes], now: int) -> Iterable[str]:
    """The ids whose key holds their document, and not that of a longer prefix or something else."""
    texts = connection.ask(*(command("GET", key) for key in found.values())) if found else []
    for context_id, text in zip(found, texts, strict=True):
        if isinstance(text, ServerError) and text.code != "WRONGTYPE":
            raise text
        if not isinstance(text, bytes):
            continue
        try:
            if document_id(text) != context_id:
                continue
        except StateCorruptedError:  # it is there, whatever it is
            pass
        yield context_id
