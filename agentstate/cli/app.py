"""All commands together, and how each of them ends: with one line on stderr, if it must, and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from ..errors import StateConfigError, StateError
from ..version import __version__
from . import chat, completion, contexts, doctor, exits, setup, show, skill, stats, transfers, verify
from .completion import COMPLETION_VARIABLE
from .console import fail, give_up, help_if_alone, prepare_streams

_NAME = "agentstate"

_EXIT_CODES = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in exits.MEANINGS.items())


@click.group(
    name=_NAME,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"\b\nExit codes:\n{_EXIT_CODES}",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("-v", "--verbose", count=True, help="Log what is done to stderr; twice for every operation.")
@click.pass_context
def cli(context: click.Context, verbose: int) -> None:
    """Look after the conversations that agents remember.

    Commands use the storage that the configuration file names, or the one that their options choose. In a pipe,
    tables are lines of fields with tabs between them; with --json, everything is JSON.

    \b
    Examples:
      agentstate init                          write agent_config.yaml
      agentstate doctor                        check that state can be kept
      agentstate list                          what is there
      agentstate show alice                    read a conversation
      agentstate show alice --json | jq '.history[-3:]'
      agentstate migrate ./conversation_states valkey://localhost:6379
    """
    help_if_alone(context)
    if verbose:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("agentstate").setLevel(logging.DEBUG if verbose > 1 else logging.INFO)
    else:
        logging.getLogger("agentstate").addHandler(_Warnings())


class _Warnings(logging.Handler):
    """Shows what libraries warn of as the command's own words."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        fail(f"warning: {record.getMessage()}")


for _module in (contexts, show, stats, transfers, setup, doctor, verify, chat, skill, completion):
    for _command in _module.COMMANDS:
        cli.add_command(_command)


# --- running --------------------------------------------------------------------------------------------------------


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code. Every expected failure is one line on stderr."""
    prepare_streams()
    code: int
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        code = exits.PIPE_CLOSED
    except OSError as error:
        if error.errno == errno.EINVAL and os.name == "nt":  # how a closed pipe looks there
            code = exits.PIPE_CLOSED
        else:
            fail(_os_error_text(error))
            code = exits.PROBLEM
    except click.Abort:
        code = exits.INTERRUPTED
    if code in (exits.PIPE_CLOSED, exits.PROBLEM):
        _give_up_output()
    return code


def _invoke(arguments: Sequence[str]) -> int:
    if COMPLETION_VARIABLE in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, _NAME, COMPLETION_VARIABLE, os.environ[COMPLETION_VARIABLE])
    try:
        with cli.make_context(_NAME, list(arguments)) as context:
            result: Any = cli.invoke(context)
            return result if isinstance(result, int) else exits.OK
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        about = getattr(error, "ctx", None)
        hint = (
            f" (see {about.command_path} --help)" if about is not None and isinstance(error, click.UsageError) else ""
        )
        fail(error.format_message() + hint)
        return error.exit_code
    except StateError as error:
        fail(_text_of(error))
        return exits.code_of(error)


def _text_of(error: StateError) -> str:
    if isinstance(error, StateConfigError) and len(error.problems) > 1:
        return f"{error.problems[0]} (and {len(error.problems) - 1} more: see `agentstate validate`)"
    return str(error)


def _os_error_text(error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else f"cannot write the output: {reason}"


def _give_up_output() -> None:
    try:
        sys.stdout.flush()
    except OSError:
        give_up(sys.stdout)
