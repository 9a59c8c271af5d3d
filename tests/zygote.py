"""Starts commands quickly: a process that has imported everything, and forks for each command.

A command costs a third of a second of processor time when it starts from nothing, nearly all of it for imports, and
there are hundreds of them in these tests. A forked command has its own pipes, environment and working
directory. `commands.run` uses this where only the imports would differ.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from typing import NoReturn


def serve(requests: socket.socket) -> NoReturn:
    """Serve requests until the socket is closed: JSON, and descriptors for stdin, stdout, stderr and the exit code."""
    import asyncio
    import logging

    import rich.console
    import rich.progress
    import rich.table
    import yaml

    import agentstate.cli.app
    import agentstate.handlers
    import agentstate.storage.file
    import agentstate.storage.valkey

    assert all((asyncio, logging, rich, yaml, agentstate))
    gc.collect()
    gc.freeze()  # otherwise each command collects all of this when it exits, which is two thirds of its cost
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the supervisors are not waited for
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not data:
            sys.exit()
        if os.fork() == 0:
            requests.close()
            supervise(json.loads(data), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def supervise(request: dict[str, object], descriptors: list[int]) -> NoReturn:
    """Start the command, and write its exit code when it has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, answer = descriptors
    child = os.fork()
    if child == 0:
        os.close(answer)
        become(request, streams)
    for stream in streams:
        os.close(stream)
    _, status = os.waitpid(child, 0)
    os.write(answer, str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def become(request: dict[str, object], streams: list[int]) -> NoReturn:
    """Run the command in this process."""
    from agentstate.cli import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(str(request["cwd"]))
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    sys.argv = ["agentstate", *request["arguments"]]  # type: ignore[misc]
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        mode, errors = ("r", "strict") if number == 0 else ("w", "backslashreplace" if number == 2 else "strict")
        setattr(sys, name, open(number, mode, encoding="utf-8", errors=errors, closefd=False))  # noqa: SIM115
    sys.exit(main())


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
