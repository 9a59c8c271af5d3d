"""Starts commands quickly: a process that has imported everything and forks, once for each command it is asked for.

A command costs a third of a second of processor time when it starts from nothing, nearly all of it for imports, and
there are hundreds of them in these tests. What is forked is a process of its own like any other, with its own pipes,
environment and working directory. `commands.run` uses it where nothing but the import would differ.
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
    """Take requests until there are no more: a line of JSON, with stdin, stdout, stderr and where to write the code."""
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
    gc.freeze()  # or every command would look through all of this once more when it ends: two thirds of what it costs
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
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
    """Be the command."""
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
