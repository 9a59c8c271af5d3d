"""The reference of all commands as Markdown, generated from the commands themselves.

python docs/make/command_line.py > docs/command-line.md
"""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc
from textwrap import dedent, indent

import click

from agentstate.cli import exits
from agentstate.cli.app import cli
from agentstate.cli.store import store_options_unread

_INTRODUCTION = """\
# Command line

`agentstate` manages conversations from a terminal or a script. It needs two packages that the library itself does not
need: `pip install click rich`.

Every command uses the storage that [the configuration file](configuration.md) names, unless its options choose another
one: `--config FILE` reads another file, `--url` means Valkey, `--storage-dir` means files, and `--storage NAME` any
storage. `--key-prefix`, `--layout` and `-o NAME=VALUE` override single options of the storage. Options are written
after the name of the command.

- On a terminal, tables have borders and colours (`NO_COLOR=1` switches colours off), and columns that do not fit are
  left out. In a pipe, a table is one line per row with a tab between fields, without a header. With `--json`, the
  output is JSON.
- Notes, questions, progress and errors are written to stderr. An error is one line.
- Control characters and invisible characters of stored text are printed as escapes.
- Passwords are never printed. Other users can see one in `--url` in the list of processes: better set it in the
  environment, and write `${VALKEY_URL}` into the configuration file.
- Ctrl-C, SIGTERM and SIGHUP leave nothing half done: a conversation is written or not, an archive appears when it is
  complete, and an interrupted import or migration can be started again. A second one ends the command at once.
- A server that refuses connections is reported at once, other failures after the `deadline` of the storage.
- Conversations are read in groups. For 100,000 of them in files, peak memory was 61 MB for `stats`, `export` and
  `list --sort none`, 70 MB for `migrate` to a server, and 104 MB for `list`, which has to sort them; with Valkey 34 MB
  for `stats` and 82 MB for `list`. The process alone takes 26 MB, and the cache of files up to `cache_bytes` (32 MiB).

This page is generated from the commands (`python docs/make/command_line.py`).
"""


_TRANSFERS = """\
## What export, import and migrate keep

They keep the owner, variables, metadata, messages with their positions, revision, times of creation and last update,
and expiry. They do not copy leases and the commit ids that are remembered for retries. A conversation that does not
expire gets the `ttl` of its new storage, if that has one. `max_history` of the new storage applies from the next
message on. A value that is larger than its `max_value_bytes` is refused.

- Each conversation is copied as it is at one moment. Later changes are not copied: run the same migration again with
  `--replace`, or stop the agents first.
- Each copy is read back and compared, and so is a conversation that exists already. One that exists and differs is not
  changed; it is reported, and the exit code is 5. `--replace` deletes it and writes it again, in two steps.
- A conversation of up to 500 messages is written by one commit. A longer one is written by several, but not by more
  than its own revision, so that the revision is kept: one that was made by a single large commit is written by one, and
  must fit into memory. Until the last commit it has the metadata key `agentstate.transfer`, and readers see only a part
  of it; a migration that was killed at that point writes it again when it is started again.
- A conversation of more than 500 messages that changes while it is read is read again, up to five times.

An archive is JSON Lines: a header, one conversation per line (the document that `show --json` prints, with `expires_at`
if it expires), and a last line that counts them.

    {"agentstate_archive":1,"created_at":"2026-01-31T12:00:00.000000+00:00"}
    {"context_id":"alice","user_id":null,"created_at":"...","updated_at":"...","metadata":{},"variables":{},"history":[...],"history_start":0,"revision":7}
    {"end":{"contexts":1,"messages":2}}

A long history continues in lines like `{"continues":"alice","history":[...],"more":true}`; its first line has the
number of `messages`. Archives can be edited, split, concatenated, and made by hand: lines of conversations alone are an
archive too, and only `context_id` is required. A line of more than 64 MiB, or whose values would take more than 512 MiB
of memory, is refused, and so are times before 1970 or after 2199 and revisions and positions above 10^15.
"""

_PICTURED = ("chat", "doctor", "list", "migrate", "show", "stats", "verify")
"""Commands with a picture in docs/pictures, which docs/make/pictures.py draws."""

_GENERAL = """\
## Options before the command

Every command also has `-h` and `--help`.

"""

_SHARED = """\
## Options of the storage

Every command that uses a storage has these options.

"""


def markdown() -> str:
    """The page."""
    shared = _SHARED + _table(_shared_options())
    general = _GENERAL + _table(_options(cli))
    return "\n".join([_INTRODUCTION, _exit_codes(), general, shared, *_commands(), _TRANSFERS]).rstrip() + "\n"


def all_commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with the words that it is called by, after `agentstate`."""
    for name, command in sorted(cli.commands.items()):
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", each) for inner, each in sorted(command.commands.items()))
        else:
            yield name, command


def _exit_codes() -> str:
    rows = "".join(f"| {code} | {meaning} |\n" for code, meaning in exits.MEANINGS.items())
    return f"## Exit codes\n\n| code | meaning |\n| ---: | --- |\n{rows}"


def _shared_options() -> list[click.Option]:
    @click.command()
    @store_options_unread
    def command(chosen: object) -> None: ...

    return _options(command)


def _options(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def _commands() -> Iterator[str]:
    shared = {_names(option) for option in _shared_options()}
    for path, command in all_commands():
        options = _options(command)
        has_shared = shared <= {_names(option) for option in options}
        own = [option for option in options if not has_shared or _names(option) not in shared]
        yield _command(path, command, own, has_shared)


def _command(path: str, command: click.Command, own: list[click.Option], has_shared: bool) -> str:
    context = click.Context(command)
    arguments = [each.make_metavar(context) for each in command.params if isinstance(each, click.Argument)]
    text, _, examples = cleandoc(command.help or "").partition("\b\nExamples:\n")
    parts = [
        f"## agentstate {path}\n",
        indent(" ".join(["agentstate", path, "[OPTIONS]", *arguments]), "    ") + "\n",
        text.strip() + "\n",
        indent(dedent(examples).strip(), "    ") + "\n",
    ]
    if command.name in _PICTURED:
        parts.append(f"![The output of agentstate {path}](pictures/{command.name}.svg)\n")
    if has_shared:
        parts.append("Has the [options of the storage](#options-of-the-storage)" + (", and:\n" if own else ".\n"))
    if own:
        parts.append(_table(own))
    return "\n".join(parts)


def _table(options: list[click.Option]) -> str:
    rows = "".join(f"| {_names(option)} | {_meaning(option)} |\n" for option in options)
    return f"| option | meaning |\n| --- | --- |\n{rows}"


def _names(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    if option.is_flag or option.count:
        return names
    if isinstance(option.type, click.Choice):
        return f"{names} " + " or ".join(f"`{choice}`" for choice in option.type.choices)
    return f"{names} {option.metavar}"


def _meaning(option: click.Option) -> str:
    text = " ".join((option.help or "").split()).replace("|", "\\|")
    return f"{text} Default: `{option.default}`." if option.show_default else text


if __name__ == "__main__":
    print(markdown(), end="")
