"""Other libraries that keep conversations, each configured as its documentation recommends."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from agentstate import FileStorage, StateStorage, SyncConversationContext, ValkeyStorage

from .measure import Run
from .messages import TEXT


class Peer(ABC):
    """One conversation, kept by one library."""

    name: ClassVar[str]
    remark: ClassVar[str] = ""
    """What a reader should know to compare it with ours."""
    flushes: ClassVar[bool] = False
    """Whether an append waits for the disk."""
    most: ClassVar[int] = 10_000
    """The longest conversation that is measured: longer ones would take hours, or cannot be kept."""

    def __init__(self, run: Run, server: Any, content: str) -> None:
        self.stack = ExitStack()
        self.run = run
        self.content = content
        self.open(server.url if server is not None else "")

    @abstractmethod
    def open(self, url: str) -> None:
        """Begin the conversation."""

    @abstractmethod
    def fill(self, length: int) -> None:
        """Add so many messages, in whatever way is fast."""

    @abstractmethod
    def append(self) -> None:
        """Add one message."""

    @abstractmethod
    def last(self, limit: int) -> Any:
        """Read the last messages."""

    def runner(self) -> asyncio.Runner:
        """An event loop that lives as long as the peer."""
        return self.stack.enter_context(asyncio.Runner())


class _Ours(Peer):
    def open(self, url: str) -> None:
        self.context = SyncConversationContext(self.storage(url))
        self.stack.callback(self.context.close)

    def storage(self, url: str) -> StateStorage:
        raise NotImplementedError

    def fill(self, length: int) -> None:
        # The last ones one by one, as agents do: what is appended together is also read together.
        for begin in range(0, length - 100, 500):
            count = min(500, length - 100 - begin)
            self.context.extend_history("one", [{"role": "user", "content": self.content}] * count)
        for _ in range(min(100, length)):
            self.append()

    def append(self) -> None:
        self.context.add_to_history("one", "user", self.content)

    def last(self, limit: int) -> Any:
        return self.context.get_history("one", limit=limit)


class OurFiles(_Ours):
    name = "agentstate, files"
    most = 100_000

    def storage(self, url: str) -> StateStorage:
        return FileStorage(self.run.folder("ours"))


class OurUnflushedFiles(_Ours):
    name = "agentstate, files, fsync: no"
    most = 100_000

    def storage(self, url: str) -> StateStorage:
        return FileStorage(self.run.folder("ours"), fsync="no")


class OurValkey(_Ours):
    name = "agentstate, Valkey"
    most = 100_000

    def storage(self, url: str) -> StateStorage:
        return ValkeyStorage(url)


class _AgentUp(Peer):
    """AgentUp's storage: one module, which does not need the framework. It keeps the last 100 messages."""

    most = 100

    def open(self, url: str) -> None:
        self._runner = self.runner()
        module = _agentup()
        self._context = module.ConversationContext(self.storage(module, url))

    def storage(self, module: Any, url: str) -> Any:
        raise NotImplementedError

    def fill(self, length: int) -> None:
        async def work() -> None:
            state = await self._context.get_or_create("one")
            now = "2025-01-01T00:00:00+00:00"
            message = {"role": "user", "content": self.content, "timestamp": now, "metadata": {}}
            state.history = [dict(message) for _ in range(length)]
            await self._context.storage.set(state)

        self._runner.run(work())

    def append(self) -> None:
        self._runner.run(self._context.add_to_history("one", "user", self.content))

    def last(self, limit: int) -> Any:
        return self._runner.run(self._context.get_history("one", limit=limit))


class AgentUpFiles(_AgentUp):
    name = "AgentUp, files"
    flushes = True
    remark = "keeps 100 messages; flushes the file, not its folder; no lock between processes"

    def storage(self, module: Any, url: str) -> Any:
        return module.FileStorage(str(self.run.folder("agentup")))


class AgentUpValkey(_AgentUp):
    name = "AgentUp, Valkey"
    remark = "keeps 100 messages; concurrent writers overwrite each other"

    def storage(self, module: Any, url: str) -> Any:
        storage = module.ValkeyStorage(url, key_prefix="agentup-peer:")
        self.stack.callback(lambda: self._runner.run(storage.client.aclose()))
        return storage


def _agentup() -> Any:
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    package = importlib.util.find_spec("agent")
    if package is None or not package.submodule_search_locations:
        raise ImportError("agentup")
    path = Path(package.submodule_search_locations[0]) / "state" / "context.py"
    spec = importlib.util.spec_from_file_location("agentup_state_context", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class LangChainFiles(Peer):
    name = "LangChain FileChatMessageHistory"
    remark = "not flushed; rewritten in place, so that a crash can lose the conversation"

    def open(self, url: str) -> None:
        from langchain_community.chat_message_histories import FileChatMessageHistory
        from langchain_core.messages import HumanMessage, messages_to_dict

        self._message = HumanMessage
        self._as_dicts = messages_to_dict
        self._path = self.run.folder("langchain") / "one.json"
        self._history = FileChatMessageHistory(str(self._path))

    def fill(self, length: int) -> None:
        self._path.write_text(json.dumps(self._as_dicts([self._message(content=self.content)] * length)))

    def append(self) -> None:
        self._history.add_message(self._message(content=self.content))

    def last(self, limit: int) -> Any:
        return self._history.messages[-limit:]


class LangChainRedis(Peer):
    name = "LangChain RedisChatMessageHistory"

    def open(self, url: str) -> None:
        from langchain_community.chat_message_histories import RedisChatMessageHistory
        from langchain_core.messages import HumanMessage

        self._message = HumanMessage
        self._history = RedisChatMessageHistory("one", url=url.replace("valkey://", "redis://"))
        self._history.clear()

    def fill(self, length: int) -> None:
        self._history.add_messages([self._message(content=self.content)] * length)

    def append(self) -> None:
        self._history.add_message(self._message(content=self.content))

    def last(self, limit: int) -> Any:
        return self._history.messages[-limit:]


class _OpenAI(Peer):
    session: Any
    _runner: asyncio.Runner

    def fill(self, length: int) -> None:
        self._runner.run(self.session.add_items([{"role": "user", "content": self.content}] * length))

    def append(self) -> None:
        self._runner.run(self.session.add_items([{"role": "user", "content": self.content}]))

    def last(self, limit: int) -> Any:
        return self._runner.run(self.session.get_items(limit=limit))


class OpenAISQLite(_OpenAI):
    name = "openai-agents SQLiteSession"
    flushes = True
    remark = "flushed: WAL, synchronous=FULL"

    def open(self, url: str) -> None:
        from agents import SQLiteSession

        self._runner = self.runner()
        self.session = SQLiteSession("one", self.run.folder("openai") / "sessions.db")
        self.stack.callback(self.session.close)


class OpenAIRedis(_OpenAI):
    name = "openai-agents RedisSession"

    def open(self, url: str) -> None:
        from agents.extensions.memory import RedisSession

        self._runner = self.runner()
        self.session = RedisSession.from_url(f"one-{time.time_ns()}", url=url.replace("valkey://", "redis://"))
        self.stack.callback(lambda: self._runner.run(self.session.close()))


class Strands(Peer):
    name = "Strands FileSessionManager"
    remark = "not flushed; one file for each message"
    most = 1000

    def open(self, url: str) -> None:
        from strands.session.file_session_manager import FileSessionManager
        from strands.types.session import SessionAgent, SessionMessage

        self._message = SessionMessage
        self._manager = FileSessionManager("one", storage_dir=str(self.run.folder("strands")))
        self._manager.create_agent("one", SessionAgent("agent", {}, {}))
        self._count = 0

    def fill(self, length: int) -> None:
        for _ in range(length):
            self.append()

    def append(self) -> None:
        message: Any = {"role": "user", "content": [{"text": self.content}]}
        self._manager.create_message("one", "agent", self._message.from_message(message, self._count))
        self._count += 1

    def last(self, limit: int) -> Any:
        return self._manager.list_messages("one", "agent", limit=limit, offset=max(0, self._count - limit))


FILE_PEERS: tuple[type[Peer], ...] = (OurFiles, OurUnflushedFiles, AgentUpFiles, LangChainFiles, OpenAISQLite, Strands)
VALKEY_PEERS: tuple[type[Peer], ...] = (OurValkey, AgentUpValkey, LangChainRedis, OpenAIRedis)


@contextmanager
def opened(run: Run, make: type[Peer], server: Any = None, content: str = TEXT) -> Iterator[Peer | None]:
    """A peer, or None where it is not installed."""
    try:
        peer = make(run, server, content)
    except ImportError as error:
        run.report.facts[f"not installed: {make.name}"] = str(error)
        yield None
        return
    with peer.stack:
        yield peer
