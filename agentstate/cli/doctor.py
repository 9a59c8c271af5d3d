"""The command doctor: is everything there that state needs, and does it work?"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import click

from ..context import SyncConversationContext
from ..errors import StateConfigError, StateCorruptedError, StateError, StateUnavailableError
from ..operations import Query, Snapshot
from ..registry import read_config
from ..storage.base import StateStorage
from ..transfer import pages_of_ids, read_contexts
from ..version import __version__
from . import console, exits
from .doctor_file import look_at_folder
from .doctor_valkey import advice_on_connecting, look_at_servers
from .findings import Finding, note, ok, problem, warning
from .store import Place, chosen_place, json_option, store_options_unread, use_config

_PROBES: Final = 20
_SLOW: Final = 0.25  # seconds
_LOOK_FOR: Final = 3.0  # seconds, for damage
_MARKS: Final = {"ok": ("✔", "+", "green"), "note": ("·", "-", "dim"), "warning": ("!", "!", "yellow")}
_PROBLEM_MARK: Final = ("✘", "x", "bold red")


@click.command()
@store_options_unread
@click.option("--strict", is_flag=True, help="Fail for warnings too.")
@click.option("--read-only", is_flag=True, help="Write nothing: no conversation is made to try the storage.")
@json_option
def doctor(chosen: dict[str, Any], strict: bool, read_only: bool, as_json: bool) -> int:
    """Check that state can be kept: configuration, storage, durability, permissions, speed.

    Writes, reads and deletes a conversation of its own in the configured storage. The exit code is 1 if there is a
    problem.

    \b
    Examples:
      agentstate doctor
      agentstate doctor --url valkey://localhost:6379
      agentstate doctor --json | jq -r '.findings[] | select(.level == "problem").text'
    """
    found: list[Finding] = []
    logging.getLogger("agentstate").setLevel(logging.CRITICAL)  # what is wrong is said here, and once
    for finding in _examine(chosen, read_only):
        found.append(finding)
        if not as_json:
            _print(finding)
            sys.stdout.flush()
    levels = [finding.level for finding in found]
    bad = levels.count("problem")
    warned = levels.count("warning")
    if as_json:
        console.json_document({"problems": bad, "warnings": warned, "findings": [each._asdict() for each in found]})
    else:
        console.line()
        console.line(_summary(bad, warned), "bold red" if bad else "bold yellow" if warned else "bold green")
    return exits.PROBLEM if bad or (strict and warned) else exits.OK


def _summary(bad: int, warned: int) -> str:
    if not bad and not warned:
        return "Everything is fine."
    counts = ((bad, "problem"), (warned, "warning"))
    parts = [console.counted(count, word) for count, word in counts if count]
    return " and ".join(parts) + " found."


def _print(finding: Finding) -> None:
    mark, plain_mark, style = _MARKS.get(finding.level, _PROBLEM_MARK)
    try:
        mark.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        mark = plain_mark
    if not console.on_terminal():
        console.line(f"{finding.level}\t{finding.subject}\t{console.one_line(finding.text)}\t{finding.advice}")
        return
    console.line(f"{mark} ", style, end="")
    console.line(f"{finding.subject:<14} ", "bold", end="")
    console.line(console.one_line(finding.text))
    if finding.advice:
        console.line(f"{'':17}{finding.advice}", style)


# --- the examination ------------------------------------------------------------------------------------------------


def _examine(chosen: dict[str, Any], read_only: bool) -> Iterator[Finding]:
    yield ok("version", f"agentstate {__version__}, Python {sys.version.split()[0]} on {sys.platform}")
    try:
        use_config(chosen["config_file"])
        config = read_config()
    except StateConfigError as error:
        for text in error.problems or [str(error)]:
            yield problem("configuration", text)
        return
    if config.source is None:
        yield note("configuration", "there is no configuration file: the defaults hold", "agentstate init writes one")
    else:
        yield ok("configuration", f"{config.source}, section {config.section or '(none)'}")
    if not config.enabled:
        yield warning("configuration", "state management is switched off: `enabled: false`", "handlers get no context")
    try:
        place = chosen_place(chosen)
        with place.open(shared=False) as storage:
            yield ok("storage", f"{place.backend}: {place.name}")
            yield from _examine_storage(place, storage, read_only)
    except StateConfigError as error:
        for text in error.problems or [str(error)]:
            yield problem("storage", text)


def _examine_storage(place: Place, storage: StateStorage, read_only: bool) -> Iterator[Finding]:
    if place.backend == "memory":
        yield note("durability", "what is in memory is forgotten when the process ends", "for tests and trials")
    elif place.backend == "file":
        yield from look_at_folder(storage, place.options)
    elif place.backend == "valkey":
        usable = True
        for finding in look_at_servers(storage, place.options):
            usable = (usable and finding.subject != "connection") or finding.level != "problem"
            yield finding
        if not usable:
            return
    if storage.ttl is None and place.backend == "valkey":
        yield warning(
            "ttl", "conversations are kept forever, and so may fill the server's memory", "add a line like `ttl: 7200`"
        )
    elif storage.ttl is not None:
        yield ok("ttl", f"a conversation expires {console.duration_text(storage.ttl)} after its last write")
    if not read_only:
        yield from _try_out(storage)
    yield from _look_for_damage(storage)
    repeated = storage.statistics().attempts_repeated
    if repeated:
        yield warning(
            "retries",
            f"{console.counted(repeated, 'operation')} of this check had to be tried again",
            "the server or the way to it is unsteady",
        )


# --- trying it out --------------------------------------------------------------------------------------------------


def _try_out(storage: StateStorage) -> Iterator[Finding]:
    """Do with a conversation of our own what handlers do, and say how long it takes."""
    context = SyncConversationContext(storage)
    # Few names, for the commit ids of a cleared conversation stay for a while; and several, for others may do this too.
    probe = f"agentstate-doctor-{os.getpid() % 8}"
    try:
        yield from _round_trip(context, probe)
        yield _timed("append", lambda number: context.add_to_history(probe, "user", f"message {number}"))
        yield _timed("read", lambda number: context.get_history(probe, limit=10))
        yield _timed("variable", lambda number: context.increment_variable(probe, "count"))
        yield from _turn(context, probe)
    except StateError as error:
        yield problem("operations", str(error), _advice_on(error))
    finally:
        try:
            context.clear_context(probe)
        except StateError as error:
            yield problem("operations", f"the conversation {probe!r} of this check could not be deleted: {error}")


def _round_trip(context: SyncConversationContext, probe: str) -> Iterator[Finding]:
    value = {"text": "tea é 漢 😀", "number": 2**70, "list": [1.5, None, True, {}]}
    context.set_variable(probe, "value", value)
    if context.get_variable(probe, "value") != value:
        yield problem("operations", "what was read is not what was written", "is another program writing here?")
    else:
        yield ok("operations", "writes, reads it back, deletes")
    storage = context.storage
    found: Any = storage.call(Query(probe, deadline=time.monotonic() + storage.deadline))
    if storage.ttl is not None and isinstance(found, Snapshot) and found.expires is None:
        yield problem("ttl", "the storage does not let conversations expire, although a ttl is set")


def _turn(context: SyncConversationContext, probe: str) -> Iterator[Finding]:
    began = time.perf_counter()
    with context.turn(probe) as turn:
        turn.set_variable("turn", True)
    yield ok("turn", f"taken and given back in {_milliseconds(time.perf_counter() - began)}")


def _timed(name: str, operation: Callable[[int], object]) -> Finding:
    seconds = []
    for number in range(_PROBES):
        began = time.perf_counter()
        operation(number)
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds)[_PROBES // 2]
    text = f"{_milliseconds(median)} in the middle of {_PROBES}, {_milliseconds(max(seconds))} at most"
    if median > _SLOW:
        return warning(name, text, "that is slow: each message takes several such operations")
    return ok(name, text)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def _advice_on(error: StateError) -> str:
    return advice_on_connecting(error) if isinstance(error, StateUnavailableError) else ""


# --- what is there --------------------------------------------------------------------------------------------------


def _look_for_damage(storage: StateStorage) -> Iterator[Finding]:
    """Read the heads of conversations for some seconds."""
    end = time.monotonic() + _LOOK_FOR
    seen = 0
    complete = True
    damaged: list[str] = []
    refused: list[str] = []
    try:
        for page in pages_of_ids(storage):
            for first in range(0, len(page), 100):
                group = page[first : first + 100]
                for outcome in read_contexts(storage, group, variables=None, metadata=None):
                    seen += outcome is not None
                    if isinstance(outcome, StateError):
                        (damaged if isinstance(outcome, StateCorruptedError) else refused).append(str(outcome))
                if time.monotonic() > end:
                    complete = False
                    break
            if not complete:
                break
    except StateError as error:
        yield problem("conversations", f"they cannot be listed: {error}")
        return
    for texts, advice in ((damaged, "agentstate verify tells which, and --repair saves what is intact"), (refused, "")):
        for text in texts[:5]:
            yield problem("conversations", text, advice)
        if len(texts) > 5:
            yield problem("conversations", f"and {len(texts) - 5:,} more like these", advice)
    if not damaged and not refused:
        yield ok("conversations", f"{seen:,} {'can be' if complete else 'of them looked at, all can be'} read")


COMMANDS = (doctor,)
