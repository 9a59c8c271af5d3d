"""Context ids, and what they are called in a directory and in Valkey."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import Any, Final, NamedTuple

from .errors import InvalidContextIdError, StateConfigError

MAX_CONTEXT_ID_BYTES: Final = 1024


# Compiled when they are needed, since that takes a tenth of a short script's start: memory needs none of them, files
# some, Valkey others.
@cache
def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


_PLAIN_NAME = r"[a-z0-9][a-z0-9._-]{0,99}"
_DEVICE_NAME = r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?"  # Windows opens devices under these names
_HASHED_NAME = r"(?s:.*)~[0-9a-f]{32}"
_NOT_SLUG = r"[^a-z0-9._-]+"
_LONGEST_DOCUMENT_STEM = 255 - len(".json.tmp")  # the temporary name that AgentUp writes to first
_REFUSED_EVERYWHERE = r"[\x00/]"
_REFUSED_BY_WINDOWS = r'[\x00-\x1f\x7f/\\:*?"<>|]'
_ESCAPED_IN_KEY = r"[{}]|%(?=7B|7D|25)"
_ESCAPES_IN_KEY = {"{": "%7B", "}": "%7D", "%": "%25"}
_ESCAPE_IN_KEY = "%(7B|7D|25)"


def check_context_id(context_id: Any) -> str:
    """`context_id`, if it can be one: 1 to 1,024 bytes of UTF-8 without NUL. Raises InvalidContextIdError."""
    if not isinstance(context_id, str):
        raise InvalidContextIdError(f"a context id is text, not {type(context_id).__name__}")
    if not context_id:
        raise InvalidContextIdError("a context id must not be empty")
    if "\0" in context_id:
        raise InvalidContextIdError(f"the context id {context_id[:40]!r} contains a NUL character")
    try:
        size = len(context_id) if context_id.isascii() else len(context_id.encode())
    except UnicodeEncodeError:
        raise InvalidContextIdError(f"the context id {context_id[:40]!a} is not valid Unicode") from None
    if size > MAX_CONTEXT_ID_BYTES:
        raise InvalidContextIdError(
            f"the context id {context_id[:40]!r}... has {size:,} bytes of UTF-8; {MAX_CONTEXT_ID_BYTES:,} are allowed"
        )
    return context_id


def check_user_id(user_id: Any) -> str:
    """`user_id`, if it can be the owner of a context: text, not empty. Raises StateConfigError."""
    return _check_name("a user id", user_id)


def _check_name(what: str, name: Any) -> str:
    if not isinstance(name, str) or not name or "\0" in name:
        raise StateConfigError(f"{what} must be text that is not empty, got {name!a}")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise StateConfigError(f"{what} must be valid Unicode, got {name!a}") from None
    return name


# --- files ----------------------------------------------------------------------------------------------------------


def file_stem(context_id: str) -> str:
    """The name, without suffix, of a context's log file; distinct ids get distinct names on every file system."""
    if _pattern(_PLAIN_NAME).fullmatch(context_id) and not _pattern(_DEVICE_NAME).fullmatch(context_id):
        return context_id
    return _hashed(context_id)


def document_stem(context_id: str, *, windows: bool = os.name == "nt") -> str:
    """The name, without suffix, of a context's JSON document: AgentUp's, which is the id itself, if it can be a name.

    A name that only Windows refuses is one elsewhere: AgentUp wrote it, and must find it again.
    """
    refused = _REFUSED_BY_WINDOWS if windows else _REFUSED_EVERYWHERE
    if (
        len(context_id.encode()) > _LONGEST_DOCUMENT_STEM
        or _pattern(refused).search(context_id)
        or (windows and _pattern(_DEVICE_NAME).fullmatch(context_id.lower()))
        or _pattern(_HASHED_NAME).fullmatch(context_id)
    ):
        return _hashed(context_id)
    return context_id


def _hashed(context_id: str) -> str:
    from hashlib import sha256  # brings OpenSSL along: 4 ms and 3 MB that plain ids do without

    slug = _pattern(_NOT_SLUG).sub("-", context_id.lower())[:40].strip(".-") or "id"
    return f"{slug}~{sha256(context_id.encode()).hexdigest()[:32]}"


# --- Valkey ---------------------------------------------------------------------------------------------------------


class Keys(NamedTuple):
    """The keys of one context: all begin with the prefix, and are in one cluster slot."""

    state: str  # hash (or AgentUp's string): the truth
    history: str  # list of messages
    commits: str  # list of remembered commit ids
    lease: str  # string: token of the turn


class KeySpace:
    """The keys under one prefix.

    A prefix with a hash tag of its own (``{agents}:state:``) puts all its contexts into one slot. Other braces in a
    prefix would put the keys of a context into different slots and are a StateConfigError.
    """

    def __init__(self, prefix: str) -> None:
        outside = re.sub(r"\{[^{}]+\}", "", _check_name("key_prefix", prefix), count=1)
        if "{" in outside or "}" in outside:
            raise StateConfigError(
                f"key_prefix must have no braces but those of one hash tag, like '{{agents}}:state:', got {prefix!r}"
            )
        self.prefix = prefix
        self._escaped = _pattern(_ESCAPED_IN_KEY)

    def keys(self, context_id: str) -> Keys:
        key = self.prefix + self._escaped.sub(lambda match: _ESCAPES_IN_KEY[match[0]], context_id)
        # Ids have their braces escaped, so no state key goes on like this. The first braces hold the hash tag: the key
        # itself, or the tag of the prefix.
        others = f"{self.prefix}{{{key}}}:"
        return Keys(key, others + "history", others + "commits", others + "lease")

    def context_id(self, key: str) -> str:
        """The id whose state key `key` would be (its inverse for every key that `keys` gives)."""
        return _pattern(_ESCAPE_IN_KEY).sub(lambda match: chr(int(match[1], 16)), key[len(self.prefix) :])

    def pattern(self) -> str:
        """The glob pattern for SCAN of all state keys, without the other keys of contexts."""
        return re.sub(r"([*?\[\]\\])", r"\\\1", self.prefix) + "[^{]*"
