"""TLS for the tests: certificates, and a proxy that speaks TLS in front of a server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from servers import HOST, ValkeyServer


class CertificateAuthority:
    """The certificates in the folder `certificates`. A client trusts them by `ca_file`."""

    _folder = Path(__file__).with_name("certificates")
    ca_file = _folder / "ca.pem"

    def issue(self, *names: str) -> Path:
        """The PEM file, key and certificate in one, of a server that is reached by these host names or addresses."""
        return self._folder / f"{'_'.join(names)}.pem"


class TlsProxy:
    """TLS in front of a server, whose packages are built without it.

    `certificate` is a file of `CertificateAuthority.issue`; `ca_file` is what a client needs to trust it.
    """

    def __init__(self, server: ValkeyServer, certificate: Path, ca_file: Path) -> None:
        self.server = server
        self.ca_file = ca_file
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate)

    def __enter__(self) -> Self:
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=f"tls-proxy-{self.port}")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    @property
    def url(self) -> str:
        """Without the option that makes a client trust the certificate."""
        return f"valkeys://{self.server.credentials}localhost:{self.port}/0"

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        proxy = await asyncio.start_server(self._forward, sock=self._listener, ssl=self._context)
        await self._stopping.wait()
        proxy.close()  # the runner cancels what is still connected

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            # A server that is down closes the client's connection: nothing is sent to say so.
            with contextlib.suppress(OSError):
                server_reader, server_writer = await asyncio.open_connection(HOST, self.server.port)
                writers.append(server_writer)
                async with asyncio.TaskGroup() as pumps:
                    pumps.create_task(_pump(reader, server_writer))
                    pumps.create_task(_pump(server_reader, writer))
            for end in writers:
                with contextlib.suppress(OSError):
                    await end.wait_closed()
        finally:
            for end in writers:
                end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes until one side ends, then end the other."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
