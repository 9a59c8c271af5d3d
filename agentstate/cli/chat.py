"""The command chat: talk to a handler. What it remembers stays between runs."""

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
from typing import TYPE_CHECKING, Any, Final

import click

from ..errors import ContextNotFoundError, StateConfigError, StateError
from ..keys import check_context_id
from . import console, exits
from .completion import paths
from .interrupts import take_every_ctrl_c
from .store import config_option, use_config

if TYPE_CHECKING:
    import asyncio

_BYE: Final = "Goodbye!"


class HandlerMissingError(StateError, LookupError):
    """There is no such handler to talk to."""


class HandlerFailedError(StateError):
    """The handler raised an exception of its own."""


@click.command()
@click.argument("handler", metavar="MODULE:HANDLER", shell_complete=paths("file"))
@click.argument("message", required=False)
@config_option
@click.option(
    "--context-id", default="terminal", show_default=True, metavar="ID", help="The conversation to go on with."
)
@click.option("--user", "user_id", metavar="USER", help="Who talks: the task's metadata say so as user_id.")
@click.option("--traceback", "with_traceback", is_flag=True, help="Show where the handler failed, if it does.")
def chat(
    handler: str,
    message: str | None,
    config_file: str | None,
    context_id: str,
    user_id: str | None,
    with_traceback: bool,
) -> int:
    """Talk to a handler in the terminal; its conversation goes on at the next run.

    MODULE is a module's name or the path of a Python file; HANDLER a name in it, or one that @register_handler gave.
    With a MESSAGE it answers that and ends. Otherwise it is a conversation, which Ctrl-D ends; in a pipe, each line is
    a message.

    \b
    Examples:
      agentstate chat my_agent.handlers:memory_assistant
      agentstate chat skill.py:memory_assistant --context-id alice "Remember that I like tea"
    """
    use_config(config_file)
    check_context_id(context_id)
    talk = _Talk(load_handler(handler), context_id, user_id, with_traceback)
    import asyncio  # here, for no other command needs it

    take_every_ctrl_c()  # it ends an answer, and not the conversation
    with asyncio.Runner() as runner:
        if message is not None:
            talk.say(runner, message)
            return exits.OK
        if not sys.stdin.isatty():
            for line in sys.stdin:
                if text := line.strip():
                    talk.say(runner, text)
            return exits.OK
        console.note(f"Conversation {context_id!r} with {handler}. Ctrl-D ends it.")
        return _converse(runner, talk)


def _converse(runner: asyncio.Runner, talk: _Talk) -> int:
    """Ask for messages until the end of the input. An error does not end the conversation."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - gives input() its editing and history
    while True:
        try:
            text = input("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.note(f"\n{_BYE}")
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
    """A handler, and what its tasks are made from."""

    def __init__(self, handler: Callable[..., Any], context_id: str, user_id: str | None, traceback: bool) -> None:
        self.handler = handler
        self.context_id = context_id
        self.user_id = user_id
        self.traceback = traceback

    def say(self, runner: asyncio.Runner, text: str) -> None:
        """Hand a message to the handler and print its answer, as it comes."""
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
        except (StateError, OSError):
            raise
        except Exception as error:
            if self.traceback:
                import traceback

                traceback.print_exc()
            raise HandlerFailedError(f"the handler failed: {type(error).__name__}: {error}") from error

    def _task(self, text: str) -> Any:
        """A task like those of A2A: as far as handlers look at it, with the message where any of them looks."""
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
    """What a handler is asked, as an object and as a mapping."""

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and hasattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """As a mapping's."""
        return getattr(self, name, default)


async def _awaited(result: Any) -> Any:
    return await result


async def _print_pieces(pieces: Any) -> None:
    async for piece in pieces:
        _print_piece(piece)
    _end_pieces()


def _print_piece(piece: Any) -> None:
    console.line(_text(piece), end="" if isinstance(piece, str) else "\n")
    sys.stdout.flush()


def _end_pieces() -> None:
    console.line()


def _print_answer(answer: Any) -> None:
    if answer is not None:
        console.line(_text(answer))
        sys.stdout.flush()


def _text(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, dict | list):
        return console.json_text(answer, indent=2)
    return str(answer)


# --- finding the handler --------------------------------------------------------------------------------------------


def load_handler(where: str) -> Callable[..., Any]:
    """The handler that ``module:name`` or ``path.py:name`` names. Raises HandlerMissingError."""
    module_name, colon, name = where.rpartition(":")
    if not colon or not module_name or not name:
        raise click.UsageError(f"write MODULE:HANDLER, for example my_agent.handlers:memory_assistant, not {where!r}")
    module = _load_module(module_name)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        found = _registered(module, name)
    if not callable(found):
        raise StateConfigError(f"{name!r} in {module_name} is no function: {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def _registered(module: ModuleType, name: str) -> Any:
    from difflib import get_close_matches

    from ..handlers import get_handler, list_handlers

    if name in list_handlers():
        return get_handler(name)
    own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = get_close_matches(name, {*own, *list_handlers()}, 1)
    registered = list_handlers()
    hint = f"registered are {', '.join(registered)}" if registered else "none is registered by @register_handler"
    if near:
        hint = f"did you mean {near[0]!r}?"
    raise HandlerMissingError(f"there is no handler {name!r} in {module.__name__}; {hint}")


def _load_module(name: str) -> ModuleType:
    if name.endswith(".py") or os.sep in name:
        return _load_file(name)
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)  # a console script does not see the working directory by itself
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise HandlerMissingError(f"there is no module {error.name!r} here or among the installed ones") from error
        raise _broken(name, error) from error
    except Exception as error:  # whatever a module does when it is imported
        raise _broken(name, error) from error


def _load_file(path: str) -> ModuleType:
    file = Path(path).resolve()
    if not file.is_file():
        raise ContextNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise StateConfigError(f"{path} is no Python file")
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # as an import does: dataclasses and pickle look it up there
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
