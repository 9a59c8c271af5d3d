"""Commands that copy conversations: export, import, migrate."""

from __future__ import annotations

import gzip
import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

import click

from ..config import StateConfig, load_config
from ..errors import ContextNotFoundError, StateConfigError, StateConflictError, StateError
from ..keys import check_context_id
from ..operations import Listing
from ..registry import overridden, storage_names
from ..storage.base import StateStorage
from ..transfer import Report, Result, count_contexts, export_contexts, import_contexts, migrate
from ..urls import redact_url
from . import console, exits
from .completion import paths
from .interrupts import disturbed, undisturbed
from .lookup import not_found
from .store import (
    Place,
    complete_context_id,
    is_url_like,
    layout_choice,
    settings_option,
    store_options,
    user_option,
)

_GZIP_MAGIC: Final = b"\x1f\x8b"

_json_option = click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
_replace_option = click.option("--replace", is_flag=True, help="Replace conversations that exist and differ.")
_dry_run_option = click.option("--dry-run", is_flag=True, help="Read and compare only.")


# --- export ---------------------------------------------------------------------------------------------------------


@click.command("export")
@click.argument("file", default="-", type=click.Path(dir_okay=False, allow_dash=True))
@store_options
@click.option(
    "--id",
    "ids",
    metavar="ID",
    multiple=True,
    shell_complete=complete_context_id,
    help="Only this conversation. Can be repeated.",
)
@user_option
@click.option("-z", "--compress", is_flag=True, help="Compress with gzip, as for a FILE that ends in .gz.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@_json_option
def export(
    place: Place, file: str, ids: tuple[str, ...], user_id: str | None, compress: bool, force: bool, as_json: bool
) -> int:
    """Write conversations to an archive or to standard output.

    The archive is JSON Lines, one conversation per line; a long history continues in further lines. FILE appears when
    it is complete, or not at all.

    \b
    Examples:
      agentstate export backup.jsonl.gz
      agentstate export --user alice alice.jsonl
      agentstate export | jq -r 'select(.context_id).context_id'
    """
    if ids and user_id is not None:
        raise click.UsageError("--id and --user exclude each other: use only one of them")
    if as_json and file == "-":
        raise click.UsageError("--json needs a FILE, since standard output is the archive")
    if file == "-" and compress and console.on_terminal():
        raise click.UsageError("compressed output is not written to a terminal: use a FILE or a pipe")
    names = [check_context_id(context_id) for context_id in dict.fromkeys(ids)] or None
    gone: list[str] = []

    def settle(result: Result) -> None:
        advance()
        if names and result.fate == "gone":
            gone.append(result.context_id)

    began = time.monotonic()
    with place.open() as storage, _new_file(file, compress or file.endswith(".gz"), force) as archive:
        with_bar = file != "-" or not console.on_terminal()  # where the output does not go to the same terminal
        total = len(names) if names else _total(storage, user_id) if with_bar else None
        with console.progress("exporting", total, shown=with_bar) as advance:
            report = export_contexts(storage, archive, context_ids=names, user_id=user_id, progress=settle)
        if gone:
            raise not_found(storage, place, gone[0])
    return _finish(report, "exported", began, as_json, quiet=file == "-")


@contextmanager
def _new_file(path: str, compress: bool, force: bool) -> Iterator[BinaryIO]:
    """A file to write, which gets its name once it is complete and on disk; ``-`` is the standard output."""
    if path == "-":
        out: Any = _HarmlessLines() if console.on_terminal() else sys.stdout.buffer
        with _compressed(out, compress) as file:
            yield file
        return
    if os.path.lexists(path) and not force:
        raise StateConflictError(f"{path} exists already: choose another name, or use --force")
    if os.path.exists(path) and not os.path.isfile(path):
        raise StateConflictError(f"{path} is not a regular file and is not replaced (- is standard output)")
    unfinished = f"{path}.{os.getpid()}.part"
    with undisturbed():
        try:
            with (
                open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as raw,
                _compressed(raw, compress) as file,
            ):
                with disturbed():
                    yield file
                if file is not raw:
                    file.close()
                raw.flush()
                os.fsync(raw.fileno())
            if force:
                os.replace(unfinished, path)
            else:
                _rename_to_new(unfinished, path)
        except OSError as error:
            if not isinstance(error, StateError) and error.filename in (None, unfinished):
                error.filename = path  # the error of a full disk has none
            raise
        finally:
            Path(unfinished).unlink(missing_ok=True)


def _rename_to_new(unfinished: str, path: str) -> None:
    """Rename a file, unless the new name exists by now."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise StateConflictError(f"{path} exists by now: choose another name, or use --force") from None
    except OSError:  # a file system without hard links
        os.rename(unfinished, path)


class _HarmlessLines:
    """A terminal as a binary file for JSON Lines."""

    def write(self, line: bytes) -> None:
        sys.stdout.write(console.harmless_json(line.decode()))


@contextmanager
def _compressed(file: BinaryIO, compress: bool) -> Iterator[BinaryIO]:
    if not compress:
        yield file
        return
    with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
        yield packed  # type: ignore[misc]  # all of BinaryIO that is used here


# --- import ---------------------------------------------------------------------------------------------------------


@click.command("import")
@click.argument("file", default="-", type=click.Path(dir_okay=False, allow_dash=True))
@store_options
@_replace_option
@_dry_run_option
@_json_option
def import_(place: Place, file: str, replace: bool, dry_run: bool, as_json: bool) -> int:
    """Read conversations from an archive, compressed or not, or from standard input.

    Owners, times, revisions and expiry are kept. A conversation that exists and is equal is skipped, so an interrupted
    import can be started again; one that exists and differs is not changed, and reported.

    \b
    Examples:
      agentstate import backup.jsonl.gz
      ssh old-host agentstate export -z | agentstate import --dry-run
    """
    began = time.monotonic()
    with (
        _existing_file(file) as archive,
        place.open(may_be_new=True) as storage,
        console.progress("importing") as advance,
    ):
        report = import_contexts(archive, storage, replace=replace, dry_run=dry_run, progress=lambda result: advance())
    return _finish(report, "would be imported" if dry_run else "imported and verified", began, as_json)


@contextmanager
def _existing_file(path: str) -> Iterator[BinaryIO]:
    if path == "-":
        yield _unpacked(sys.stdin.buffer)
        return
    try:
        with open(path, "rb") as file:
            yield _unpacked(file)
    except FileNotFoundError as error:
        if error.filename != path:
            raise
        raise ContextNotFoundError(f"there is no file {path}") from error


def _unpacked(file: Any) -> BinaryIO:
    reader = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)
    if reader.peek(2)[:2] == _GZIP_MAGIC:
        return gzip.GzipFile(fileobj=reader, mode="rb")  # type: ignore[return-value]
    return reader


# --- migrate --------------------------------------------------------------------------------------------------------


@click.command("migrate")
@click.argument("source", metavar="FROM", shell_complete=paths("file"))
@click.argument("target", metavar="TO", shell_complete=paths("file"))
@click.option("--from-key-prefix", metavar="TEXT", help="The prefix of keys in FROM, for Valkey.")
@click.option("--to-key-prefix", metavar="TEXT", help="The prefix of keys in TO, for Valkey.")
@click.option("--from-layout", type=layout_choice, help="The format that FROM stores conversations in.")
@click.option("--to-layout", type=layout_choice, help="The format that TO stores conversations in.")
@settings_option("--from-option", help="Any other option of FROM. Can be repeated.")
@settings_option("--to-option", help="Any other option of TO, for example ttl=3600. Can be repeated.")
@user_option
@_replace_option
@_dry_run_option
@_json_option
def migrate_(
    source: str,
    target: str,
    from_key_prefix: str | None,
    to_key_prefix: str | None,
    from_layout: str | None,
    to_layout: str | None,
    from_option: tuple[tuple[str, Any], ...],
    to_option: tuple[tuple[str, Any], ...],
    user_id: str | None,
    replace: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Copy all conversations from one storage to another, and verify each copy.

    FROM and TO are each a folder, the URL of a Valkey server, a configuration file (whose name ends in .yaml or .yml),
    or the name of a third party's storage. FROM is not changed; it may hold files or keys of AgentUp. Owners, times,
    revisions, positions and expiry are kept. Every copy is read back and compared. An interrupted migration can be
    started again: conversations that exist and are equal are skipped.

    \b
    Examples:
      agentstate migrate ./conversation_states valkey://localhost:6379
      agentstate migrate --dry-run agent_config.yaml new_config.yaml
      agentstate migrate redis://old-host valkeys://new-host --to-key-prefix agents: --to-option ttl=7200
      agentstate migrate ./conversation_states ./documents --to-layout document
    """
    origin = _place_of(source, from_key_prefix, from_layout, from_option)
    goal = _place_of(target, to_key_prefix, to_layout, to_option)
    _check_different(origin, goal)
    if origin.backend == "file" and not os.path.isdir(origin.name):
        if os.path.exists(origin.name):
            raise StateConfigError(f"{origin.name} is not a folder: use `agentstate import` to read an archive")
        raise ContextNotFoundError(f"the folder {origin.name} does not exist")
    began = time.monotonic()
    with origin.open() as storage, goal.open(may_be_new=True) as new:
        for each in (storage, new):
            each.call(Listing(size=1, deadline=time.monotonic() + each.deadline))  # before the first group is read
        with console.progress("migrating", _total(storage, user_id)) as advance:
            report = migrate(
                storage, new, user_id=user_id, replace=replace, dry_run=dry_run, progress=lambda result: advance()
            )
    return _finish(report, "would be copied" if dry_run else "copied and verified", began, as_json)


def _place_of(text: str, key_prefix: str | None, layout: str | None, settings: tuple[tuple[str, Any], ...]) -> Place:
    """The storage that FROM or TO names."""
    named = {"key_prefix": key_prefix, "layout": layout}
    options = {name: value for name, value in named.items() if value is not None} | dict(settings)
    if "://" in text:
        backend, options = "valkey", {"url": text} | options
    elif is_url_like(text):
        raise click.UsageError(f"a URL begins like valkey://, got {redact_url(text)!r}")
    elif text.endswith((".yaml", ".yml")) and not os.path.isdir(text):
        return Place(*overridden(load_config(text), None, options))
    elif not os.path.exists(text) and text in storage_names():
        backend = text
    else:
        backend, options = "file", {"storage_dir": text} | options
    return Place(*overridden(StateConfig(), backend, options))


def _check_different(origin: Place, goal: Place) -> None:
    if origin.backend != goal.backend:
        return
    if origin.backend == "file":
        same = os.path.realpath(origin.name) == os.path.realpath(goal.name)
    else:
        same = origin.options | {"layout": None, "ttl": None} == goal.options | {"layout": None, "ttl": None}
    if same:
        raise StateConfigError(f"FROM and TO are the same storage, {origin.name}")


# --- summaries ------------------------------------------------------------------------------------------------------


def _total(storage: StateStorage, user_id: str | None) -> int | None:
    """The number of conversations, if there is a progress bar to show it."""
    return count_contexts(storage, user_id) if sys.stderr.isatty() else None


def _finish(report: Report, done: str, began: float, as_json: bool, *, quiet: bool = False) -> int:
    """Print the summary, and return the exit code."""
    seconds = time.monotonic() - began
    for problem in report.problems:
        console.fail(str(problem.error))
    unnamed = report.conflict + report.failed - len(report.problems)
    if unnamed:
        console.fail(f"and {unnamed:,} more of these")
    if report.damage is not None:
        console.fail(str(report.damage))
    if as_json:
        console.json_document(_as_json(report, seconds))
    elif not quiet:
        pairs = [
            (done, f"{report.copied:,}"),
            ("skipped (equal)", f"{report.unchanged:,}"),
            ("not changed (different)", f"{report.conflict:,}"),
            ("failed", f"{report.failed:,}"),
            ("cleared meanwhile", f"{report.gone:,}"),
            ("messages", f"{report.messages:,}"),
            ("size", console.size_text(report.size)),
            ("time", f"{seconds:.1f} s, {report.contexts / max(seconds, 1e-9):,.0f} conversations per second"),
        ]
        shown = [pair for pair in pairs if pair[1] != "0" or pair[0] == done]
        console.facts(shown)
    return _code_of(report)


def _as_json(report: Report, seconds: float) -> dict[str, Any]:
    return {
        "copied": report.copied,
        "unchanged": report.unchanged,
        "conflict": report.conflict,
        "failed": report.failed,
        "gone": report.gone,
        "messages": report.messages,
        "bytes": report.size,
        "seconds": round(seconds, 3),
        "damage": None if report.damage is None else str(report.damage),
        "problems": [{"context_id": each.context_id, "error": str(each.error)} for each in report.problems],
    }


def _code_of(report: Report) -> int:
    if report.complete:
        return exits.OK
    if report.damage is not None:
        return exits.CORRUPTED
    if not report.failed:
        return exits.REFUSED
    failed = [each.error for each in report.problems if each.fate == "failed"]
    return exits.code_of_all(error for error in failed if isinstance(error, StateError)) or exits.PROBLEM


COMMANDS = (export, import_, migrate_)
