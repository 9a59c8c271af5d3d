"""The format of logs at rest: what a line is, how little is read, and that no changed bit goes unnoticed."""

from __future__ import annotations

import json
import logging
from os.path import commonprefix
from pathlib import Path

import pytest
from filetools import Between, append, clear, commit, lines, logs, look, message, put, texts, together
from hypothesis import given
from hypothesis import strategies as st

from agentstate import FileStorage
from agentstate.errors import StateConflictError, StateCorruptedError, StateSerializationError
from agentstate.keys import file_stem
from agentstate.operations import Append, Change, Commit, Increment, Pop, Put, Query, Restore, Space, Trim, Window
from agentstate.storage.file.logfile import _pieces
from agentstate.storage.file.logformat import fields, ids_of, ids_text, is_sealed, seal_body, seed_of
from agentstate.storage.file.logimage import LogImage
from agentstate.storage.resolve import Effects, only_adds, resolve


def some_conversation(folder: Path, *, messages: int = 3) -> Path:
    """A small log with all that a log may hold."""
    with_all = FileStorage(folder, fsync="no", ttl=1000)
    for number in range(messages):
        with_all.call(append("alice", f"Grüße {number} ☃", commit_id=f"id {number}"))
    with_all.call(commit("alice", Put(Space.VARIABLES, (("tea", b'"green"'), ('"quoted"', b'{"a":[1,2.50]}')))))
    with_all.call(commit("alice", Put(Space.METADATA, (("lang", b'"de"'),))))
    with_all.call(commit("alice", Increment("count", b"2")))
    with_all.call(append("alice", "one", "two", "three"))
    with_all.call(commit("alice", Pop(1)))
    with_all.close()
    return folder / "alice.jsonl"


def test_a_log_is_json_lines_that_any_tool_reads(tmp_path: Path) -> None:
    first, *rest = lines(some_conversation(tmp_path))
    assert first["agentstate"] == 1
    assert first["id"] == "alice"
    assert [line["rev"] for line in rest] == list(range(1, len(rest) + 1))
    assert rest[0]["add"][0]["content"] == "Grüße 0 ☃"
    assert rest[3]["set"] == {"tea": "green", '"quoted"': {"a": [1, 2.5]}}
    assert rest[4]["meta"] == {"lang": "de"}
    assert rest[5]["answer"] == 2
    assert rest[6]["count"] == 3
    assert rest[7]["keep"] == 5


def test_what_is_stored_comes_back_byte_for_byte(tmp_path: Path) -> None:
    odd = [
        b'"\\u2028\\ud800"', b"1e400", b"-0.0", b"[]", b"{}", b'""', b"null", b"1" + b"0" * 5000,
        b"[" * 150 + b"]" * 150, '"☃\u2028\u0085"'.encode(), b'{"a":"\\"]}","crc":"00000000"}',
    ]  # fmt: skip
    storage = FileStorage(tmp_path, fsync="no")
    storage.call(commit("alice", Append(tuple(odd))))
    for number, value in enumerate(odd):
        storage.call(commit("alice", Append((value,)), Put(Space.VARIABLES, ((f"k{number}", value),))))
    storage.call(commit("alice", Put(Space.METADATA, (("☃", b"1"), ("\ud800", b"2"), ('"', b"3")))))
    expected = look(storage, "alice")
    for cold in (FileStorage(tmp_path), storage):
        snapshot = look(cold, "alice")
        assert snapshot is not None
        assert snapshot == expected
        assert list(snapshot.messages) == odd + odd
        assert list(snapshot.variables.values()) == odd
        cold.close()


def test_a_value_with_a_line_break_is_refused(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", 1))
    before = (tmp_path / "alice.jsonl").read_bytes()
    with pytest.raises(StateSerializationError):
        storage.call(commit("alice", Append((b'{"a":\n1}',))))
    storage.call(append("alice", 2))
    assert (tmp_path / "alice.jsonl").read_bytes().startswith(before)
    assert texts(storage, "alice") == ["1", "2"]
    storage.close()


@pytest.mark.parametrize(
    ("context_id", "name"),
    [
        ("alice", "alice.jsonl"),
        ("a.b-c_1", "a.b-c_1.jsonl"),
        ("Alice", "alice~3bc51062973c458d5a6f2d8d64a02324.jsonl"),
        ("con", "con~1143da2bc54c495c4be31d3868785d39.jsonl"),
    ],
)
def test_the_name_of_a_file_tells_whose_it_is(tmp_path: Path, context_id: str, name: str) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append(context_id, 1))
    assert logs(tmp_path) == {name}
    assert lines(tmp_path / name)[0]["id"] == context_id
    storage.close()


def test_a_log_under_another_name_is_not_believed(tmp_path: Path) -> None:
    some_conversation(tmp_path).rename(tmp_path / "bob.jsonl")
    storage = FileStorage(tmp_path)
    with pytest.raises(StateCorruptedError):
        look(storage, "bob")
    with pytest.raises(StateCorruptedError):
        storage.call(append("bob", 1))
    assert look(storage, "alice") is None
    storage.close()


def test_lines_of_another_log_or_place_are_not_believed(tmp_path: Path) -> None:
    path = some_conversation(tmp_path)
    content = path.read_bytes()
    for changed in (
        content + content.splitlines(keepends=True)[-1],
        b"".join([*content.splitlines(keepends=True)[:2], *content.splitlines(keepends=True)[3:]]),
    ):
        path.write_bytes(changed)
        with pytest.raises(StateCorruptedError):
            look(FileStorage(tmp_path), "alice")


@pytest.mark.parametrize("context_id", ["alice", "User-1"])
@pytest.mark.parametrize("known_seal", [True, False], ids=["sealed as now", "sealed otherwise"])
def test_a_log_of_a_newer_version_is_refused_everywhere_and_never_repaired(
    tmp_path: Path, context_id: str, known_seal: bool
) -> None:
    path = tmp_path / (file_stem(context_id) + ".jsonl")
    body = b'{"agentstate":2,"id":"%b"' % context_id.encode()
    line = seal_body(body, seed_of(context_id), 0)[0] if known_seal else body + b',"checksum":"5f3759df"}\n'
    path.write_bytes(line + b'{"something":"new"}\n')
    content = path.read_bytes()
    storage = FileStorage(tmp_path)
    for refused in (
        lambda: storage.call(append(context_id, 1)),
        lambda: look(storage, context_id),
        lambda: storage.repair(context_id),
    ):
        with pytest.raises(StateConflictError, match=r"version 2.*update agentstate"):
            refused()
    assert together(storage, append(context_id, 1), append("bob", 1))[1] == b""
    assert [(problem.context_id, "version 2" in problem.reason) for problem in storage.verify()] == [(context_id, True)]
    assert path.read_bytes() == content
    storage.close()


def test_a_flipped_bit_in_the_version_is_damage(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", 1))
    storage.close()
    path = tmp_path / "alice.jsonl"
    path.write_bytes(path.read_bytes().replace(b'{"agentstate":1', b'{"agentstate":3', 1))
    with pytest.raises(StateCorruptedError):
        look(FileStorage(tmp_path), "alice")


def test_every_flipped_bit_of_a_file_is_noticed_and_nothing_is_written_over_it(tmp_path: Path) -> None:
    path = some_conversation(tmp_path, messages=1)
    content = path.read_bytes()
    unnoticed = []
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        storage = FileStorage(tmp_path, fsync="no")
        try:
            look(storage, "alice")
            unnoticed.append(bit)
        except StateCorruptedError:
            pass
        if bit % 128 == 3 or flipped[bit // 8] in b"\n\0" or content[bit // 8] == 10:
            with pytest.raises(StateCorruptedError):
                storage.call(append("alice", "over it"))
            assert path.read_bytes() == flipped
        storage.close()
    assert unnoticed == []


@pytest.mark.parametrize("filling", [b"", b"\0"], ids=["cut", "NULs"])
def test_a_log_torn_at_any_byte_of_its_last_record_goes_on(
    tmp_path: Path, filling: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = some_conversation(tmp_path)
    content = path.read_bytes()
    before = content.rindex(b"\n", 0, -1) + 1
    expected = ["Grüße 0 ☃", "Grüße 1 ☃", "Grüße 2 ☃", "one", "two", "three"]  # the last record pops one
    for cut in range(before, len(content)):
        path.write_bytes(content[:cut] + filling * (len(content) - cut))
        reader = FileStorage(tmp_path, fsync="no")
        assert texts(reader, "alice") == expected
        assert path.stat().st_size in (cut, len(content))  # readers change nothing
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            reader.call(append("alice", "next"))
        assert ("never acknowledged" in caplog.text) == (cut > before or bool(filling))
        reader.close()
        assert texts(FileStorage(tmp_path), "alice") == [*expected, "next"]


def test_a_torn_header_is_no_context(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", 1, commit_id="first"))
    storage.close()
    path = tmp_path / "alice.jsonl"
    content = path.read_bytes()
    header = content.index(b"\n") + 1
    for cut in (0, 1, header - 1, header, header + 10):
        for tail in (b"", bytes(50)):
            path.write_bytes(content[:cut] + tail)
            storage = FileStorage(tmp_path)
            assert look(storage, "alice") is None
            storage.call(append("alice", 2))
            storage.close()
            assert texts(FileStorage(tmp_path), "alice") == ["2"]


def test_a_bad_line_in_the_middle_is_never_taken_for_torn(tmp_path: Path) -> None:
    path = some_conversation(tmp_path)
    content = path.read_bytes()
    lines_ = content.splitlines(keepends=True)
    begin = len(lines_[0])
    hole = content[:begin] + bytes(len(lines_[1])) + content[begin + len(lines_[1]) :]
    path.write_bytes(hole.replace(b'"flushed":', b'"flushed":'))
    # The lines after the hole say that they were written before anything was flushed: fsync was off.
    assert look(FileStorage(tmp_path), "alice") is None
    storage = FileStorage(tmp_path / "synced")
    for number in range(4):
        storage.call(append("alice", number))
    storage.close()
    path = tmp_path / "synced" / "alice.jsonl"
    content = path.read_bytes()
    end = content.rindex(b"\n", 0, -1) + 1  # of the last but one
    begin = content.rindex(b"\n", 0, end - 1) + 1
    for first, last in ((begin, begin + 100), (begin, end), (begin + 5, end)):  # with its newline, and without
        path.write_bytes(content[:first] + bytes(last - first) + content[last:])
        with pytest.raises(StateCorruptedError):
            look(FileStorage(tmp_path / "synced"), "alice")


def test_a_group_that_did_not_reach_the_disk_in_order_is_torn(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", "before"))
    size = (tmp_path / "alice.jsonl").stat().st_size
    storage.execute([append("alice", number) for number in range(5)], lambda index, outcome: None)
    storage.close()
    path = tmp_path / "alice.jsonl"
    content = path.read_bytes()
    # The first block of the write is missing, the rest is there; none of it was acknowledged before all of it was.
    path.write_bytes(content[:size] + bytes(150) + content[size + 150 :])
    storage = FileStorage(tmp_path)
    assert texts(storage, "alice") == ["before"]
    storage.call(append("alice", "after"))
    storage.close()
    assert texts(FileStorage(tmp_path), "alice") == ["before", "after"]


def long_conversation(folder: Path, messages: int, *, writes_after: int = 0) -> None:
    storage = FileStorage(folder, fsync="no")
    for begin in range(0, messages, 50):
        for number in range(begin, min(begin + 50, messages)):
            storage.call(append("alice", number))
        storage.call(put("alice", topic=b'"%d"' % begin))
    for number in range(writes_after):
        storage.call(put("alice", **{f"v{number % 7}": b'"%s"' % (b"x" * 100)}))
    storage.close()


WINDOWS = [
    None,
    Window(limit=10),
    Window(limit=10, before=30),
    Window(first=0, limit=5),
]


def test_a_cold_read_reads_the_same_few_bytes_however_long_the_file_is(tmp_path: Path) -> None:
    for name, messages, writes in (("short", 10, 0), ("long", 5000, 0), ("variables", 200, 3000)):
        long_conversation(tmp_path / name, messages, writes_after=writes)
        for window in WINDOWS[:2]:
            between = Between()
            storage = FileStorage(tmp_path / name, file_system=between)
            snapshot = look(storage, "alice", window)
            assert snapshot is not None
            assert snapshot.end == messages
            if window is not None:
                assert [json.loads(text)["content"] for text in snapshot.messages] == [
                    str(number) for number in range(messages - 10, messages)
                ]
            assert between.read_bytes < 60_000
            storage.close()


def test_any_page_of_a_long_history_is_found_cold_and_warm(tmp_path: Path) -> None:
    long_conversation(tmp_path, 2000, writes_after=100)
    warm = FileStorage(tmp_path)
    for first in (0, 1, 49, 50, 777, 1500, 1936, 1998):
        for window in (Window(first=first, limit=3), Window(before=first + 3, limit=3)):
            for storage in (warm, FileStorage(tmp_path)):
                stop = min(first + 3, 2000)
                assert texts(storage, "alice", window) == [str(number) for number in range(max(0, stop - 3), stop)][
                    -3:
                ] or (texts(storage, "alice", window) == [str(number) for number in range(first, stop)])
    assert texts(warm, "alice") == [str(number) for number in range(2000)]
    warm.close()


def test_appending_writes_little_more_than_the_messages(tmp_path: Path) -> None:
    between = Between()
    storage = FileStorage(tmp_path, fsync="no", file_system=between)
    text = message("x" * 200)
    for _ in range(3000):
        storage.call(commit("alice", Append((text,))))
    assert between.written_bytes < 1.6 * 3000 * len(text)
    assert between.calls.count("replace") == 0
    storage.close()


def test_checkpoints_say_what_the_lines_before_them_say(tmp_path: Path) -> None:
    long_conversation(tmp_path, 300, writes_after=50)
    storage = FileStorage(tmp_path)
    storage.call(commit("alice", Trim(250)))
    storage.call(commit("alice", Pop(7)))
    for number in range(200):
        storage.call(append("alice", f"later {number}"))
    found = lines(tmp_path / "alice.jsonl")
    assert sum("checkpoint" in line for line in found) > 5
    assert list(storage.verify()) == []
    offset = 0
    for line in (tmp_path / "alice.jsonl").read_bytes().splitlines():
        assert is_sealed(line, seed_of("alice"), offset)
        assert fields(line).keys() == json.loads(line).keys()
        offset += len(line) + 1
    storage.close()


def test_values_of_16_mib_are_read_cold(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path, fsync="no")
    large = b'"%s"' % (b"x" * (16 * 1024 * 1024 - 2))
    storage.call(append("alice", "small"))
    storage.call(commit("alice", Append((large,)), Put(Space.VARIABLES, (("large", large),))))
    storage.call(append("alice", "smaller"))
    storage.close()
    snapshot = look(FileStorage(tmp_path), "alice")
    assert snapshot is not None
    assert list(snapshot.messages) == [message("small"), large, message("smaller")]
    assert snapshot.variables == {"large": large}


def test_clearing_leaves_nothing_but_commit_ids(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(append("alice", "SECRET", commit_id="the-first"))
    storage.call(put("alice", word=b'"SECRET"'))
    assert storage.call(clear("alice", commit_id="the-clearing")) == b"true"
    assert "SECRET" not in (tmp_path / "alice.jsonl").read_text()
    prefix, *rest = lines(tmp_path / "alice.jsonl")[1]["commits"]
    assert {"the-first", "the-clearing"} <= {prefix + suffix for suffix in rest}
    for other in (storage, FileStorage(tmp_path)):
        assert look(other, "alice") is None
        assert other.call(clear("alice", commit_id="the-clearing")) == b"true"
        other.call(append("alice", "SECRET", commit_id="the-first"))
        assert look(other, "alice") is None
        assert other.call(clear("alice")) == b"false"
    storage.call(append("alice", "a new life"))
    snapshot = look(FileStorage(tmp_path), "alice")
    assert snapshot is not None
    assert (snapshot.revision, snapshot.start, snapshot.end) == (1, 0, 1)
    storage.close()


def test_a_file_is_written_anew_when_superseded_data_outweighs_what_is_left(tmp_path: Path) -> None:
    between = Between()
    storage = FileStorage(tmp_path, fsync="no", file_system=between)
    filling = b'"%s"' % (b"x" * 1000)
    for number in range(400):
        storage.call(commit("alice", Append((filling,)), Trim(20), Put(Space.VARIABLES, (("n", b"%d" % number),))))
    assert (tmp_path / "alice.jsonl").stat().st_size < 200_000
    assert 1 <= between.calls.count("replace") < 20
    assert between.written_bytes < 3 * 400 * 1100
    for other in (storage, FileStorage(tmp_path)):
        snapshot = look(other, "alice")
        assert snapshot is not None
        assert (snapshot.start, snapshot.end, snapshot.revision) == (380, 400, 400)
        assert snapshot.variables == {"n": b"399"}
        assert list(snapshot.messages) == [filling] * 20
    assert list(storage.verify()) == []
    storage.close()


def test_a_restored_context_begins_at_its_position(tmp_path: Path) -> None:
    storage = FileStorage(tmp_path)
    storage.call(commit("fork", Restore("u", 500, 7, 9, 33), Append((message(1), message(2))), absent=True))
    for other in (storage, FileStorage(tmp_path)):
        snapshot = look(other, "fork")
        assert snapshot is not None
        assert (snapshot.start, snapshot.end, snapshot.created, snapshot.updated) == (500, 502, 7, 9)
        assert (snapshot.revision, snapshot.user_id) == (33, "u")
        page = other.call(Query("fork", history=Window(before=502, limit=1)))
        assert list(page.messages) == [message(2)]  # type: ignore[union-attr]
    storage.call(append("fork", 3))
    assert texts(FileStorage(tmp_path), "fork") == ["1", "2", "3"]
    storage.close()


def test_lines_are_joined_to_pieces_of_a_mebibyte_and_a_rest() -> None:
    half, rest = b"h" * (1 << 19), b"r"
    assert list(_pieces([half] * 4)) == [half * 2] * 2
    assert list(_pieces([half] * 3 + [rest])) == [half * 2, half + rest]
    assert list(_pieces([])) == []


VALUES = st.sampled_from([b"1", b'"text"', b"null", '"☃"'.encode(), b"{}"])
ADDED: st.SearchStrategy[Change] = st.one_of(
    st.builds(Append, st.lists(VALUES, min_size=1, max_size=3).map(tuple)),
    st.builds(
        Put,
        st.sampled_from(Space),
        st.lists(st.tuples(st.sampled_from(["x", "y", "", '"☃"']), VALUES), max_size=3).map(tuple),
        st.just(False),
    ),
)


@given(
    changes=st.lists(ADDED, min_size=1, max_size=5),
    commit_id=st.sampled_from(["ab-1", 'a "quoted" id \\']),
    before=st.integers(0, 3),
    ttl=st.sampled_from([None, 60.0]),
    flushed=st.sampled_from([None, 7]),
    now=st.integers(-3, 3),
)
def test_a_commit_that_only_adds_is_the_line_that_the_rules_for_all_commits_make_of_it(
    changes: list[Change], commit_id: str, before: int, ttl: float | None, flushed: int | None, now: int
) -> None:
    short, thorough = LogImage("alice"), LogImage("alice")
    first = [Put(Space.VARIABLES, (("x", b"0"),)), *[Append((b"%d" % number,)) for number in range(before)]]
    lines_of: list[list[bytes]] = []
    for image in (short, thorough):
        effects = resolve(image, Commit("alice", tuple(first), "first"), now=5, ttl=ttl, lease=None, read=no_read)
        assert isinstance(effects, Effects)
        lines_of.append([image.header(), image.advance(effects, None)])
    given_commit = Commit("alice", tuple(changes), commit_id)
    assert only_adds(given_commit, short)
    expires = None if ttl is None else 5 + now + int(ttl * 1_000_000)
    lines_of[0].append(short.add(given_commit, 5 + now, expires, flushed))
    effects = resolve(thorough, given_commit, now=5 + now, ttl=ttl, lease=None, read=no_read)
    assert isinstance(effects, Effects)
    lines_of[1].append(thorough.advance(effects, flushed))
    lines_of[0].append(short.checkpoint())
    lines_of[1].append(thorough.checkpoint())
    assert lines_of[0] == lines_of[1]
    for name in (*LogImage.__slots__, *LogImage.__mro__[1].__slots__):  # type: ignore[attr-defined]
        assert getattr(short, name) == getattr(thorough, name), name
    again = LogImage("alice")
    again.replay(b"".join(lines_of[0]), 0)
    assert (again.variables, again.metadata, again.end) == (short.variables, short.metadata, short.end)


def no_read(first: int, stop: int) -> list[bytes]:
    raise AssertionError("what only adds reads nothing")


IDS = st.one_of(
    st.integers(0, 1 << 20).map(lambda first: [f"0123456789ab-{number:x}" for number in range(first, first + 64)]),
    st.lists(st.text(st.characters(codec="ascii", exclude_categories=["C"]), min_size=1, max_size=8), max_size=4),
    st.lists(st.sampled_from(["a", "aa", "aab", "aac", 'a","a', 'a"', "a\\", "b"]), max_size=5),
)


@given(IDS)
def test_commit_ids_are_said_as_what_they_have_in_common_and_the_rest(ids: list[str]) -> None:
    prefix, *rest = json.loads(ids_text(ids))
    assert prefix == commonprefix(ids)  # noqa: RUF071 - of texts, these are no paths
    assert [prefix + one for one in rest] == ids
    for said in (ids_text(ids), json.dumps([prefix, *rest]).encode()):
        read = fields(b'{"commits":%b,"live":["]"]}' % said)
        assert ids_of(read["commits"]) == ids
        assert read["live"] == ["]"]


@pytest.mark.parametrize("said", [b"[]", b'["a",1,"b"]', b'["a",["b"]]', b'"a"', b'{"a":"b"}', b'["a","b"', b'["a"'])
def test_ids_of_commits_that_are_no_texts_are_not_taken(said: bytes) -> None:
    with pytest.raises(ValueError, match=r"texts|JSON|delimiter"):
        fields(b'{"commits":%b,"live":["x"]}' % said)
