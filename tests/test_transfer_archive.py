"""Archives: what is written, and what is read from good and bad ones."""

from __future__ import annotations

import errno
import gzip
import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import KINDS, Stores, fill, many, restore, store, whole
from test_transfer import NOON, Failing, comparable, states

from agentstate.codec import encode
from agentstate.context import SyncConversationContext
from agentstate.errors import StateConflictError, StateCorruptedError, StateSerializationError
from agentstate.operations import Append, Commit, Query, Snapshot
from agentstate.state import ConversationState
from agentstate.storage.base import StateStorage
from agentstate.storage.memory import InMemoryStorage
from agentstate.transfer import Report, count_contexts, export_contexts, import_contexts, migrate

__all__ = ["store"]


def exported(storage: StateStorage, **options: Any) -> bytes:
    file = io.BytesIO()
    report = export_contexts(storage, file, **options)
    assert report.complete, report.problems
    return file.getvalue()


def imported(archive: bytes, target: StateStorage | None = None, **options: Any) -> tuple[Report, StateStorage]:
    storage = InMemoryStorage() if target is None else target
    return import_contexts(io.BytesIO(archive), storage, **options), storage


def lines_of(archive: bytes) -> list[Any]:
    return [json.loads(line) for line in archive.splitlines()]


def joined(*lines: Any) -> bytes:
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


HEADER = {"agentstate_archive": 1, "created_at": "2026-01-31T12:00:00+00:00"}
ALICE = {
    "context_id": "alice",
    "user_id": None,
    "created_at": "2026-01-31T12:00:00.000001+00:00",
    "updated_at": "2026-01-31T12:00:00.000002+00:00",
    "metadata": {"m": 1},
    "variables": {"v": [1, 2.5, None]},
    "history": [{"role": "user", "content": "hi", "timestamp": "t", "metadata": {}}],
    "history_start": 3,
    "revision": 7,
}


def end(contexts: int, messages: int = 0) -> dict[str, Any]:
    return {"end": {"contexts": contexts, "messages": messages}}


# --- there and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_archive_holds_everything(store: Stores, kind: str) -> None:
    source, target = store(kind), store(kind)
    names = fill(source)
    archive = exported(source)
    report, _ = imported(archive, target)
    assert report.complete, (report.problems, report.damage)
    assert report.copied == len(names)
    for name in names:
        assert comparable(whole(target, name)) == comparable(whole(source, name))
    assert imported(archive, target)[0].unchanged == len(names)


def test_a_line_is_the_document_of_the_conversation() -> None:
    source = InMemoryStorage()
    context = SyncConversationContext(source)
    context.get_or_create("alice", "u")
    context.add_to_history("alice", "user", "é 漢 😀 \u2028", {"a": 1})
    context.set_variable("alice", "v", {"x": [1]})
    state = context.get_state("alice")
    assert state is not None
    header, line, last = lines_of(exported(source))
    assert header["agentstate_archive"] == 1
    assert list(line) == list(state.to_dict())
    assert ConversationState.from_dict(line) == state
    assert last == end(1, 1)


def test_a_long_history_continues_in_further_lines() -> None:
    source = InMemoryStorage()
    fill(source, contexts=0, long=1200)
    lines = [
        line for line in lines_of(exported(source)) if "one commit" in (line.get("context_id"), line.get("continues"))
    ]
    assert [(len(line["history"]), line.get("more"), line.get("messages")) for line in lines] == [
        (500, True, 1200),
        (500, True, None),
        (200, None, None),
    ]


def test_an_expiry_is_archived(store: Stores) -> None:
    source = store("memory")
    expires = NOON + 10**15
    restore(source, "a", Snapshot(None, NOON, NOON, 1, 0, 0, {}, {}, 0, (), expires))
    archive = exported(source)
    assert "expires_at" in lines_of(archive)[1]
    found = whole(imported(archive)[1], "a")
    assert found is not None
    assert found.expires == expires


def test_some_contexts_can_be_exported_alone() -> None:
    source = InMemoryStorage()
    fill(source)
    assert [line["context_id"] for line in lines_of(exported(source, context_ids=["owned", "empty"]))[1:-1]] == [
        "owned",
        "empty",
    ]
    assert [line["context_id"] for line in lines_of(exported(source, user_id="alice"))[1:-1]] == ["owned"]
    report = export_contexts(source, io.BytesIO(), context_ids=["owned", "nobody"])
    assert (report.copied, report.gone) == (1, 1)


def test_lone_surrogates_that_agentup_stored_survive() -> None:
    source = InMemoryStorage()
    messages = [b'{"role":"user","content":"\\ud83d","timestamp":"t","metadata":{}}']
    restore(source, "a", Snapshot(None, NOON, NOON, 1, 0, 1, {"v": b'"\\udc00"'}, {}, 0, messages))
    report, target = imported(exported(source))
    assert report.complete, report.problems
    assert comparable(whole(target, "a")) == comparable(whole(source, "a"))


def test_large_numbers_survive() -> None:
    source = InMemoryStorage()
    context = SyncConversationContext(source)
    context.set_variables("a", {"digits": 10**4299, "negative": -(2**63), "float": 1e308, "tiny": 5e-324, "whole": 1.0})
    _, target = imported(exported(source))
    assert SyncConversationContext(target).get_variables("a") == context.get_variables("a")
    assert isinstance(SyncConversationContext(target).get_variable("a", "whole"), float)


@settings(max_examples=60, deadline=None)
@given(states)
def test_every_state_survives_an_archive(given_states: list[Any]) -> None:
    source = InMemoryStorage()
    for number, (variables, metadata, contents, start, revision) in enumerate(given_states):
        messages = [
            encode({"role": "user", "content": content, "timestamp": "", "metadata": {}}, "m") for content in contents
        ]
        texts = [{key: encode(value, "v") for key, value in values.items()} for values in (variables, metadata)]
        snapshot = Snapshot(None, NOON, NOON, revision, start, start + len(messages), *texts, start, messages)
        restore(source, f"c{number}", snapshot)
    report, target = imported(exported(source))
    assert report.complete, report.problems
    assert migrate(source, target).unchanged == len(given_states)


# --- archives made and edited by hand -------------------------------------------------------------------------------


def test_lines_without_header_and_end_can_be_imported() -> None:
    report, target = imported(joined(ALICE, {**ALICE, "context_id": "bob"}))
    assert (report.copied, report.damage) == (2, None)
    found = whole(target, "bob")
    assert found is not None
    assert (found.created % 1000, found.updated % 1000, found.start, found.revision) == (1, 2, 3, 7)


def test_archives_can_be_concatenated() -> None:
    first, second = InMemoryStorage(), InMemoryStorage()
    many(first, 5)
    SyncConversationContext(second).set_variable("x", "y", 1)
    report, _ = imported(exported(first) + exported(second))
    assert (report.copied, report.damage) == (6, None)


def test_only_the_id_is_required() -> None:
    report, target = imported(
        joined({"context_id": "a"}, {"context_id": "b", "history": [{"role": "user", "content": 1}]})
    )
    assert report.copied == 2
    context = SyncConversationContext(target)
    message = context.get_history("b")[0]
    assert (message["role"], message["content"], message["metadata"]) == ("user", 1, {})
    assert message["timestamp"]
    state = context.get_state("a")
    assert state is not None
    assert abs(state.created_at.timestamp() - time.time()) < 60


def test_blank_lines_do_not_matter() -> None:
    assert imported(joined(HEADER, b"\n", ALICE, b"  \n", end(1)))[0].complete


def test_a_line_may_have_a_history_of_any_length() -> None:
    history = [{"role": "user", "content": number, "timestamp": "t", "metadata": {}} for number in range(1234)]
    for revision in (1, 2, 5000):
        report, target = imported(joined({**ALICE, "history": history, "revision": revision}))
        assert report.complete, report.problems
        assert SyncConversationContext(target).get_history("alice") == history
        found = whole(target, "alice")
        assert found is not None
        assert (found.revision, found.start, found.end) == (revision, 3, 1237)


def test_a_compressed_archive_is_read_as_a_file_of_its_own() -> None:
    source = InMemoryStorage()
    many(source, 5)
    packed = io.BytesIO(gzip.compress(exported(source)))
    with gzip.GzipFile(fileobj=packed) as file:
        assert import_contexts(file, InMemoryStorage()).copied == 5  # type: ignore[arg-type]


# --- damage ---------------------------------------------------------------------------------------------------------


def test_an_archive_without_its_end_is_reported_and_imported_as_far_as_it_goes() -> None:
    report, target = imported(joined(HEADER, ALICE))
    assert report.copied == 1
    assert isinstance(report.damage, StateCorruptedError)
    assert not report.complete
    assert whole(target, "alice") is not None


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_an_archive_that_is_cut_off_anywhere_is_reported(share: float) -> None:
    source = InMemoryStorage()
    fill(source, long=1200)
    archive = exported(source)
    report, target = imported(archive[: int(len(archive) * share)])
    assert not report.complete
    assert report.copied < 24 or report.damage
    for name in list(SyncConversationContext(target).list_contexts()):
        assert comparable(whole(target, name)) == comparable(whole(source, name))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_byte_that_changes_goes_unnoticed_or_leads_to_an_exception(data: st.DataObject) -> None:
    archive = bytearray(joined(HEADER, ALICE, {**ALICE, "context_id": "bob"}, end(2, 2)))
    for _ in range(data.draw(st.integers(1, 3))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    report, _ = imported(bytes(archive))  # it may have become another good archive; it must not raise
    assert report.contexts <= 4


@pytest.mark.parametrize("count", [1, 3])
def test_a_last_line_with_another_count_is_damage(count: int) -> None:
    report, _ = imported(joined(HEADER, ALICE, {**ALICE, "context_id": "bob"}, end(count)))
    assert report.copied == 2
    assert report.damage is not None
    assert "line 4" in str(report.damage)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nonsense\n", "not valid JSON"),
        (b"[1]\n", "a JSON object"),
        (b'{"context_id":"x","variables":{"a":NaN}}\n', "NaN"),
        (b'{"context_id":"x","variables":{"a":1,"a":2}}\n', "twice"),
        (b'{"context_id":"x","variables":{"a":' + b"[" * 100_000 + b"}}\n", "nested too deeply"),
        (b'{"context_id":"x","variables":{"a":' + b"[" * 500 + b"]" * 500 + b"}}\n", "levels deep"),
        (b'{"context_id":"x","variables":{"a":' + b"9" * 5000 + b"}}\n", "too many digits"),
        (b'{"context_id":"x","variables":{"a":1e999}}\n', "inf"),
        (b'{"context_id":"x","variables":[1]}\n', "`variables` must be an object"),
        (b'{"context_id":"x","history":{}}\n', "list of objects"),
        (b'{"context_id":"x","history":["hi"]}\n', "list of objects"),
        (b'{"context_id":"x","history":[{"content":"hi"}]}\n', "role"),
        (b'{"context_id":"x","history_start":-1}\n', "history_start"),
        (b'{"context_id":"x","revision":"7"}\n', "revision"),
        (b'{"context_id":"x","created_at":"yesterday"}\n', "ISO 8601"),
        (b'{"context_id":"x","updated_at":5}\n', "ISO 8601"),
        (b'{"context_id":"x","user_id":""}\n', "user id"),
        (b'{"context_id":"x","user_id":7}\n', "user id"),
        (b'{"context_id":""}\n', "empty"),
        (b'{"context_id":7}\n', "text"),
        (b'{"context_id":"x","messages":5}\n', "messages"),
        (b'{"context_id":"x","mood":"good"}\n', "unknown field 'mood'"),
        (b'{"mood":"good"}\n', "got ['mood']"),
        (b"{}\n", "got []"),
        (b'{"continues":"nobody","history":[]}\n', "not the context before it"),
        (b'{"agentstate_archive":2}\n', "upgrade"),
        ("{\"context_id\":\"é\"}\n".encode("latin-1"), "not valid UTF-8"),
    ],
)  # fmt: skip
def test_a_bad_line_is_reported_with_its_number_and_the_others_are_imported(line: bytes, reason: str) -> None:
    report, target = imported(joined(ALICE, line, {**ALICE, "context_id": "bob"}))
    assert (report.copied, report.failed) == (2, 1)
    assert reason in str(report.problems[0].error)
    assert "line 2" in str(report.problems[0].error)
    assert count_contexts(target) == 2


LONG = {**ALICE, "context_id": "long", "history_start": 0, "messages": 3, "more": True, "history": ALICE["history"]}
NEXT = {"continues": "long", "history": ALICE["history"], "more": True}
LAST = {"continues": "long", "history": ALICE["history"]}


@pytest.mark.parametrize(
    "lines",
    [
        [LONG, NEXT],
        [LONG, LAST],
        [LONG, NEXT, NEXT, LAST],
        [LONG, {**LAST, "continues": "alice"}],
        [LONG, NEXT, b"nonsense\n"],
        [LONG, NEXT, {**LAST, "history": ["hi"]}],
        [LONG, NEXT, {**LAST, "history": [{"role": 5}]}],
        [{**LONG, "revision": "x"}, NEXT, LAST],
        [{**LONG, "messages": 0}, NEXT, LAST],
    ],
)
def test_a_long_context_that_is_not_whole_is_not_imported_and_the_next_one_is(lines: list[Any]) -> None:
    report, target = imported(joined(*lines, ALICE))
    assert report.copied == 1
    assert report.failed >= 1
    assert list(SyncConversationContext(target).list_contexts()) == ["alice"]


def test_a_long_context_is_whole_with_all_its_lines() -> None:
    report, target = imported(joined(LONG, NEXT, LAST, ALICE))
    assert report.copied == 2
    assert SyncConversationContext(target).count_history("long") == 3


def test_an_abandoned_context_is_revoked() -> None:
    report, target = imported(joined(HEADER, LONG, NEXT, {"abandoned": "long"}, ALICE, LONG, NEXT, LAST, end(2)))
    assert (report.copied, report.failed, report.damage) == (2, 0, None)
    assert SyncConversationContext(target).count_history("long") == 3
    report, target = imported(joined(HEADER, LONG, NEXT, {"abandoned": "long"}, end(0)))
    assert (report.contexts, report.damage, count_contexts(target)) == (0, None, 0)


def test_a_context_that_changes_while_it_is_exported_is_abandoned_and_written_again() -> None:
    changes = 0

    def change(operation: Any) -> None:
        nonlocal changes
        if isinstance(operation, Query) and operation.history and operation.history.first == 1000 and changes < 2:
            changes += 1
            message = encode({"role": "user", "content": "more", "timestamp": "", "metadata": {}}, "message")
            source.directly(Commit("a", (Append((message,)),), f"change {changes}"))

    source = Failing()
    SyncConversationContext(source).extend_history("a", [{"role": "user", "content": n} for n in range(3000)])
    source.before = change
    archive = exported(source)
    assert archive.count(b'{"abandoned":"a"}') == 2
    report, target = imported(archive)
    assert report.complete
    assert whole(target, "a") == whole(source, "a")


def test_a_damaged_compressed_archive_is_reported() -> None:
    source = InMemoryStorage()
    many(source, 2000)
    packed = gzip.compress(exported(source))
    for bad in (packed[:-200], packed[: len(packed) // 2], packed[:5000] + b"x" + packed[5001:]):
        with gzip.GzipFile(fileobj=io.BytesIO(bad)) as file:
            report = import_contexts(file, InMemoryStorage())  # type: ignore[arg-type]
        assert not report.complete


# --- what is there already ------------------------------------------------------------------------------------------


def changed(history: int) -> list[Any]:
    """An archive of a context that differs in a message from the one that `ALICE` and `LONG` give."""
    other = [{"role": "user", "content": "other", "timestamp": "t", "metadata": {}}]
    return [{**ALICE, "history": other}] if history == 1 else [LONG, NEXT, {**LAST, "history": other}]


@pytest.mark.parametrize("lines", [[ALICE], [LONG, NEXT, LAST]])
def test_an_existing_different_context_is_kept_or_replaced(lines: list[Any]) -> None:
    _, target = imported(joined(*lines))
    name = lines[0]["context_id"]
    before = whole(target, name)
    different = joined(*changed(len(lines)))
    report, _ = imported(different, target)
    assert (report.conflict, report.copied) == (1, 0)
    assert isinstance(report.problems[0].error, StateConflictError)
    assert whole(target, name) == before
    assert imported(different, target, replace=True, dry_run=True)[0].copied == 1
    assert whole(target, name) == before
    assert imported(different, target, replace=True)[0].copied == 1
    assert SyncConversationContext(target).get_history(name)[-1]["content"] == "other"


def test_a_value_that_is_too_large_for_the_storage_is_refused() -> None:
    archive = joined({"context_id": "a", "variables": {"v": "x" * 5000}}, ALICE)
    report, _ = imported(archive, InMemoryStorage(max_value_bytes=1000))
    assert (report.copied, report.failed) == (1, 1)
    assert isinstance(report.problems[0].error, StateSerializationError)


def test_a_disk_that_is_full_ends_the_export() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 10_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    source = InMemoryStorage()
    many(source, 1000)
    with pytest.raises(OSError, match="No space"):
        export_contexts(source, Full())


def test_an_abandoned_context_whose_first_line_is_bad_is_revoked_too() -> None:
    bad = {**LONG, "revision": "x"}
    report, target = imported(joined(HEADER, bad, NEXT, {"abandoned": "long"}, ALICE, end(1)))
    assert (report.copied, report.failed, report.damage) == (1, 1, None)
    assert list(SyncConversationContext(target).list_contexts()) == ["alice"]


def test_an_archive_that_is_cut_off_within_others_is_reported() -> None:
    report, _ = imported(joined(HEADER, ALICE, HEADER, {**ALICE, "context_id": "bob"}, end(1)))
    assert report.copied == 2
    assert "before line 3 is cut off" in str(report.damage)


def test_an_error_of_the_disk_is_not_taken_for_a_damaged_archive() -> None:
    class Failing(io.BytesIO):
        def readline(self, size: int | None = -1, /) -> bytes:
            line = super().readline(size)
            if not line:
                raise OSError(errno.EIO, "the disk gave up")
            return line

    target = InMemoryStorage()
    with pytest.raises(OSError, match="gave up"):
        import_contexts(Failing(joined(HEADER, ALICE)), target)


# --- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"revision": 10**300}, "revision"),
        ({"history_start": 10**17}, "position"),
        ({"messages": 10**100, "more": True}, "position"),
        ({"updated_at": "9999-12-31T23:59:59.999999+00:00"}, "after 2199"),
        ({"created_at": "0001-01-01T00:00:00+00:00"}, "before 1970"),
        ({"expires_at": "9999-12-31T23:59:59+00:00"}, "after 2199"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_numbers_and_times_that_no_storage_could_count_up_from_are_refused(
    fields: dict[str, Any], words: str, dry_run: bool
) -> None:
    report, target = imported(joined(ALICE | fields), dry_run=dry_run)
    assert (report.failed, report.copied) == (1, 0)
    error = report.problems[0].error
    assert isinstance(error, StateSerializationError)
    assert words in str(error)
    assert len(str(error)) < 200
    assert count_contexts(target) == 0


def test_numbers_that_are_too_large_are_refused_by_a_migration_too() -> None:
    source, target = InMemoryStorage(), InMemoryStorage()
    snapshot = Snapshot(None, 1, 1, 10**16, 0, 0, {}, {}, 0, ())
    restore(source, "alice", snapshot)
    report = migrate(source, target)
    assert report.failed == 1
    assert count_contexts(target) == 0


def test_a_history_that_claims_to_be_endless_costs_no_memory() -> None:
    archive = joined(ALICE | {"messages": 10**14, "more": True, "revision": 10**15})
    report, target = imported(archive)
    assert (report.failed, report.copied) == (1, 0)
    assert "cut off" in str(report.problems[0].error)
    assert count_contexts(target) == 0


BOMBS = {
    "lists": (b'{"context_id":"bomb","variables":{"x":[', b"[],", 2**24, b"[]]}}"),
    "objects": (b'{"context_id":"bomb","history":[', b"{},", 2**24, b"{}]}"),
    "text": (b'{"context_id":"bomb","variables":{"x":"', b"a", 2**27, b'"}}'),
}


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_archive_cannot_take_much_memory(tmp_path: Path, kind: str) -> None:
    begin, repeated, times, end = BOMBS[kind]
    bomb = begin + repeated * times + end
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(joined(HEADER) + bomb + b"\n" + joined(ALICE), 1))
    program = (
        "import gzip, resource, sys\n"
        "from agentstate import InMemoryStorage\n"
        "from agentstate.transfer import import_contexts\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "report = import_contexts(gzip.open(sys.argv[1]), InMemoryStorage(), dry_run=True)\n"
        "print(report.copied, report.failed, [str(each.error) for each in report.problems])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "bomb.gz"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 1 ['line 2 of the archive: it")
    assert "67,108,864 bytes" in done.stdout or "536,870,912 bytes of memory" in done.stdout


def test_every_line_of_an_export_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.transfer.archive._LINE_BYTES", 1000)
    source = InMemoryStorage()
    context = SyncConversationContext(source)
    context.extend_history("long", [{"role": "user", "content": "x" * 300}] * 20)
    context.extend_history("huge", [{"role": "user", "content": "x" * 3000}] * 3)
    context.get_or_create("empty")
    archive = exported(source)
    assert max(map(len, archive.splitlines())) < 4000
    report, target = imported(archive)
    assert report.complete
    for name in ("long", "huge", "empty"):
        assert comparable(whole(target, name)) == comparable(whole(source, name))


def test_a_context_that_does_not_fit_into_a_line_is_reported_by_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.transfer.archive.LARGEST_LINE", 10_000)
    source = InMemoryStorage()
    context = SyncConversationContext(source)
    context.set_variable("large", "x", "y" * 20_000)
    context.extend_history("late", [{"role": "user", "content": "x" * n} for n in (10, 20_000)])
    context.set_variable("small", "x", 1)
    monkeypatch.setattr("agentstate.transfer.archive._LINE_BYTES", 100)
    file = io.BytesIO()
    report = export_contexts(source, file)
    assert (report.copied, report.failed) == (1, 2)
    assert all("copy it with migrate" in str(each.error) for each in report.problems)
    report, target = imported(file.getvalue())
    assert report.complete
    assert count_contexts(target) == 1


def test_errors_do_not_repeat_what_an_archive_holds_at_length() -> None:
    long = "x" * 100_000
    archive = joined({long: 1}, {"continues": long}, ALICE | {long: 1}, {"end": {"contexts": long}})
    report, _ = imported(archive)
    texts = [str(each.error) + each.context_id for each in report.problems] + [str(report.damage)]
    assert len(texts) == 4
    assert max(map(len, texts)) < 1500
