"""The group of all commands, and how a command ends: at most one line on stderr, and an exit code."""

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
from .console import fail, give_up, help_if_alone, note, one_line, prepare_streams

_NAME = "agentstate"

_EXIT_CODES = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in exits.MEANINGS.items())


class _Commands(click.Group):
    """The group of all commands. An option of a command in front of that command gets an error that says so."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name
            if any(name in option.opts for command in self.commands.values() for option in command.params):
                text = f"the option {name} belongs after the command: {_NAME} COMMAND {name} ..."
                raise click.UsageError(text, ctx) from None
            raise


@click.group(
    name=_NAME,
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"\b\nExit codes:\n{_EXIT_CODES}",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option("-v", "--verbose", count=True, help="Log to stderr; given twice, every operation.")
@click.pass_context
def cli(context: click.Context, verbose: int) -> None:
    """Manage the conversations of agents.

    A command uses the storage that the configuration file names, or the one that its options choose. In a pipe, a
    table is one line per row with a tab between fields; with --json, the output is JSON.

    \b
    Examples:
      agentstate init                          write agent_config.yaml
      agentstate doctor                        check the configuration and the storage
      agentstate list                          list conversations
      agentstate show alice                    print a conversation
      agentstate show alice --json | jq '.history[-3:]'
      agentstate migrate ./conversation_states valkey://localhost:6379
    """
    help_if_alone(context)
    log = logging.getLogger("agentstate")
    log.addHandler(_Log(verbose > 0))
    if verbose:
        log.setLevel(logging.DEBUG if verbose > 1 else logging.INFO)


class _Log(logging.Handler):
    """Prints log records to stderr: warnings as messages of the command, or everything with time and level."""

    def __init__(self, everything: bool) -> None:
        super().__init__(logging.NOTSET if everything else logging.WARNING)
        if everything:
            self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if self.formatter is None:
            fail(f"warning: {record.getMessage()}")
        else:
            note(one_line(self.format(record)))


for _module in (contexts, show, stats, transfers, setup, doctor, verify, chat, skill, completion):
    for _command in _module.COMMANDS:
        cli.add_command(_command)


# --- running --------------------------------------------------------------------------------------------------------


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code. An expected failure prints one line to stderr."""
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
            f" (see `{about.command_path} --help`)" if about is not None and isinstance(error, click.UsageError) else ""
        )
        fail(" ".join(line.strip() for line in error.format_message().splitlines()) + hint)
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
