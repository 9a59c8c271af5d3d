r"""The format of a log file. No input or output here.

A log is JSON Lines. Each line ends in its *seal*, ``,"crc":"89abcdef"}``, and a newline. The seal is a CRC-32 (8
lower-case hexadecimal digits) of all bytes of the line before it; its start value is the CRC-32 of the context id plus
the offset of the line, modulo 2**32. So a line of another file, or at another place, does not match. Fields have the
order given here; a field without a value is left out. Times are microseconds since 1970. A message is an object; its
*position* is its number since the context was created. There are four kinds of lines:

Header, ``{"agentstate":1,"id":...}``
    The first line. ``agentstate`` is the format version, ``id`` the context id. ``adopted``: size and SHA-256 of the
    document that the log was converted from. A file with a larger version is refused, and never repaired.

Record, ``{"rev":7,"at":...,"id":...}``
    The result of one commit.

    - ``rev``, ``at``, ``id``: the revision and `updated` of the context after the commit; the commit id
    - ``flushed``: see below
    - ``expires``: when the context expires
    - ``start``, ``keep``: of the earlier messages, those at positions start <= p < keep remain
    - ``created``: the commit created the context: nothing before it remains, except for commit ids
    - ``owner``: the new owner
    - ``answer``: the answer of the commit; or ``unkept``: true, if it is too long to be kept
    - ``replaces``: a list of "set" and "meta": all keys of this space that are not named are removed
    - ``set``, ``unset``, ``meta``, ``unmeta``: variables and metadata that are set (an object) or removed (a list)
    - ``count``, ``add``: the messages that are appended, and their number unless it is 1

Checkpoint, ``{"checkpoint":7,"at":...}``
    The state after all lines before it, except for the messages: a reader needs the last checkpoint and the lines after
    it. ``checkpoint`` is the revision; 0 if the context does not exist.

    - ``flushed``: see below; ``begun``: the offset at which the write began that includes this line, if it differs
    - ``forget``: of a context that does not exist: when its commit ids may be forgotten
    - ``expires``, ``created``, ``start``, ``end``, ``owner``, ``variables``, ``metadata``: the state; the history is
      the positions start <= p < end
    - ``commits``: the last commit ids: their common prefix, then the rest of each
    - ``answers``, ``unkept``: answers by commit id, and the ids whose answers were too long to be kept
    - ``live``, ``base``: the approximate size of all messages, and the size of the file when it was last rewritten
    - ``runs``: where the messages are that were appended since the previous list of runs, each run as
      ``[first position, count, offset, size]`` of consecutive lines; ``older``: offset and size of the line with the
      previous list

History, ``{"history":0,"count":9,"add":[...]}``, and index, ``{"index":[<runs>],"older":[...]}``
    Messages from the position ``history`` on (later ones are removed), and runs as in a checkpoint. They take effect
    with the next record or checkpoint. The messages of a large commit are written so, before its record; and all
    messages of a file that is rewritten, before its checkpoint.

``flushed`` is in lines that were written when bytes before them were possibly not on disk: the offset up to which the
file was flushed. History lines before a record always have it. With fsync "always", a line is acknowledged only when it
is flushed, and nothing is written before everything earlier is flushed, so it is rare.

A crash can leave the end of a log *torn*: a fragment without newline, a region in which blocks of NUL bytes stand for
data that never reached the disk, or history lines without a record. Nothing in it was acknowledged. Readers ignore it,
and the next writer cuts it off. Anything else that does not match is damage. A single flipped bit always is damage: it
breaks a seal, or it hits the last newline, and then a complete line is followed by a byte that is neither a newline nor
NUL.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from json import decoder, scanner
from math import inf
from os.path import commonprefix
from typing import Any, Final, TypeAlias
from zlib import crc32

from ...codec import json_text, quoted
from ...operations import ALREADY_APPLIED, kept_answer
from ..resolve import Effects, Image

VERSION: Final = 1

SEAL_SIZE: Final = len(b',"crc":"00000000"}')
Run: TypeAlias = list[int]
"""Consecutive messages: first position, count, and the offset and size of the lines that hold them."""

CHECKPOINT_START: Final = b'\n{"checkpoint":'


class Damage(Exception):
    """The content is not that of a log, from this offset on."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"{reason}, at byte {offset:,}")
        self.offset = offset
        self.reason = reason


class NewerVersion(Damage):
    """A newer agentstate wrote the log: it is not damaged, and must not be repaired."""


# --- seals ----------------------------------------------------------------------------------------------------------


def seed_of(context_id: str) -> int:
    """The start value of the checksums of a context's log, at offset 0."""
    return crc32(context_id.encode())


def seal_body(body: bytes, seed: int, offset: int) -> tuple[bytes, bytes]:
    """The line of `body` (an object without its closing brace), with its newline; and its seal."""
    seal = b',"crc":"%08x"}' % crc32(body, (seed + offset) & 0xFFFFFFFF)
    return b"%b%b\n" % (body, seal), seal


def is_sealed(line: bytes, seed: int, offset: int) -> bool:
    """Whether the checksum of a line (without its newline) at `offset` is right."""
    body = line[:-SEAL_SIZE]
    return line[-SEAL_SIZE:] == b',"crc":"%08x"}' % crc32(body, (seed + offset) & 0xFFFFFFFF)


_SEAL = re.compile(rb',"crc":"[0-9a-f]{8}"\}')
_HOLE = re.compile(rb"\0\0+")


def is_torn(region: bytes, seed: int, offset: int) -> bool:
    """Whether the end of a file, from a line on whose checksum is wrong, is what a crash leaves behind.

    Torn is what no acknowledged commit can be in. A complete line in it shows that something else happened, unless
    it was written before what is missing was flushed.
    """
    *lines, fragment = region.split(b"\n")
    position = offset
    for line in lines:
        text = line.rpartition(b"\0")[2]  # behind the last hole: its newline may have been in one
        if text and is_sealed(text, seed, position + len(line) - len(text)):
            if _flushed_before(text) > offset:
                return False
        elif not _HOLE.search(line) and not line.startswith(b"\0"):  # no single flipped bit makes a NUL of "{"
            return False
        position += len(line) + 1
    # A line whose newline is damaged: it is complete, and followed by a byte other than NUL.
    text = fragment.lstrip(b"\0")
    position += len(fragment) - len(text)
    complete = (end for end in seal_ends(text) if is_sealed(text[:end], seed, position))
    return not any(end < len(text) and text[end] != 0 for end in complete)


def seal_ends(text: bytes) -> Iterator[int]:
    """The positions at which something that looks like a seal ends."""
    return (seal.end() for seal in _SEAL.finditer(text))


def _flushed_before(line: bytes) -> float:
    """The value of `flushed` of a line; infinite where it has none."""
    try:
        return float(fields(line).get("flushed", inf))
    except ValueError:
        return inf


_BEGINNING = re.compile(rb'\{"checkpoint":\d+,"at":\d+,(?:"flushed":(\d+),)?(?:"begun":(\d+),)?')


def begin_of_write(checkpoint: bytes, offset: int) -> int:
    """The offset at which the write began that included the checkpoint at `offset`."""
    match = _BEGINNING.match(checkpoint)
    return offset if match is None else int(match[2] or match[1] or offset)


# --- reading lines --------------------------------------------------------------------------------------------------

# The most frequent line: a record that appends one message. Groups: revision, time, commit id, expiry, first position;
# and of the whole line the message and the checksum. (Ids with spaces or escapes are left to `fields`.)
_APPEND_START: Final = (
    rb'\{"rev":(\d+),"at":(\d+),"id":"([^"\\ ]*)",(?:"flushed":\d+,)?(?:"expires":(\d+),)?(?:"start":(\d+),)?"add":\['
)
APPEND_LINE: Final = re.compile(_APPEND_START + rb'(.*)\],"crc":"([0-9a-f]{8})"\}\n')


class _Numerals(json.JSONDecoder):
    """Finds the ends of values. Numbers stay text, which is faster and has no limit of digits."""

    def __init__(self) -> None:
        super().__init__(parse_float=str, parse_int=str, parse_constant=str)


# The parts of Python's JSON reader that take a text and a position, and return a value and the position after it.
_json: Any = (decoder, scanner)
_string = _json[0].scanstring
_value = _json[1].make_scanner(json.JSONDecoder())
_skip = _json[1].make_scanner(_Numerals())


def fields(line: bytes) -> dict[str, Any]:
    """The fields of a line whose checksum is right. Stored values stay JSON text. Raises ValueError."""
    text = line.decode()
    result: dict[str, Any] = {}
    position = 0
    try:
        while text[position] != "}":
            name, position = _string(text, position + 2)
            result[name], position = _read_field.get(name, _value)(text, position + 1)
    except (IndexError, StopIteration, RecursionError) as error:
        raise ValueError("it is not JSON") from error
    return result


def _texts_of_list(text: str, position: int) -> tuple[list[bytes], int]:
    texts: list[bytes] = []
    while text[position] != "]":
        start = position + 1
        if text[start] == "]":
            return texts, start + 1
        _, position = _skip(text, start)
        texts.append(text[start:position].encode())
    return texts, position + 1


def _texts_of_object(text: str, position: int) -> tuple[dict[str, bytes], int]:
    texts: dict[str, bytes] = {}
    while text[position] != "}":
        if text[position + 1] == "}":
            return texts, position + 2
        key, position = _string(text, position + 2)
        start = position + 1
        _, position = _skip(text, start)
        texts[key] = text[start:position].encode()
    return texts, position + 1


def _text_of_value(text: str, position: int) -> tuple[bytes, int]:
    _, end = _skip(text, position)
    return text[position:end].encode(), end


def _ids(text: str, position: int) -> tuple[str, int]:
    """A list of commit ids stays JSON: see `ids_of`."""
    end = text.find('"]', position) + 2
    said = text[position:end]
    # Without escapes, a quotation mark begins or ends a text. So these are texts, if each of them stands between two.
    if said.startswith('["') and "\\" not in said and said.count('"') == 2 * said.count('","') + 2:
        return said, end
    ids, end = _value(text, position)
    if not isinstance(ids, list) or not ids or not all(isinstance(part, str) for part in ids):
        raise ValueError("ids of commits are texts")
    return to_ascii(ids), end


_read_field: Final[dict[str, Callable[[str, int], tuple[Any, int]]]] = {
    "add": _texts_of_list,
    "answer": _text_of_value,
    "commits": _ids,
    **dict.fromkeys(("set", "meta", "variables", "metadata", "answers"), _texts_of_object),
}
"""How fields are parsed whose values stay text."""


def messages_of(line: bytes) -> list[bytes]:
    """The messages in a line whose checksum is right. Raises Damage."""
    try:
        added: list[bytes] = fields(line).get("add", [])
    except ValueError as error:
        raise Damage(0, str(error)) from error
    return added


def read_header(data: bytes, seed: int) -> dict[str, Any]:
    """The fields of the header of a log that begins with `data`. Raises NewerVersion, Damage."""
    line, newline, _ = data.partition(b"\n")
    check_version(line, seed)
    if not newline or not is_sealed(line, seed, 0):
        raise Damage(0, "the first line is not a valid header of this context's log")
    try:
        said = fields(line)
    except ValueError as error:
        raise Damage(0, str(error)) from error
    if said.get("agentstate") != VERSION or "id" not in said:
        raise Damage(0, "the first line is not a header")
    return said


_VERSION_OF_HEADER = re.compile(rb'\{"agentstate":(\d+)')


def check_version(header_line: bytes, seed: int) -> None:
    """Raise NewerVersion if the header of a log has a larger version, whatever its seal looks like.

    A header that would be sealed if it said the known version is damaged.
    """
    match = _VERSION_OF_HEADER.match(header_line)
    if match is None or int(match[1]) <= VERSION:
        return
    if not is_sealed(b'{"agentstate":%d%b' % (VERSION, header_line[match.end() :]), seed, 0):
        raise NewerVersion(0, f"a log of format version {int(match[1])}, which a newer agentstate wrote")


# --- writing lines --------------------------------------------------------------------------------------------------

to_ascii = json.JSONEncoder(separators=(",", ":")).encode
quoted_ascii: Callable[[str], str] = json.encoder.encode_basestring_ascii  # a text as a JSON text


def text(value: Any) -> bytes:
    try:
        return json_text(value).encode()
    except UnicodeEncodeError:
        return to_ascii(value).encode()


def ids_text(ids: list[str]) -> bytes:
    """Commit ids as a list of their common prefix and the rest of each."""
    if ids:
        # What the first and the last have in common (ids that are counted: all but the last digits) mostly is what all
        # have. Then none has to be looked at by itself, which would be two thirds of the time of a checkpoint.
        prefix = ids[0]
        while not ids[-1].startswith(prefix):
            prefix = prefix[:-1]
        size, others = len(prefix), len(ids) - 1
        whole = '","'.join(ids)
        rest = whole.replace('","' + prefix, '","')
        if len(whole) - len(rest) == size * others and whole.count('"') == 2 * others and "\\" not in whole:
            return f'["{prefix}","{rest[size:]}"]'.encode()
    prefix = commonprefix(ids)  # noqa: RUF071 - of texts, these are no paths
    size = len(prefix)
    return text([prefix, *[commit_id[size:] for commit_id in ids]])


def ids_of(said: str) -> list[str]:
    """The inverse of `ids_text`."""
    prefix, *rest = _value(said, 0)[0] if "\\" in said else said[2:-2].split('","')
    return [prefix + suffix for suffix in rest]


def object_of(texts: dict[str, bytes]) -> bytes:
    return b"{%b}" % b",".join([b"%b:%b" % (_name(key), value) for key, value in texts.items()])


def _name(key: str) -> bytes:
    try:
        return quoted(key).encode()
    except UnicodeEncodeError:
        return quoted_ascii(key).encode()


def header(context_id: str, adopted: Sequence[Any] | None = None) -> bytes:
    """The first line of a log."""
    body = b'{"agentstate":%d,"id":%b' % (VERSION, text(context_id))
    if adopted is not None:
        body += b',"adopted":' + text(adopted)
    return seal_body(body, seed_of(context_id), 0)[0]


def record(before: Image, effects: Effects, flushed: int | None) -> bytes:
    """The record of a commit, without its seal. `before` is the image that the commit was resolved against."""
    parts = [
        b'{"rev":%d,"at":%d,"id":' % (effects.revision, effects.updated),
        quoted_ascii(effects.commit_id).encode(),
    ]
    if flushed is not None:
        parts.append(b',"flushed":%d' % flushed)
    if effects.expires is not None:
        parts.append(b',"expires":%d' % effects.expires)
    if effects.start != before.start:
        parts.append(b',"start":%d' % effects.start)
    if effects.keep != before.end:
        parts.append(b',"keep":%d' % effects.keep)
    if not before.exists or effects.created != before.created:
        parts.append(b',"created":%d' % effects.created)
    if effects.user_id != before.user_id:
        parts.append(b',"owner":' + text(effects.user_id))
    if effects.answer:
        answer = kept_answer(effects.answer)
        parts.append(b',"unkept":true' if answer == ALREADY_APPLIED else b',"answer":' + answer)
    if effects.variables or effects.metadata or effects.replaces_variables or effects.replaces_metadata:
        _spaces(effects, parts)
    if effects.appended:
        if len(effects.appended) > 1:
            parts.append(b',"count":%d' % len(effects.appended))
        parts += (b',"add":[', b",".join(effects.appended), b"]")
    return b"".join(parts)


def _spaces(effects: Effects, parts: list[bytes]) -> None:
    replaced = effects.replaces_variables, effects.replaces_metadata
    if any(replaced):
        parts.append(b',"replaces":' + text([name for name, yes in zip(("set", "meta"), replaced, strict=True) if yes]))
    for put, drop, changes in ((b"set", b"unset", effects.variables), (b"meta", b"unmeta", effects.metadata)):
        if changes:
            values = {key: value for key, value in changes.items() if value is not None}
            dropped = [key for key, value in changes.items() if value is None]
            if values:
                parts.append(b',"%b":%b' % (put, object_of(values)))
            if dropped:
                parts.append(b',"%b":%b' % (drop, text(dropped)))
