"""Storages by name, and the contexts that a process shares."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentstate import (
    ConversationContext,
    DocumentStorage,
    FileStorage,
    InMemoryStorage,
    StateConfigError,
    StateStorage,
    SyncConversationContext,
    ValkeyStorage,
    get_context_manager,
    register_storage,
    registry,
)
from agentstate.config.model import convert, keys_of
from agentstate.operations import Page
from agentstate.registry import storage_class, storage_names
from agentstate.storage.options import storage_options


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No shared managers, no third parties, no configuration file."""
    shared: dict[Any, Any] = {}
    monkeypatch.setattr(registry, "_shared", shared)
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AGENTSTATE_CONFIG", raising=False)
    yield
    for entry in shared.values():
        entry.storage.close()


def configure(text: str) -> None:
    Path("agent_config.yaml").write_text(textwrap.dedent(text))


class SmallStorage(InMemoryStorage):
    """A third party's, with an option of its own and one that has no default."""

    def __init__(self, table: str, *, options: Any = None, **common: Any) -> None:
        super().__init__(**common)
        self.table = table
        self.options = options


def test_a_storage_shows_where_it_is_and_nothing_secret(tmp_path: Path) -> None:
    assert repr(InMemoryStorage(max_history=9)) == "InMemoryStorage(max_history=9)"
    assert repr(FileStorage(tmp_path, ttl=60)) == f"FileStorage(storage_dir={str(tmp_path)!r}, ttl=60)"
    assert repr(ValkeyStorage("valkey://:s3cret@host")).startswith("ValkeyStorage('valkey://:***@host")
    assert repr(SmallStorage("x", options="s3cret")) == "SmallStorage()"
    assert repr(object.__new__(FileStorage)) == "FileStorage()"  # one that could not be made


def test_a_storage_that_refuses_an_option_is_dropped_without_a_word() -> None:
    class Refusing(FileStorage):
        def __init__(self, **options: Any) -> None:
            StateStorage.__init__(self, **options)
            raise StateConfigError("an option is wrong")

    with pytest.raises(StateConfigError):
        Refusing()
    gc.collect()  # an exception in `__del__` would be a warning, and warnings are errors


# --- names ----------------------------------------------------------------------------------------------------------


def test_the_built_in_storages_have_names() -> None:
    assert storage_class("memory") is InMemoryStorage
    assert storage_class("file") is FileStorage
    assert storage_class("valkey") is ValkeyStorage


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("valky", "valkey"), ("Valkey", "valkey"), ("files", "file"), ("memry", "memory"), ("redis", "valkey")],
)
def test_an_unknown_storage_is_an_error_with_the_nearest_name(wrong: str, right: str) -> None:
    with pytest.raises(StateConfigError, match=f"unknown storage '{wrong}'; did you mean '{right}'"):
        get_context_manager(wrong)


def test_an_unknown_storage_like_no_other_lists_all() -> None:
    register_storage("small", SmallStorage)
    with pytest.raises(StateConfigError, match="use one of 'file', 'memory', 'small', 'valkey'"):
        get_context_manager("postgresql")


def test_a_registered_storage_is_used_by_its_name() -> None:
    register_storage("small", SmallStorage)
    manager = get_context_manager("small", table="t", ttl=60, blocking=True)
    assert isinstance(manager.storage, SmallStorage)
    assert (manager.storage.table, manager.storage.ttl) == ("t", 60)
    assert "small" in storage_names()


def test_a_registered_storage_is_used_from_the_configuration() -> None:
    register_storage("small", SmallStorage)
    configure(
        """
        state:
          backend: small
          table: conversations
          max_history: 5
        """
    )
    storage = get_context_manager().storage
    assert isinstance(storage, SmallStorage)
    assert (storage.table, storage.max_history) == ("conversations", 5)


def test_a_third_party_may_have_a_name_like_a_misspelt_one() -> None:
    register_storage("filez", SmallStorage)
    configure("state: {backend: filez, table: t}")
    assert isinstance(get_context_manager().storage, SmallStorage)


def test_options_of_a_third_party_may_be_objects_that_no_file_can_hold() -> None:
    register_storage("small", SmallStorage)
    lock = threading.Lock()
    storage = get_context_manager("small", table="t", options=lock).storage
    assert isinstance(storage, SmallStorage)
    assert storage.options is lock


def test_a_name_is_not_taken_twice() -> None:
    register_storage("small", SmallStorage)
    register_storage("small", SmallStorage)
    for name in ("small", "memory", "valkey"):
        with pytest.raises(StateConfigError, match=f"'{name}' is already used by"):
            register_storage(name, InMemoryStorage)
    assert storage_class("small") is SmallStorage


def test_a_reloaded_class_replaces_the_one_before() -> None:
    register_storage("small", SmallStorage)
    again = type("SmallStorage", (InMemoryStorage,), {"__module__": SmallStorage.__module__})
    register_storage("small", again)
    assert storage_class("small") is again


@pytest.mark.parametrize("cls", [int, "agentstate.storage.memory", InMemoryStorage()])
def test_only_storage_classes_can_be_registered(cls: Any) -> None:
    with pytest.raises(TypeError, match="must be a subclass of StateStorage"):
        register_storage("small", cls)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_storage_needs_a_name(name: Any) -> None:
    with pytest.raises(StateConfigError, match="the name of a storage must be text"):
        register_storage(name, SmallStorage)


class TestEntryPoints:
    """Packages that are installed with an entry point, as far as `importlib.metadata` can tell."""

    @pytest.fixture
    def install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.syspath_prepend(tmp_path)

        def install(package: str, value: str, source: str = "", name: str = "sqlite") -> None:
            (tmp_path / f"{package}.py").write_text(source)
            info = tmp_path / f"{package}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[agentstate.storages]\n{name} = {value}\n")

        return install

    SOURCE = """
from agentstate import InMemoryStorage

class SqliteStorage(InMemoryStorage):
    def __init__(self, path, **options):
        super().__init__(**options)
        self.path = path
"""

    def test_a_storage_comes_with_a_package(self, install: Any) -> None:
        install("plugin_one", "plugin_one:SqliteStorage", self.SOURCE)
        assert "sqlite" in storage_names()
        manager = get_context_manager("sqlite", path="x.db", blocking=True)
        assert type(manager.storage).__name__ == "SqliteStorage"
        assert get_context_manager("sqlite", path="x.db", blocking=True) is manager

    def test_it_is_known_to_the_configuration(self, install: Any) -> None:
        install("plugin_two", "plugin_two:SqliteStorage", self.SOURCE, name="valkeyx")
        configure("state: {backend: valkeyx, path: x.db}")
        assert type(get_context_manager().storage).__name__ == "SqliteStorage"

    def test_one_that_cannot_be_loaded_is_an_error(self, install: Any) -> None:
        install("plugin_three", "plugin_three:Missing")
        with pytest.raises(StateConfigError, match="'sqlite' cannot be loaded from plugin_three:Missing") as caught:
            storage_class("sqlite")
        assert isinstance(caught.value.__cause__, AttributeError)

    def test_one_that_is_no_storage_is_an_error(self, install: Any) -> None:
        install("plugin_four", "plugin_four:thing", "thing = 3")
        with pytest.raises(TypeError, match="must be a subclass of StateStorage"):
            storage_class("sqlite")

    def test_two_of_one_name_are_an_error(self, install: Any) -> None:
        install("plugin_five", "plugin_five:SqliteStorage", self.SOURCE)
        install("plugin_six", "plugin_six:SqliteStorage", self.SOURCE)
        with pytest.raises(
            StateConfigError, match=r"several packages provide a storage 'sqlite' \(plugin_five.*plugin_six"
        ):
            storage_class("sqlite")


# --- one instance per storage and options ---------------------------------------------------------------------------


def test_the_same_options_give_the_same_instance() -> None:
    assert get_context_manager("memory", ttl=60) is get_context_manager("memory", ttl=60)
    assert get_context_manager("memory") is get_context_manager("memory", ttl=None, deadline=5.0)
    assert isinstance(get_context_manager("memory"), ConversationContext)


def test_different_options_give_different_instances() -> None:
    managers = [
        get_context_manager("memory"),
        get_context_manager("memory", ttl=60),
        get_context_manager("memory", ttl=61),
        get_context_manager("memory", max_history=60),
        get_context_manager("file"),
        get_context_manager("file", storage_dir="other"),
    ]
    assert len({id(manager.storage) for manager in managers}) == len(managers)


def test_the_twins_share_their_storage() -> None:
    awaitable = get_context_manager("memory")
    blocking = get_context_manager("memory", blocking=True)
    assert isinstance(blocking, SyncConversationContext)
    assert blocking.storage is awaitable.storage
    assert get_context_manager("memory", blocking=True) is blocking
    blocking.set_variable("a", "k", 1)
    assert asyncio.run(awaitable.get_variable("a", "k")) == 1


def test_spellings_of_a_directory_are_one_directory(tmp_path: Path) -> None:
    manager = get_context_manager("file")
    assert get_context_manager("file", storage_dir="./conversation_states") is manager
    assert get_context_manager("file", storage_dir=tmp_path / "conversation_states") is manager
    assert get_context_manager("file", storage_dir=str(tmp_path / "x" / ".." / "conversation_states")) is manager
    assert get_context_manager("file", storage_dir="conversation_states/") is manager


def test_another_working_directory_is_another_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    manager = get_context_manager("file")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert get_context_manager("file") is not manager


def test_options_that_cannot_be_hashed_are_compared_by_what_they_hold() -> None:
    register_storage("small", SmallStorage)

    def manager(options: Any) -> ConversationContext:
        return get_context_manager("small", table="t", options=options)

    assert manager({"a": [1, {"b": 2}]}) is manager({"a": [1, {"b": 2}]})
    assert manager({"a": [1, {"b": 2}]}) is not manager({"a": [1, {"b": 3}]})
    assert manager({1, 2}) is not manager({1, 2})
    one = {1, 2}
    assert manager(one) is manager(one)
    assert manager(True) is not manager(1)


def test_an_instance_of_ones_own() -> None:
    shared = get_context_manager("memory")
    own = get_context_manager("memory", force_new=True)
    assert own is not shared
    assert own.storage is not shared.storage
    assert get_context_manager("memory") is shared
    assert isinstance(get_context_manager("memory", force_new=True, blocking=True), SyncConversationContext)


def test_a_closed_manager_is_replaced() -> None:
    manager = get_context_manager("memory", blocking=True)
    twin = get_context_manager("memory")
    manager.close()
    again = get_context_manager("memory", blocking=True)
    assert again is not manager
    assert not again.storage.closed
    assert get_context_manager("memory") is not twin
    assert get_context_manager("memory").storage is again.storage


def test_threads_that_come_together_get_one_instance() -> None:
    class SlowStorage(InMemoryStorage):
        def __init__(self, **options: Any) -> None:
            threading.Event().wait(0.05)
            super().__init__(**options)

    register_storage("slow", SlowStorage)
    barrier = threading.Barrier(8)
    found: list[object] = []

    def get() -> None:
        barrier.wait()
        found.append(get_context_manager("slow"))

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_can_get_managers_whatever_its_parent_was_doing() -> None:
    program = """
        import os, threading, warnings
        from agentstate import get_context_manager, InMemoryStorage, register_storage

        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is the point
        inside, go_on = threading.Event(), threading.Event()

        class SlowStorage(InMemoryStorage):
            def __init__(self, **options):
                inside.set()
                go_on.wait()
                super().__init__(**options)

        register_storage("slow", SlowStorage)
        before = get_context_manager("memory")
        thread = threading.Thread(target=get_context_manager, args=("slow",))
        thread.start()
        inside.wait()
        child = os.fork()
        if child == 0:
            os._exit(7 if get_context_manager("memory") is before and get_context_manager("memory", ttl=5) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        go_on.set()
        thread.join()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=30)


def test_a_memory_user_pays_for_no_other_storage() -> None:
    program = """
        import sys
        from agentstate import get_context_manager
        get_context_manager("memory", blocking=True).set_variable("a", "k", 1)
        heavy = "asyncio valkey filelock yaml dataclasses_json logging importlib.metadata agentstate.aio"
        heavy = {*heavy.split(), "agentstate.storage.file", "agentstate.storage.valkey"}
        print(sorted(heavy & set(sys.modules)))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(command, check=True, timeout=30, capture_output=True, text=True).stdout.strip() == "[]"


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "options", "message"),
    [
        ("memory", {"tll": 3}, "did you mean `ttl`"),
        ("memory", {"storage_dir": "x"}, "`storage_dir` is a key of `backend: file`"),
        ("file", {"directory": "x"}, "did you mean `storage_dir`"),
        ("valkey", {"url": "valkey://x", "prefix": "x"}, "did you mean `key_prefix`"),
        ("valkey", {}, "`backend: valkey` needs a url: add the line"),
        ("valkey", {"url": None}, "url"),
        ("memory", {"ttl": -1}, "`ttl` must be a positive number of seconds"),
        ("memory", {"enabled": True}, "'enabled' is a key of the configuration file"),
        ("memory", {"backend": "file"}, "'backend' is a key of the configuration file"),
        ("memory", {"on_unavailable": "raise"}, "'on_unavailable' is a key of the configuration file"),
        (3, {}, "storage_type must be the name of a storage"),
    ],
)
def test_wrong_options_say_what_is_right(storage: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(StateConfigError, match=message):
        get_context_manager(storage, **options)


def test_wrong_options_of_a_third_party_say_what_is_right() -> None:
    register_storage("small", SmallStorage)
    with pytest.raises(StateConfigError, match="SmallStorage has no option 'tabel'; did you mean 'table'"):
        get_context_manager("small", tabel="t")
    with pytest.raises(StateConfigError, match="the storage 'small' needs the option 'table'"):
        get_context_manager("small")
    configure("state: {backend: small, table: t, tabel: t}")
    with pytest.raises(StateConfigError, match="SmallStorage has no option 'tabel'"):
        get_context_manager()


class PlainDocuments(DocumentStorage):
    """A third party's, that hands its options on."""

    def read_document(self, context_id: str, *, deadline: float) -> bytes | None:
        return None

    def replace_document(self, context_id: str, update: Any, *, deadline: float) -> None: ...

    def list_documents(self, cursor: str, size: int, *, deadline: float) -> Page:
        return Page((), None)


@pytest.mark.parametrize(
    "make",
    [InMemoryStorage, partial(FileStorage, "states"), partial(ValkeyStorage, "valkey://x"), PlainDocuments],
)
def test_a_misspelt_option_of_a_storage_object_is_an_error_with_the_nearest_name(make: Any) -> None:
    with pytest.raises(StateConfigError, match="has no option 'tll'") as raised:
        make(tll=3)
    assert "did you mean 'ttl'?" in str(raised.value)


@pytest.mark.parametrize("context", [SyncConversationContext, ConversationContext])
@pytest.mark.parametrize(
    ("storage", "advice"),
    [
        ("memory", r"get_context_manager\('memory', blocking=True\)"),
        ("./states", r"get_context_manager\('file'\)"),
        (Path("states"), r"get_context_manager\('file'\)"),
        (InMemoryStorage, r"InMemoryStorage\(...\)"),
        ({"storage": "file"}, "storage must be a storage object such as InMemoryStorage"),
    ],
)
def test_a_context_wants_a_storage_object(context: Any, storage: Any, advice: str) -> None:
    with pytest.raises(StateConfigError, match=advice):
        context(storage)


def test_a_type_error_of_a_storage_that_has_another_reason_is_passed_on() -> None:
    class Defective(InMemoryStorage):
        def __init__(self, **options: Any) -> None:
            raise TypeError("its own")

    register_storage("defective", Defective)
    with pytest.raises(TypeError, match="its own"):
        get_context_manager("defective")


def test_the_options_of_a_class_are_those_of_its_signature_and_what_it_hands_on() -> None:
    class Wrapping(SmallStorage):
        def __init__(self, *args: Any, extra: int = 3, **more: Any) -> None:
            super().__init__(*args, **more)

    class Closed(SmallStorage):
        def __init__(self) -> None:
            super().__init__("t")

    class NoBase(StateStorage):
        pass

    common = {"ttl", "max_history", "max_value_bytes", "deadline"}
    assert set(storage_options(InMemoryStorage)) == common
    assert set(storage_options(NoBase)) == common
    assert set(storage_options(Wrapping)) == common | {"table", "options", "extra"}
    assert storage_options(Closed) == {}


@pytest.mark.parametrize("backend", ["memory", "file", "valkey"])
def test_every_key_of_the_configuration_is_an_option_of_its_storage(backend: str) -> None:
    for name, key in keys_of(backend).items():
        url = "valkeys://localhost" if name.startswith("ssl_") else "valkey+sentinel://localhost/service"
        options = {"url": url} if backend == "valkey" else {}
        options[name] = convert(name, key.kind.example.strip('"'))
        try:
            get_context_manager(backend, force_new=True, blocking=True, **options).close()
            problem = ""
        except StateConfigError as error:  # the value of an example, perhaps
            problem = str(error)
        assert "no option" not in problem
        assert "unknown option" not in problem


# --- the configuration file -----------------------------------------------------------------------------------------


def test_without_a_file_it_is_the_file_storage_in_its_default_directory() -> None:
    manager = get_context_manager(blocking=True)
    assert isinstance(manager.storage, FileStorage)
    assert get_context_manager("file", blocking=True) is manager
    manager.set_variable("a", "k", 1)
    assert list(Path("conversation_states").glob("a.*"))


def test_the_file_decides() -> None:
    configure("state: {backend: memory, ttl: 77}")
    manager = get_context_manager()
    assert isinstance(manager.storage, InMemoryStorage)
    assert manager.storage.ttl == 77


def test_options_override_the_file_key_by_key() -> None:
    configure("state: {backend: memory, ttl: 77, max_history: 5}")
    storage = get_context_manager("memory", ttl=3).storage
    assert (storage.ttl, storage.max_history) == (3, 5)
    storage = get_context_manager(ttl=None).storage
    assert (storage.ttl, storage.max_history) == (None, 5)


def test_another_storage_than_the_files_drops_the_files_keys_of_that_one() -> None:
    configure(
        """
        state:
          backend: valkey
          url: valkey://localhost:6379
          key_prefix: "x:"
          ttl: 77
        """
    )
    memory = get_context_manager("memory").storage
    assert memory.ttl == 77
    assert isinstance(get_context_manager("file", storage_dir="here").storage, FileStorage)
    assert isinstance(get_context_manager().storage, ValkeyStorage)


def test_a_broken_file_is_an_error_with_its_line_whatever_was_asked_for() -> None:
    configure("state:\n  backend: valkey\n  ttl: 3600\n")
    for storage in (None, "memory"):
        with pytest.raises(StateConfigError, match=r"agent_config.yaml:2: .*needs a url"):
            get_context_manager(storage)


def test_what_is_switched_off_is_given_to_nobody_who_does_not_name_it() -> None:
    configure("state: {enabled: false, backend: memory}")
    with pytest.raises(StateConfigError, match=r"disabled by `enabled: false` in agent_config.yaml"):
        get_context_manager()
    assert isinstance(get_context_manager("memory").storage, InMemoryStorage)


def test_the_file_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    configure("state: {backend: memory, ttl: '${TTL:60}'}")
    assert get_context_manager().storage.ttl == 60
    monkeypatch.setenv("TTL", "61")
    assert get_context_manager().storage.ttl == 61
