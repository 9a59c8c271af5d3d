"""The command completion, and the candidates that shells offer to complete words."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, Final

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

COMPLETION_VARIABLE: Final = "_AGENTSTATE_COMPLETE"

# A shell treats a completed word as if it had been typed, and anybody may choose the id of a conversation.
_NEEDS_NO_QUOTES: Final = re.compile(r"[\w@%+=:,./][\w@%+=:,./-]*")

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]


@add_completion_class
class Bash(BashComplete):
    """For bash, which ends words at colons: ids such as ``user:alice`` contain them."""

    source_template = r"""
%(complete_func)s() {
    local line=${COMP_LINE:0:COMP_POINT} word=${COMP_WORDS[COMP_CWORD]} kind value
    [[ $word == [:=] ]] && word=
    local typed=${line##*[[:space:]]}
    local before=${typed%%"$word"}
    while IFS=',' read -r kind value; do
        case $kind in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${value#"$before"}") ;;
        esac
    done < <(env COMP_WORDS="$line" %(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)
        incomplete = words.pop() if line[-1:].strip() else ""
        return words[1:], incomplete


def offered(words: list[str], incomplete: str) -> list[CompletionItem[str]]:
    """The words that begin with what was typed and need no quotes in a shell."""
    fitting = (word for word in words if word.startswith(incomplete) and _NEEDS_NO_QUOTES.fullmatch(word))
    return [CompletionItem(word) for word in sorted(fitting)]


def paths(kind: str) -> Completer:
    """Completes names of files (`kind` is "file") or of folders ("dir")."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        return [CompletionItem(incomplete, type=kind)]

    return complete


@click.command()
@click.argument("shell", metavar="bash|zsh|fish", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a shell script that completes commands, options and ids of conversations.

    Ids that need quotes in a shell are not completed.

    \b
    Examples:
      eval "$(agentstate completion bash)"     in ~/.bashrc
      eval "$(agentstate completion zsh)"      in ~/.zshrc
      agentstate completion fish > ~/.config/fish/completions/agentstate.fish
    """
    found: Any = get_completion_class(shell)
    root = context.find_root()
    click.echo(found(root.command, {}, root.info_name, COMPLETION_VARIABLE).source())


COMMANDS = (completion,)
