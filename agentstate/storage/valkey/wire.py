"""A connection to one Valkey server: the protocol (RESP 2), packed and parsed for few large messages.

valkey-py connects (addresses, TLS, unix sockets); from then on the socket is ours. Its own connections cost about as
much for every command as a whole call of ours for fifty, and retry by rules of their own.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from math import inf
from struct import Struct, calcsize
from time import monotonic
from typing import Any, Final

if sys.platform == "linux":
    from os import sched_yield
    from socket import MSG_DONTWAIT

_RECEIVE: Final = 65536
_SEND: Final = 1 << 18

_AWAKE: Final = 0.00015
"""Seconds for which a call looks for its answer before it sleeps."""

_CALLS: Final = 64
"""Calls that look for their answers, or sleep, until it is tried again which is better."""

_MOST_CALLS: Final = 1024
"""Calls that sleep where looking was in vain every time."""


class ServerError(Exception):
    """An error that the server answered with. `code` is its first word: ``WRONGTYPE``, ``NOAUTH``, ``MOVED``, ..."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = text.partition(" ")[0]


class LostConnectionError(Exception):
    """The connection broke or did not answer in time. What was sent on it may or may not have happened."""


class NoTimeLeftError(LostConnectionError):
    """There was no time for a connection: what the attempts before it met with says more."""


def bulk(data: bytes) -> bytes:
    """One argument of a command, packed."""
    return b"$%d\r\n%b\r\n" % (len(data), data)


def number(value: int) -> bytes:
    """An integer as one argument of a command, packed."""
    text = b"%d" % value
    return b"$%d\r\n%b\r\n" % (len(text), text)


def command(*arguments: bytes | str | int) -> bytes:
    """A whole command, packed."""
    packed = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        data = argument if isinstance(argument, bytes) else str(argument).encode()
        packed.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(packed)


class Connection:
    """A socket on which one caller at a time sends commands and reads replies, before `deadline` (monotonic).

    After any exception it is of no use any more, and must be closed.
    """

    __slots__ = (
        "_asleep", "_awake", "_data", "_owner", "_patience", "_position", "_rest", "_sock", "deadline", "received",
        "run_id", "sent",
    )  # fmt: skip

    def __init__(self, owner: Any, sock: socket.socket) -> None:
        self._owner = owner  # valkey-py's connection: closes the socket, without a goodbye after a fork
        self._sock = sock
        self._data = b""
        self._position = 0
        self._patience = 0.0  # how long the socket waits, as it was last set
        # How many of the next calls sleep until the answer is there: all of them where one cannot look without waiting.
        self._asleep: float = 0 if type(sock) is socket.socket and _TIMEVAL is not None else inf
        self._awake = 0  # how many of those after them just look
        self._rest = _CALLS  # how many sleep after looking in vain
        self.deadline = 0.0
        self.run_id = b""
        self.sent = self.received = 0  # bytes, which the pool adds up

    def close(self) -> None:
        self._owner.disconnect()

    def send(self, packed: bytes) -> None:
        """Send packed commands. Raises LostConnectionError."""
        self.sent += len(packed)
        try:
            # In pieces, because the patience of the socket is for each of them.
            for start in range(0, len(packed), _SEND):
                self._set_patience()
                self._sock.sendall(packed[start : start + _SEND] if len(packed) > _SEND else packed)
        except OSError as error:
            raise LostConnectionError(_reason(error, "sending")) from error

    def ask(self, *commands: bytes) -> list[Any]:
        """The replies to packed commands, errors among them as values. Raises LostConnectionError."""
        self.send(b"".join(commands))
        return self.read_some(len(commands))

    def ask_one(self, packed: bytes, looks: bool) -> Any:
        """The reply to one packed command: `send` and `read`, with less ado for what is small.

        `looks`: look for the answer before sleeping, where that helps.
        """
        data = self._exchange(packed, looks)
        if len(data) == 24 and data.startswith(b"$17\r\n"):  # what the script answers to most
            return data[5:22]
        self._feed(data)
        return self.read()

    def ask_some(self, packed: bytes, replies: int, looks: bool) -> list[Any]:
        """`ask_one` for commands that are packed as one, to which there are so many replies."""
        self._feed(self._exchange(packed, looks))
        return self.read_some(replies)

    def _exchange(self, packed: bytes, looks: bool) -> bytes:
        if len(packed) > _SEND:
            self.send(packed)
            return self._receive(_RECEIVE)
        left = self.deadline - monotonic()
        if not 0 < 0.99 * left <= self._patience <= left:
            self._set_patience()
        try:
            self._sock.sendall(packed)
            if not looks:
                data = self._sock.recv(_RECEIVE)
            elif self._asleep:
                self._asleep -= 1
                data = self._sock.recv(_RECEIVE)
            else:
                data = self._look_out()
        except OSError as error:
            raise LostConnectionError(_reason(error, "waiting for an answer")) from error
        if not data:
            raise LostConnectionError("the server closed the connection")
        self.sent += len(packed)
        self.received += len(data)
        return data

    def _look_out(self) -> bytes:
        """Receive, and stay awake for a while: to wake up, on a processor that has gone to sleep too, may take longer
        than a server on this machine takes to answer.

        That is no use where the answer takes longer, or where the server needs the processor that this looks on. Which
        of these it is, one call in `_CALLS` finds out: it lets others run once, after which an answer from the same
        processor is there. Where looking does not pay the next calls sleep.
        """
        receive = self._sock.recv
        end = 0.0
        while True:
            try:
                data = receive(_RECEIVE, MSG_DONTWAIT)
            except BlockingIOError:
                now = monotonic()
                if not end:
                    end = now + _AWAKE
                    if not self._awake:
                        sched_yield()
                        try:
                            data = receive(_RECEIVE, MSG_DONTWAIT)
                        except BlockingIOError:
                            continue
                        self._asleep = _CALLS
                        return data
                elif now > end:
                    self._awake, self._asleep = 0, self._rest
                    self._rest = min(2 * self._rest, _MOST_CALLS)
                    return receive(_RECEIVE)
            else:
                if self._awake:
                    self._awake -= 1
                else:
                    self._awake, self._rest = _CALLS, _CALLS
                return data

    def fileno(self) -> int:
        """The descriptor that is readable when there is something to `receive`."""
        return self._sock.fileno()

    def has_reply(self) -> bool:
        """Whether the next reply is here, or its beginning, which the rest will soon follow."""
        return self._position < len(self._data)

    def reply(self) -> Iterator[Connection]:
        """Until the next reply is here: yields itself before it waits for more to `receive`."""
        while not self.has_reply():
            yield self
            self.receive()

    def receive(self) -> None:
        """Take what has come, and wait if it is nothing. Raises LostConnectionError.

        Nothing is left of which the descriptor would not tell: of TLS a record (at most 16 KB) is taken whole.
        """
        self._feed(self._receive(_RECEIVE))

    def _feed(self, data: bytes) -> None:
        """Put what was received behind what is left over."""
        self._data = self._data[self._position :] + data
        self._position = 0

    def read_some(self, count: int) -> list[Any]:
        """The next replies. Raises LostConnectionError."""
        return [self.read() for _ in range(count)]

    def read(self) -> Any:
        """The next reply. Raises LostConnectionError."""
        line = self._line()
        kind = line[0]
        if kind == 36:  # $
            size = int(line[1:])
            return None if size < 0 else self._take(size)
        if kind == 42:  # *
            count = int(line[1:])
            return None if count < 0 else self._array(count)
        if kind == 58:  # :
            return int(line[1:])
        if kind == 43:  # +
            return line[1:]
        if kind == 45:  # -
            return ServerError(line[1:].decode(errors="replace"))
        raise LostConnectionError("the server does not speak the protocol of Valkey")

    def _array(self, count: int) -> list[Any]:
        items: list[Any] = []
        append = items.append
        while True:
            # Most elements are texts that are here already: no call for each of these.
            data, position = self._data, self._position
            find, size = data.find, len(data)
            left = count - len(items)
            while left:
                end = find(b"\r\n", position)
                if end < 0 or data[position] != 36:  # $
                    break
                start = end + 2
                stop = start + int(data[position + 1 : end])
                if stop < start:  # -1: no text
                    append(None)
                    position = start
                elif stop + 2 <= size:
                    append(data[start:stop])
                    position = stop + 2
                else:
                    break
                left -= 1
            self._position = position
            if not left:
                return items
            append(self.read())

    def _line(self) -> bytes:
        while True:
            end = self._data.find(b"\r\n", self._position)
            if end >= 0:
                line = self._data[self._position : end]
                self._position = end + 2
                if not line:
                    raise LostConnectionError("the server does not speak the protocol of Valkey")
                return line
            self.receive()

    def _take(self, size: int) -> bytes:
        stop = self._position + size
        missing = stop + 2 - len(self._data)
        if missing > 0:
            pieces = [self._data[self._position :]]
            while missing > 0:
                pieces.append(self._receive(max(_RECEIVE, min(missing, 1 << 20))))
                missing -= len(pieces[-1])
            self._data = b"".join(pieces)
            self._position = 0
            stop = size
        data = self._data[self._position : stop]
        self._position = stop + 2
        return data

    def _receive(self, size: int) -> bytes:
        try:
            self._set_patience()
            data = self._sock.recv(size)
        except OSError as error:
            raise LostConnectionError(_reason(error, "waiting for an answer")) from error
        if not data:
            raise LostConnectionError("the server closed the connection")
        self.received += len(data)
        return data

    def _set_patience(self) -> None:
        """Let the socket wait until the deadline; up to a hundredth less where that saves setting it again."""
        left = self.deadline - monotonic()
        if left <= 0:
            raise LostConnectionError("no answer before the deadline")
        if not 0.99 * left <= self._patience <= left:
            self._patience = 0.995 * left  # a little less, which is right for the next call too
            _set_timeout(self._sock, self._patience)


class Several:
    """Connections of which any may be the next with an answer. To be closed, since it has a descriptor of its own."""

    def __init__(self) -> None:
        from selectors import DefaultSelector

        self._selector: Any = DefaultSelector()
        self.deadline = inf

    def fileno(self) -> int:
        """A descriptor that is readable when one of theirs is."""
        descriptor: int = self._selector.fileno()
        return descriptor

    def add(self, connection: Connection) -> None:
        """Wait for this one too."""
        self._selector.register(connection, 1)  # selectors.EVENT_READ
        self.deadline = min(self.deadline, connection.deadline)

    def ready(self, until: float) -> list[Connection]:
        """Wait for answers. Returns those that have one; none if that takes longer than until then; all of them if the
        deadline has passed."""
        events = self._selector.select(max(0.0, min(self.deadline, until) - monotonic()))
        if events or monotonic() < self.deadline:
            return [key.fileobj for key, _ in events]
        return [key.fileobj for key in self._selector.get_map().values()]

    def leave_out(self, connection: Connection) -> None:
        """Do not wait for this one any more."""
        self._selector.unregister(connection)

    def close(self) -> None:
        self._selector.close()


class QuickConnection(Connection):
    """A connection whose replies are read by libvalkey, which is written in C."""

    __slots__ = ("_next", "_reader")

    def __init__(self, owner: Any, sock: socket.socket) -> None:
        from libvalkey import Reader

        super().__init__(owner, sock)
        self._next: Any = False  # a reply that `has_reply` has found; False: none
        self._reader = Reader(protocolError=LostConnectionError, replyError=ServerError)

    def has_reply(self) -> bool:
        if self._next is False:
            self._next = self._reader.gets()
        return self._next is not False

    def _feed(self, data: bytes) -> None:
        self._reader.feed(data)

    def read_some(self, count: int) -> list[Any]:
        next_reply = self._reader.gets
        replies: list[Any] = []
        if self._next is not False:
            replies.append(self.read())
        while len(replies) < count:
            reply = next_reply()
            replies.append(self.read() if reply is False else reply)
        return replies

    def read(self) -> Any:
        reader = self._reader
        reply, self._next = self._next, False
        while reply is False and (reply := reader.gets()) is False:
            reader.feed(self._receive(_RECEIVE))
        return reply


def _connection_class() -> type[Connection]:
    try:
        import libvalkey
    except ImportError:
        return Connection
    return QuickConnection if hasattr(libvalkey, "Reader") else Connection


# Looked for once, not by each connection: a fork while another thread looks would leave the child waiting for ever.
_KIND: Final = _connection_class()


def _set_timeout(sock: socket.socket, seconds: float) -> None:
    """Let every call on the socket wait for so long at most.

    By the kernel's own timeouts, where it has them: with Python's there is a system call more before every other one.
    """
    if _TIMEVAL is None:
        sock.settimeout(seconds)
        return
    sock.settimeout(None)
    whole = int(seconds)
    value = _TIMEVAL.pack(whole, max(1, int((seconds - whole) * 1_000_000)))  # all zero would mean for ever
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


_TIMEVAL: Final = Struct("@ll") if sys.platform == "linux" and calcsize("P") == 8 else None
"""What the kernel's timeouts are given as: where it is known for sure."""


def _reason(error: OSError, doing: str) -> str:
    # What the kernel's timeout looks like on a plain socket, and under TLS (whose module may not be there).
    if isinstance(error, TimeoutError | BlockingIOError) or type(error).__name__.startswith("SSLWant"):
        return "no answer before the deadline"
    return f"{error.strerror or type(error).__name__} while {doing}"


def open_connection(
    make: Callable[..., Any], deadline: float, greeting: Iterable[bytes]
) -> tuple[Connection, list[Any]]:
    """A new connection by valkey-py's connection class `make`, and the replies to the packed commands `greeting`.

    Raises LostConnectionError where there is no server or no answer before the deadline.
    """
    from valkey.backoff import NoBackoff
    from valkey.exceptions import ConnectionError as NoConnection
    from valkey.exceptions import TimeoutError as NoAnswer
    from valkey.retry import Retry

    opened: list[tuple[Connection, list[Any]]] = []

    def greet(owner: Any) -> None:
        connection = _KIND(owner, owner._sock)
        connection.deadline = deadline
        opened.append((connection, connection.ask(*greeting)))

    left = deadline - monotonic()
    if left <= 0:
        raise NoTimeLeftError("no connection before the deadline")
    owner = make(
        socket_connect_timeout=left,
        socket_timeout=left,
        retry=Retry(NoBackoff(), 0),
        retry_on_timeout=False,
        retry_on_error=[],
        health_check_interval=0,
        valkey_connect_func=greet,
    )
    try:
        owner.connect()
    except (NoConnection, NoAnswer, OSError) as error:
        owner.disconnect()
        raise LostConnectionError(str(error)) from error
    except BaseException:
        owner.disconnect()
        raise
    return opened[0]
