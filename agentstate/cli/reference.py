"""The reference of all commands as Markdown, made from the commands themselves.

python -m agentstate.cli.reference > docs/command-line.md
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc
from textwrap import dedent, indent

import click

from . import exits
from .app import cli
from .store import store_options_unread

_INTRODUCTION = """\
# Command line

`agentstate` looks after conversations from a terminal or a script. It needs two packages (the extra `cli`):

    pip install click rich

Every command uses the storage that [the configuration file](configuration.md) names, unless its options choose another:
`--config FILE` reads another file; `--url` means Valkey and `--storage-dir` files, `--storage NAME` any storage;
`--key-prefix`, `--layout` and `-o NAME=VALUE` override single options of it.

- On a terminal, tables and colours are for people (`NO_COLOR=1` leaves the colours out). In a pipe, a table is lines of
  fields with tabs between them, without a header. With `--json`, everything is JSON.
- What a command has to say beside its output (notes, questions, progress, errors) goes to stderr; an error is one line.
- No password is ever printed. One in `--url` can be seen by others in the list of processes: better put it into the
  environment, and `${VALKEY_URL}` into the configuration file.
- Ctrl-C leaves no half work: a conversation is written or not, an archive appears when it is complete, and an
  interrupted import or migration is simply started again. SIGTERM and SIGHUP do the same. A second one ends the command
  at once, whatever it is doing.

- Conversations are read a group at a time. With 100,000 of them in files, `stats`, `export`, `list --sort none` had a
  peak of 61 MB, `migrate` to a server 70 MB, and `list`, which keeps a line for each to put them in order, 104 MB; on a
  server `stats` had 34 MB, and `list` 82 MB. The process alone takes 26 MB, and `cache_bytes` of files up to 32 MiB.

This page is made from the commands (`python -m agentstate.cli.reference`).
"""


_TRANSFERS = """\
## What export, import and migrate keep

Owner, variables, metadata, messages with their positions, revision, the times of creation and last update, and expiry.
Not copied are leases and the commit ids that are remembered for retries. A conversation that does not expire gets the
`ttl` of its new storage, if that has one. `max_history` of the new storage counts from its next message on, and a value
that is larger than its `max_value_bytes` is refused.

- Each conversation is copied as it is at one moment. A running agent's later changes are not followed: start the same
  migration again with `--replace`, or stop the agents first.
- Each one is read back and compared, also those that were there before. What is there and differs is left alone,
  reported, and makes the exit code 5. `--replace` deletes it and writes it anew, in two steps.
- A conversation of up to 500 messages is written by one commit. A longer one is written by several, but never by more
  than its own revision, which so is kept exactly: one that was made by a single large commit is written by one, and
  must fit into memory. Until its last commit it has the metadata key `agentstate.transfer`, and readers see a part of
  it; a migration that was killed there writes it anew when it is started again.
- A conversation of more than 500 messages that somebody writes to while it is read is read again, five times at most.

An archive is JSON Lines: a header, one conversation a line (the document that `show --json` prints, with `expires_at`
where it expires), and an end that counts them.

    {"agentstate_archive":1,"created_at":"2026-01-31T12:00:00.000000+00:00"}
    {"context_id":"alice","user_id":null,"created_at":"...","updated_at":"...","metadata":{},"variables":{},"history":[...],"history_start":0,"revision":7}
    {"end":{"contexts":1,"messages":2}}

The history of a long one goes on in lines like `{"continues":"alice","history":[...],"more":true}`; its first line says
how many `messages` there are. Archives can be edited, cut, put together, and made by hand: lines of conversations alone
are an archive too, and of a conversation only `context_id` is needed.
"""

_PICTURED = ("chat", "doctor", "list", "migrate", "show", "stats", "verify")
"""Commands with a picture in docs/pictures, which docs/make/pictures.py draws."""

_SHARED = """\
## Options of the storage

Every command that works on a storage has these.

"""


def markdown() -> str:
    """The page."""
    shared = _SHARED + _table(_shared_options())
    return "\n".join([_INTRODUCTION, _exit_codes(), shared, *_commands(), _TRANSFERS]).rstrip() + "\n"


def _exit_codes() -> str:
    rows = "".join(f"| {code} | {meaning} |\n" for code, meaning in exits.MEANINGS.items())
    return f"## Exit codes\n\n| code | meaning |\n| ---: | --- |\n{rows}"


def _shared_options() -> list[click.Option]:
    @click.command()
    @store_options_unread
    def command(chosen: object) -> None: ...

    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def _commands() -> Iterator[str]:
    context = click.Context(cli, info_name="agentstate")
    for name in cli.list_commands(context):
        command = cli.commands[name]
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                yield _command(f"agentstate {name} {inner}", command.commands[inner])
        else:
            yield _command(f"agentstate {name}", command)


def _command(path: str, command: click.Command) -> str:
    arguments = " ".join(_argument(each) for each in command.params if isinstance(each, click.Argument))
    usage = f"{path} [OPTIONS] {arguments}".rstrip()
    text, _, examples = cleandoc(command.help or "").partition("\b\nExamples:\n")
    shown = indent(dedent(examples).strip(), "    ")
    parts = [f"## {path}\n", f"    {usage}\n", text.strip() + "\n", shown + "\n"]
    if command.name in _PICTURED:
        parts.append(f"![What {path} prints](pictures/{command.name}.svg)\n")
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    shared = {option.name for option in _shared_options()}
    own = [option for option in options if option.name not in shared]
    if len(own) < len(options):
        parts.append("Has the [options of the storage](#options-of-the-storage)" + (", and:\n" if own else ".\n"))
    if own:
        parts.append(_table(own))
    return "\n".join(parts)


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    if isinstance(argument.type, click.Choice):
        name = "|".join(argument.type.choices)
    return name if argument.required else f"[{name}]"


def _table(options: list[click.Option]) -> str:
    rows = "".join(f"| {_names(option)} | {_meaning(option)} |\n" for option in options)
    return f"| option | meaning |\n| --- | --- |\n{rows}"


def _names(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if option.is_flag or option.count:
        return names
    if isinstance(option.type, click.Choice):
        return f"{names} " + " or ".join(f"`{choice}`" for choice in option.type.choices)
    return f"{names} {option.metavar or 'NUMBER'}"


def _meaning(option: click.Option) -> str:
    text = " ".join((option.help or "").split()).replace("|", "\\|")
    return f"{text} Default: `{option.default}`." if option.show_default else text


if __name__ == "__main__":
    print(markdown(), end="")
