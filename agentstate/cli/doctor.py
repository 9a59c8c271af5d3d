"""The command doctor: check the configuration and the storage."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Final
from uuid import uuid4

import click

from ..blocking import SyncConversationContext
from ..errors import StateConfigError, StateCorruptedError, StateError, StateUnavailableError
from ..operations import Query, Snapshot
from ..registry import read_config
from ..storage.base import StateStorage
from ..transfer import pages_of_ids, read_contexts
from ..version import __version__
from . import console, exits
from .doctor_file import look_at_folder, remove_file
from .doctor_valkey import advice_on_connecting, look_at_servers
from .findings import Finding, note, ok, problem, warning
from .store import Place, chosen_place, json_option, store_options_unread, use_config

_REPEATED: Final = 20
_SLOW: Final = 0.25  # seconds
_READ_FOR: Final = 3.0  # seconds, looking for damage
_MARKS: Final = {"ok": ("✔", "+", "green"), "note": ("·", "-", "dim"), "warning": ("!", "!", "yellow")}
_PROBLEM_MARK: Final = ("✘", "x", "bold red")


@click.command()
@store_options_unread
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too.")
@click.option("--read-only", is_flag=True, help="Do not write a conversation to the storage to test it.")
@json_option
def doctor(chosen: dict[str, Any], strict: bool, read_only: bool, as_json: bool) -> int:
    """Check the configuration and the storage: permissions, durability, speed, damage.

    Writes, reads and deletes a test conversation in the configured storage. The exit code is 1 if there is a problem.

    \b
    Examples:
      agentstate doctor
      agentstate doctor --url valkey://localhost:6379
      agentstate doctor --json | jq -r '.findings[] | select(.level == "problem").text'
    """
    found: list[Finding] = []
    logging.getLogger("agentstate").setLevel(logging.CRITICAL)  # reported below instead
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
        return "No problems found."
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
        console.line(
            f"{finding.level}\t{finding.subject}\t{console.one_line(finding.text)}\t{console.one_line(finding.advice)}"
        )
        return
    console.line(f"{mark} ", style, end="")
    console.line(f"{finding.subject:<14} ", "bold", end="")
    console.line(console.one_line(finding.text))
    if finding.advice:
        console.line(f"{'':17}{console.one_line(finding.advice)}", style)


# --- the examination ------------------------------------------------------------------------------------------------


def _examine(chosen: dict[str, Any], read_only: bool) -> Generator[Finding, None, None]:
    yield ok("version", f"agentstate {__version__}, Python {sys.version.split()[0]} on {sys.platform}")
    try:
        use_config(chosen["config_file"])
        config = read_config()
    except StateConfigError as error:
        for text in error.problems or [str(error)]:
            yield problem("configuration", text)
        return
    if config.source is None:
        yield note("configuration", "no configuration file: the defaults apply", "`agentstate init` writes one")
    else:
        yield ok("configuration", f"{config.source}, section {config.section or '(none)'}")
    if not config.enabled:
        yield warning("configuration", "state management is disabled by `enabled: false`", "handlers get no context")
    try:
        place = chosen_place(chosen)
        test_id = f"agentstate-doctor-{uuid4().hex}"
        try:
            with place.open(shared=False, may_be_new=True) as storage:
                yield ok("storage", f"{place.backend}: {place.name}")
                yield from _examine_storage(place, storage, None if read_only else test_id)
        finally:
            if place.backend == "file":
                remove_file(place.name, test_id)
    except StateConfigError as error:
        for text in error.problems or [str(error)]:
            yield problem("storage", text)
    except StateUnavailableError as error:
        yield problem("connection", str(error), advice_on_connecting(error))


def _examine_storage(place: Place, storage: StateStorage, test_id: str | None) -> Iterator[Finding]:
    if place.backend == "memory":
        yield note("durability", "memory is lost when the process ends", "use it for tests only")
    elif place.backend == "file":
        yield from look_at_folder(place.name, place.options)
    elif place.backend == "valkey":
        usable = True
        for finding in look_at_servers(storage, place.options):
            usable = (usable and finding.subject != "connection") or finding.level != "problem"
            yield finding
        if not usable:
            return
    if storage.ttl is None and place.backend == "valkey":
        yield warning(
            "ttl", "conversations never expire and may fill the memory of the server", "set for example `ttl: 7200`"
        )
    elif storage.ttl is not None:
        yield ok("ttl", f"conversations expire {console.duration_text(storage.ttl)} after their last write")
    if test_id is not None:
        yield from _try_out(storage, test_id)
    yield from _look_for_damage(storage)
    repeated = storage.statistics().attempts_repeated
    if repeated:
        yield warning(
            "retries",
            f"{console.counted(repeated, 'operation')} of this check had to be retried",
            "the server or the network is unreliable",
        )


# --- the test conversation ------------------------------------------------------------------------------------------


def _try_out(storage: StateStorage, test_id: str) -> Iterator[Finding]:
    """Do what handlers do with a conversation of our own, and measure it."""
    context = SyncConversationContext(storage)
    try:
        yield from _round_trip(context, test_id)
        yield _timed("append", lambda number: context.add_to_history(test_id, "user", f"message {number}"))
        yield _timed("read", lambda number: context.get_history(test_id, limit=10))
        yield _timed("variable", lambda number: context.increment_variable(test_id, "count"))
        yield from _turn(context, test_id)
    except StateError as error:
        yield problem("operations", str(error), _advice_on(error))
    finally:
        try:
            context.clear_context(test_id)
        except StateError as error:
            yield problem("operations", f"the test conversation {test_id!r} could not be deleted: {error}")


def _round_trip(context: SyncConversationContext, test_id: str) -> Iterator[Finding]:
    value = {"text": "tea é 漢 😀", "number": 2**70, "list": [1.5, None, True, {}]}
    context.set_variable(test_id, "value", value)
    if context.get_variable(test_id, "value") != value:
        yield problem(
            "operations", "the value read differs from the value written", "does another program write to it?"
        )
    else:
        yield ok("operations", "write, read and delete work")
    storage = context.storage
    found: Any = storage.call(Query(test_id, deadline=time.monotonic() + storage.deadline))
    if storage.ttl is not None and isinstance(found, Snapshot) and found.expires is None:
        yield problem("ttl", "a ttl is set, but the test conversation does not expire")


def _turn(context: SyncConversationContext, test_id: str) -> Iterator[Finding]:
    began = time.perf_counter()
    with context.turn(test_id) as turn:
        turn.set_variable("turn", True)
    yield ok("turn", f"begun and ended in {_milliseconds(time.perf_counter() - began)}")


def _timed(name: str, operation: Callable[[int], object]) -> Finding:
    seconds = []
    for number in range(_REPEATED):
        began = time.perf_counter()
        operation(number)
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds)[_REPEATED // 2]
    text = f"median {_milliseconds(median)} of {_REPEATED}, max {_milliseconds(max(seconds))}"
    if median > _SLOW:
        return warning(name, text, "this is slow: a message takes several of these operations")
    return ok(name, text)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def _advice_on(error: StateError) -> str:
    return advice_on_connecting(error) if isinstance(error, StateUnavailableError) else ""


# --- what is stored -------------------------------------------------------------------------------------------------


def _look_for_damage(storage: StateStorage) -> Iterator[Finding]:
    """Read conversations without their messages, for some seconds."""
    end = time.monotonic() + _READ_FOR
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
        yield problem("conversations", f"cannot be listed: {error}")
        return
    for texts, advice in ((damaged, "`agentstate verify --repair` saves what is intact"), (refused, "")):
        for text in texts[:5]:
            yield problem("conversations", text, advice)
        if len(texts) > 5:
            yield problem("conversations", f"and {len(texts) - 5:,} more of these", advice)
    if not damaged and not refused:
        yield ok("conversations", f"{seen:,} read{'' if complete else f' in {_READ_FOR:g} s (of more)'}, none damaged")


COMMANDS = (doctor,)
