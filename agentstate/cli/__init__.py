"""The command `agentstate`: look after conversations from a terminal or a script.

`main` is the console script. It stands without click and rich, and says how to install them where
they are missing. `app` puts the commands together and turns every failure into one line and an exit code; `store` is
the options that choose a storage; `console` is how things are shown. The other modules are one group of commands each.
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
            take_signals()  # at once: the imports below take long enough to be interrupted
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
