"""The command chat: talk to a handler in the terminal."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from ..errors import ContextNotFoundError, StateConfigError, StateError
from ..keys import check_context_id
from . import console, exits
from .completion import paths
from .interrupts import take_every_ctrl_c
from .store import config_option, use_config

if TYPE_CHECKING:
    import asyncio


class HandlerMissingError(StateError, LookupError):
    """The handler or its module does not exist."""


class HandlerFailedError(StateError):
    """The handler raised an exception."""


class _OutputFailed(Exception):
    """An answer could not be printed, for example because nobody reads it any more. `args[0]` is the OSError."""


@click.command()
@click.argument("handler", metavar="MODULE:HANDLER", shell_complete=paths("file"))
@click.argument("message", required=False)
@config_option
@click.option("--context-id", default="terminal", show_default=True, metavar="ID", help="The conversation to continue.")
@click.option(
    "--user", "user_id", metavar="USER", help="The user, which the handler finds in task.metadata as user_id."
)
@click.option("--traceback", "with_traceback", is_flag=True, help="Print the traceback if the handler fails.")
def chat(
    handler: str,
    message: str | None,
    config_file: str | None,
    context_id: str,
    user_id: str | None,
    with_traceback: bool,
) -> int:
    """Talk to a handler in the terminal. The next run continues the same conversation.

    MODULE is the name of a module or the path of a Python file, HANDLER a name in it or one given to @register_handler.
    With a MESSAGE the handler answers it and the command ends. Otherwise messages are read until Ctrl-D; in a pipe,
    each line is one.

    The task of the handler is an object and a mapping: task.text, task["text"] and task.input are the message,
    task.context_id the conversation, task.id is new for each message, and task.metadata has user_id if --user is
    given. For handlers of A2A, task.message and the only item of task.history hold the message in parts.

    \b
    Examples:
      agentstate chat my_agent.handlers:memory_assistant
      agentstate chat skill.py:memory_assistant --context-id alice "Remember that I like tea"
    """
    use_config(config_file)
    check_context_id(context_id)
    talk = _Talk(load_handler(handler), context_id, user_id, with_traceback)
    import asyncio  # late: no other command needs it

    take_every_ctrl_c()  # one ends an answer, not the conversation
    with asyncio.Runner() as runner:
        if message is not None:
            talk.say(runner, message)
            return exits.OK
        if not sys.stdin.isatty():
            for line in sys.stdin:
                if text := line.strip():
                    talk.say(runner, text)
            return exits.OK
        console.note(f"Conversation {context_id!r} with {handler}. Press Ctrl-D to end it.")
        return _converse(runner, talk)


def _converse(runner: asyncio.Runner, talk: _Talk) -> int:
    """Read messages until the end of the input. Errors do not end the conversation."""
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401 - makes input() editable
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.note("\nGoodbye!")
            return exits.OK
        if not text:
            continue
        try:
            talk.say(runner, text)
        except StateError as error:
            console.fail(str(error))
        except KeyboardInterrupt:
            console.note("\n(interrupted)")


class _Talk:
    """A handler and what its tasks are made of."""

    def __init__(self, handler: Callable[..., Any], context_id: str, user_id: str | None, traceback: bool) -> None:
        self.handler = handler
        self.context_id = context_id
        self.user_id = user_id
        self.traceback = traceback

    def say(self, runner: asyncio.Runner, text: str) -> None:
        """Give a message to the handler and print its answer as it arrives."""
        try:
            result = self.handler(self._task(text))
            if inspect.isasyncgen(result):
                runner.run(_print_pieces(result))
            elif inspect.isawaitable(result):
                _print_answer(runner.run(_awaited(result)))
            elif inspect.isgenerator(result):
                for piece in result:
                    _print_piece(piece)
                _end_pieces()
            else:
                _print_answer(result)
        except StateError:
            raise
        except _OutputFailed as failed:
            raise failed.args[0] from None
        except Exception as error:
            if self.traceback:
                import traceback

                traceback.print_exc()
            raise HandlerFailedError(f"the handler failed: {type(error).__name__}: {error}") from error

    def _task(self, text: str) -> Any:
        """A task with the message wherever handlers look for it, those for A2A included."""
        part = SimpleNamespace(text=text, kind="text", root=SimpleNamespace(text=text, kind="text"))
        message = SimpleNamespace(
            role="user", parts=[part], message_id=uuid.uuid4().hex, context_id=self.context_id, content=text
        )
        return Task(
            id=uuid.uuid4().hex,
            context_id=self.context_id,
            message=message,
            history=[message],
            status=SimpleNamespace(message=message),
            metadata={} if self.user_id is None else {"user_id": self.user_id},
            text=text,
            input=text,
        )


class Task(SimpleNamespace):
    """A task as an object and as a mapping."""

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and hasattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a mapping."""
        return getattr(self, name, default)


async def _awaited(result: Any) -> Any:
    return await result


async def _print_pieces(pieces: Any) -> None:
    async for piece in pieces:
        _print_piece(piece)
    _end_pieces()


def _print_piece(piece: Any) -> None:
    _print(_text(piece), end="" if isinstance(piece, str) else "\n")


def _end_pieces() -> None:
    _print("")


def _print_answer(answer: Any) -> None:
    if answer is not None:
        _print(_text(answer))


def _print(text: str, *, end: str = "\n") -> None:
    try:
        console.line(text, end=end)
        sys.stdout.flush()
    except OSError as error:
        raise _OutputFailed(error) from error


def _text(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, dict | list):
        return console.json_text(answer, indent=2)
    return str(answer)


# --- finding the handler --------------------------------------------------------------------------------------------


def load_handler(where: str) -> Callable[..., Any]:
    """The handler for ``module:name`` or ``path.py:name``. Raises HandlerMissingError."""
    module_name, colon, name = where.rpartition(":")
    if not colon or not module_name or not name:
        raise click.UsageError(f"MODULE:HANDLER must be like my_agent.handlers:memory_assistant, got {where!r}")
    module = _load_module(module_name)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        found = _registered(module, name)
    if not callable(found):
        raise StateConfigError(f"{name!r} in {module_name} must be a function, got {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _registered(module: ModuleType, name: str) -> Any:
    from difflib import get_close_matches

    from ..handlers import get_handler, list_handlers

    if name in list_handlers():
        return get_handler(name)
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = get_close_matches(name, {*own, *list_handlers()}, 1)
    registered = list_handlers()
    hint = f"registered are {', '.join(registered)}" if registered else "@register_handler registered none"
    if near:
        hint = f"did you mean {near[0]!r}?"
    raise HandlerMissingError(f"there is no handler {name!r} in {module.__name__} ({hint})")


def _load_module(name: str) -> ModuleType:
    if name.endswith(".py") or os.sep in name:
        return _load_file(name)
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)  # unlike `python -m`, a console script starts without it
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise HandlerMissingError(f"there is no module {error.name!r} in this folder or installed") from error
        raise _broken(name, error) from error
    except Exception as error:  # importing a module runs any code
        raise _broken(name, error) from error


def _load_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise ContextNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise StateConfigError(f"{path} is not a Python file")
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # as import does: dataclasses and pickle look it up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[file.stem]
        raise _broken(path, error) from error
    return module


def _broken(name: str, error: Exception) -> StateError:
    if isinstance(error, StateError):
        return error
    return HandlerFailedError(f"{name} cannot be imported: {type(error).__name__}: {error}")


COMMANDS = (chat,)
