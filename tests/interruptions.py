"""Runs the handler of a signal at each place of a call where Python may run one, one after the other.

CPython runs handlers after calls and at jumps backwards. So a block is repeated with a signal before the first such
instruction, the second, and so on, until it ends before the signal. No time is involved.
"""

from __future__ import annotations

import ctypes
import dis
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from itertools import count, pairwise
from types import CodeType, FrameType, ModuleType
from typing import Any

# Called by the interpreter itself as a trace function, so that the handler finds no frame of this module to run in.
_raise = ctypes.CDLL(None)["raise"]
_raise.argtypes = [ctypes.c_int, ctypes.py_object, ctypes.py_object, ctypes.py_object]
_raise.restype = None
_send_signal = partial(_raise, signal.SIGINT)


@cache
def _places(code: CodeType) -> frozenset[int]:
    """Where the instructions are that come right before one that may run handlers."""
    instructions = pairwise(dis.get_instructions(code))
    return frozenset(each.offset for each, after in instructions if after.opname.startswith(("CALL", "JUMP_BACKWARD")))


def everywhere(*modules: ModuleType) -> Iterator[Callable[[Callable[[], object]], AbstractContextManager[None]]]:
    """For each place in the code of these modules that a block passes: a context manager for the block.

    It is given what the handler calls. The last block is one that was not interrupted.
    """
    files = {module.__file__ for module in modules}
    passed = 0
    for number in count(1):

        @contextmanager
        def interrupting(call: Callable[[], object], number: int = number) -> Iterator[None]:
            nonlocal passed
            waiting = True

            def trace(frame: FrameType, event: str, argument: object) -> Any:
                nonlocal passed
                if frame.f_code.co_filename not in files or passed >= number:
                    return None
                frame.f_trace = trace  # first: Python 3.13 takes the next line from frames that are traced only
                frame.f_trace_lines, frame.f_trace_opcodes = False, True
                if event == "opcode" and frame.f_lasti in _places(frame.f_code):
                    passed += 1
                    if passed == number:
                        return _send_signal  # before the next instruction, and all that follow
                return trace

            def handler(signum: int, frame: FrameType | None) -> None:
                nonlocal waiting
                if waiting:
                    waiting = False
                    sys.settrace(None)
                    call()

            passed = 0
            before = signal.signal(signal.SIGINT, handler)
            sys._getframe().f_trace_opcodes = True  # before: Python 3.12 and 3.13 look only once who wants such events
            tracing = sys.gettrace()  # coverage
            sys.settrace(trace)
            try:
                yield
            finally:
                sys.settrace(tracing)
                waiting = False
                signal.signal(signal.SIGINT, before)

        yield interrupting
        if passed < number:
            assert number > 5, "hardly any place was passed: the tracing is broken"
            return
