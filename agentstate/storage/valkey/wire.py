"""A connection to one Valkey server: the protocol (RESP 2), packed and parsed for few large messages.

valkey-py opens the connection (addresses, TLS, unix sockets); from then on the socket is used directly. valkey-py's own
connections cost about as much per command as a whole call of this backend costs for fifty, and retry by rules of their
own.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Generator, Iterable
from math import inf
from time import monotonic
from typing import Any, Final

_RECEIVE: Final = 65536
_SEND: Final = 1 << 18


class ServerError(Exception):
    """An error that the server answered with. `code` is its first word: ``WRONGTYPE``, ``NOAUTH``, ``MOVED``, ..."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = text.partition(" ")[0]


class LostConnectionError(Exception):
    """The connection broke or did not answer in time. What was sent on it may or may not have happened."""


class NoTimeLeftError(LostConnectionError):
    """There was no time for a connection: the errors of earlier attempts say more."""


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
    packed += [bulk(argument if isinstance(argument, bytes) else str(argument).encode()) for argument in arguments]
    return b"".join(packed)


class Connection:
    """A socket on which one caller at a time sends commands and reads replies, before `deadline` (monotonic).

    It is given up when nothing at all was heard for `silence` seconds. After any exception it cannot be used any more
    and must be closed.
    """

    __slots__ = (
        "_owner", "_reader", "_sock", "_timeout", "deadline", "lacks", "received", "run_id", "sent", "silence", "used",
    )  # fmt: skip

    def __init__(self, owner: Any, sock: socket.socket) -> None:
        self._owner = owner  # valkey-py's connection, which closes the socket
        self._sock = sock
        self._reader = _new_reader()
        self._timeout = 0.0  # of the socket, as it was last set
        self.deadline = 0.0
        self.silence = inf
        self.used = 0.0  # when it was last given back
        self.run_id = b""  # of the server
        self.lacks = ""  # commands that writing needs and its user may not run
        self.sent = self.received = 0  # bytes

    def close(self) -> None:
        self._owner.disconnect()

    def send(self, packed: bytes) -> None:
        """Send packed commands. Raises LostConnectionError."""
        self.sent += len(packed)
        try:
            # In pieces, because the timeout of the socket is for each of them.
            for start in range(0, len(packed), _SEND):
                self._set_timeout()
                self._sock.sendall(packed[start : start + _SEND] if len(packed) > _SEND else packed)
        except OSError as error:
            raise LostConnectionError(_reason(error, "sending")) from error

    def ask(self, *commands: bytes) -> list[Any]:
        """The replies to packed commands, errors among them as values. Raises LostConnectionError."""
        self.send(b"".join(commands))
        return [self.read() for _ in commands]

    def read(self) -> Any:
        """The next reply. Raises LostConnectionError."""
        while (reply := self._reader.gets()) is False:
            self._reader.feed(self._receive())
        return reply

    def _receive(self) -> bytes:
        try:
            self._set_timeout()
            data = self._sock.recv(_RECEIVE)
        except OSError as error:
            raise LostConnectionError(_reason(error, "waiting for an answer")) from error
        if not data:
            raise LostConnectionError("the server closed the connection")
        self.received += len(data)
        return data

    def _set_timeout(self) -> None:
        """Let the socket wait as long as it may; up to a hundredth less where that saves setting it again."""
        left = min(self.silence, self.deadline - monotonic())
        if left <= 0:
            raise LostConnectionError("no answer before the deadline")
        if not 0.99 * left <= self._timeout <= left:
            self._timeout = 0.995 * left  # a little less, which is right for the next call too
            self._sock.settimeout(self._timeout)


class Reader:
    """Parses replies, like the class of this name in libvalkey, which is written in C and used if it is installed."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._parsing: Generator[None, None, Any] | None = None

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._data += data

    def gets(self) -> Any:
        """The next reply, or False if it is not complete yet. Raises LostConnectionError where it is no reply."""
        parsing = self._parsing or self._reply()
        try:
            next(parsing)
        except StopIteration as stop:
            self._parsing = None
            return stop.value
        except ValueError:
            raise LostConnectionError("the server does not speak the protocol of Valkey") from None
        self._parsing = parsing
        return False

    def _reply(self) -> Generator[None, None, Any]:
        line = yield from self._take(None)
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return None if rest == b"-1" else (yield from self._take(int(rest)))
        if kind == b"*":
            if rest == b"-1":
                return None
            items: list[Any] = []
            while len(items) < int(rest):
                items += ((yield from self._reply()),)
            return items
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest
        if kind == b"-":
            return ServerError(rest.decode(errors="replace"))
        raise LostConnectionError("the server does not speak the protocol of Valkey")

    def _take(self, size: int | None) -> Generator[None, None, bytes]:
        """So many bytes, or a line, without the line's end."""
        while (end := self._data.find(b"\r\n") if size is None else size) < 0 or len(self._data) < end + 2:
            yield
        taken = bytes(self._data[:end])
        del self._data[: end + 2]
        return taken


def _reader_factory() -> Callable[[], Any]:
    try:
        from libvalkey import Reader as QuickReader
    except ImportError:
        return Reader

    def make() -> Any:
        return QuickReader(protocolError=LostConnectionError, replyError=ServerError)

    return make


# Imported once, not by each connection: a fork while another thread imports would leave the child waiting for ever.
_new_reader: Callable[[], Any] = _reader_factory()


def _reason(error: OSError, doing: str) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
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
        connection = Connection(owner, owner._sock)
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
