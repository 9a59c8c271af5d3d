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
def test_a_signal_during_the_start_ends_the_command_without_a_traceback(number: signal.Signals) -> None:
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
def test_an_undisturbed_block_is_completed_before_the_command_ends(number: signal.Signals) -> None:
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
def test_a_disturbed_part_of_an_undisturbed_block_is_interrupted(number: signal.Signals) -> None:
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
def test_a_deferred_signal_takes_effect_as_soon_as_it_may(number: signal.Signals) -> None:
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
def test_a_second_signal_ends_the_command_at_once(number: signal.Signals, inside: str) -> None:
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
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
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
