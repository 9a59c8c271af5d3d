"""The `agentstate` command: manage conversations from a terminal or a script.

`main` is the console script. It runs without click and rich, which are optional, and says how to install them. `app`
assembles the commands and turns every expected failure into one line on stderr and an exit code; `store` has the
options that choose a storage; `console` formats the output. Each other module holds one group of commands.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from . import exits
from .interrupts import Terminated, leave_signals, take_signals


def main() -> int:
    """Run the command that the process was started with, and return its exit code."""
    try:
        try:
            take_signals()  # first: the imports below take long enough to be interrupted
            return _run()
        finally:
            leave_signals()
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except Terminated:
        return exits.TERMINATED


def _run() -> int:
    missing = [name for name in ("click", "rich") if find_spec(name) is None]
    if missing:
        text = f"agentstate: the command line needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        print(text, file=sys.stderr)
        return exits.USAGE
    from .app import run

    return run(sys.argv[1:])
