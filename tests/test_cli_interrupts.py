"""How a command ends when it is asked to, at the moments that random signals rarely meet."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from commands import environment

from agentstate.cli import exits
from agentstate.cli.interrupts import take_every_ctrl_c

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no such signals")

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CODES = {signal.SIGINT: exits.INTERRUPTED, signal.SIGTERM: exits.TERMINATED, signal.SIGHUP: exits.TERMINATED}

each_signal = pytest.mark.parametrize("number", NUMBERS)

PREFACE = """
import builtins, signal, sys
import agentstate.cli
from agentstate.cli import interrupts

number = int(sys.argv.pop(1))
sys.argv[1:] = ["list", "--storage-dir", "nothing"]

def as_the_command(function):
    agentstate.cli._run = function
    sys.exit(agentstate.cli.main())
"""


def run(code: str, number: signal.Signals) -> tuple[int, str]:
    """The exit code of a process, and all that it printed."""
    done = subprocess.run(
        [sys.executable, "-c", PREFACE + code, str(int(number))],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@each_signal
def test_a_command_that_still_starts_ends_without_a_traceback(number: signal.Signals) -> None:
    code = """
original = builtins.__import__
def importing(name, *args, **kwargs):
    if name == "click":
        signal.raise_signal(number)
    return original(name, *args, **kwargs)
builtins.__import__ = importing
sys.exit(agentstate.cli.main())
"""
    assert run(code, number) == (CODES[number], "")


@each_signal
def test_what_must_be_done_as_a_whole_is_done_before_the_command_ends(number: signal.Signals) -> None:
    code = """
def command():
    with interrupts.undisturbed():
        signal.raise_signal(number)
        print("done")
    print("never")
as_the_command(command)
"""
    assert run(code, number) == (CODES[number], "done\n")


@each_signal
def test_what_takes_long_in_it_is_interrupted_and_cleaned_up(number: signal.Signals) -> None:
    code = """
def command():
    with interrupts.undisturbed():
        try:
            with interrupts.disturbed():
                signal.raise_signal(number)
                print("never")
        finally:
            print("cleaned up")
as_the_command(command)
"""
    assert run(code, number) == (CODES[number], "cleaned up\n")


@each_signal
def test_a_request_that_had_to_wait_is_heeded_as_soon_as_it_may(number: signal.Signals) -> None:
    code = """
def command():
    with interrupts.undisturbed():
        signal.raise_signal(number)
        print("begun")
        with interrupts.disturbed():
            print("never")
as_the_command(command)
"""
    assert run(code, number) == (CODES[number], "begun\n")


@pytest.mark.parametrize("inside", ["interrupts.undisturbed()", "contextlib.nullcontext()"])
@each_signal
def test_a_second_request_ends_it_at_once(number: signal.Signals, inside: str) -> None:
    code = f"""
import contextlib
def command():
    with {inside}:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            print("never")
as_the_command(command)
"""
    assert run(code, number) == (-number, "")


@each_signal
def test_a_signal_that_was_to_be_ignored_is_ignored(number: signal.Signals) -> None:
    code = """
signal.signal(number, signal.SIG_IGN)
def command():
    signal.raise_signal(number)
    print("goes on")
    return 0
as_the_command(command)
"""
    assert run(code, number) == (0, "goes on\n")


def test_a_program_that_takes_every_ctrl_c_already_keeps_its_handler() -> None:
    before = signal.getsignal(signal.SIGINT)
    take_every_ctrl_c()
    assert signal.getsignal(signal.SIGINT) == before
