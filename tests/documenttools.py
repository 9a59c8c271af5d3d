"""What the tests of documents share: a storage that keeps documents in a dict."""

from __future__ import annotations

import json
import threading
from typing import Any

from agentstate.context import SyncConversationContext
from agentstate.operations import Page
from agentstate.storage.document import DocumentStorage, DocumentUpdate

SECOND = 1_000_000


class Documents(DocumentStorage):
    """Documents in a dict, by a lock; with a clock that stands still, and a count of what is read and written."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.stored: dict[str, bytes] = {}
        self.now = 1_750_000_000 * SECOND
        self.reads = self.writes = 0
        self.lock = threading.Lock()

    def clock(self) -> int:
        return self.now

    def read_document(self, context_id: str, *, deadline: float) -> bytes | None:
        self.reads += 1
        return self.stored.get(context_id)

    def replace_document(self, context_id: str, update: DocumentUpdate, *, deadline: float) -> None:
        with self.lock:
            before = self.stored.get(context_id)
            after = update(before)
            if after is before:
                return
            self.writes += 1
            if after is None:
                del self.stored[context_id]
            else:
                self.stored[context_id] = after

    def list_documents(self, cursor: str, size: int, *, deadline: float) -> Page:
        names = sorted(name for name in self.stored if name > cursor)
        return Page(tuple(names[:size]), names[size - 1] if len(names) > size else None)

    def document(self, context_id: str = "a") -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.stored[context_id])
        return document

    def bookkeeping(self, context_id: str = "a") -> dict[str, Any]:
        bookkeeping: dict[str, Any] = self.document(context_id)["metadata"]["agentstate"]
        return bookkeeping


def contents(context: SyncConversationContext, context_id: str = "a") -> list[Any]:
    return [message["content"] for message in context.get_history(context_id)]
