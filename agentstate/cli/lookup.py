"""Looking for the conversation that somebody meant by an id that does not exist."""

from __future__ import annotations

import time
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Final

from ..errors import ContextNotFoundError, StateError
from ..storage.base import StateStorage
from ..transfer import pages_of_ids
from .store import Place

_MOST: Final = 10_000
_SECONDS: Final = 1.0
"""How many ids are compared, and how long they may take to be listed."""


def not_found(storage: StateStorage, place: Place, context_id: str) -> ContextNotFoundError:
    """The error for an id that does not exist, with the most similar one that does."""
    near = _nearest(storage, context_id)
    hint = f" (did you mean {near!r}?)" if near else ""
    return ContextNotFoundError(f"there is no conversation {context_id!r} in {place.name}{hint}", context_id=context_id)


def _nearest(storage: StateStorage, context_id: str) -> str | None:
    try:
        known = _some_ids(storage)
    except StateError:
        return None  # the id is missing all the same
    by_lower = {each.lower(): each for each in reversed(known)}
    typed = context_id.lower()
    ending = [each for each in by_lower if each.endswith((f":{typed}", f"/{typed}"))]  # typed without its prefix
    near = get_close_matches(typed, by_lower, 1, 0.7) or ending[:1]
    return by_lower[near[0]] if near else None


def _some_ids(storage: StateStorage) -> Sequence[str]:
    end = time.monotonic() + _SECONDS
    ids: list[str] = []
    for page in pages_of_ids(storage):
        ids += page
        if len(ids) >= _MOST or time.monotonic() >= end:
            break
    return ids[:_MOST]
