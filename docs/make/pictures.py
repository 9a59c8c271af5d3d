"""Draws docs/pictures/*.svg: the real output of commands on a terminal.

python docs/make/pictures.py (tox -e pictures)

Each command runs on a pseudo-terminal, in a temporary folder with real conversations and on a Valkey server that is
started for it; rich draws its output. Only the names of the folder and the server are replaced.
"""

from __future__ import annotations

import html
import io
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pexpect
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "docs" / "pictures"
sys.path.insert(0, str(ROOT / "tests"))

from commands import COMMAND, environment, run  # noqa: E402
from servers import ValkeyServer, find_server  # noqa: E402

_COLUMNS: Final = 100
_CONTEXTS: Final = 3000

# The template of rich fetches a font from a server.
_SVG: Final = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px/{line_height}px "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
.{unique_id}-title {{ font: bold 18px sans-serif; }}
{styles}
</style>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""

_CHARACTER: Final = 20 * 0.61  # the width that rich gives it
_BLANK: Final = "&#160;"
_TEXT: Final = re.compile(
    r'x="(?P<x>[\d.]+)" (?P<y>y="[\d.]+") textLength="[\d.]+" clip-path="[^"]+">'
    rf"(?P<before>(?:{_BLANK})*)(?P<text>.*?)(?:{_BLANK})*</text>"
)

_HANDLER: Final = """\
from agentstate import stateful


@stateful("file")
async def assistant(task, context, context_id):
    before = await context.get_history(context_id, limit=1)
    async with context.batch(context_id) as batch:
        batch.add_to_history("user", task["text"])
    return f"Before this you said: {before[0]['content']}" if before else "Nice to meet you."
"""

_ALICE: Final = (
    ("user", "Remember that I like tea"),
    ("assistant", "I will remember: you like tea."),
    ("user", "What could I drink with a slice of lemon cake?"),
    ("assistant", "You like tea, so perhaps a Darjeeling: it is light enough for the lemon."),
)


# --- what is stored -------------------------------------------------------------------------------------------------


def archive() -> Iterator[dict[str, Any]]:
    """Conversations of different ages and lengths, as lines for `agentstate import`."""
    now = datetime.now(UTC)
    chance = random.Random(4711)
    yield conversation("alice", "u-alice", now - timedelta(minutes=3), _ALICE) | {
        "variables": {"preferences": {"drink": "tea", "language": "en"}, "interaction_count": 2},
        "metadata": {"channel": "web"},
    }
    for number in range(1, _CONTEXTS):
        age = timedelta(hours=chance.lognormvariate(2, 2.2))
        length = max(2, round(chance.lognormvariate(2.3, 1.3)))
        said = ((("user", "assistant")[index % 2], f"message {index}") for index in range(length))
        name = chance.choice(("support", "order", "chat", "user"))
        owner = None if chance.random() < 0.2 else f"u-{chance.randrange(400):03}"
        yield conversation(f"{name}:{number:04}", owner, now - age, said)


def conversation(context_id: str, owner: str | None, updated: datetime, said: Any) -> dict[str, Any]:
    history = [
        {"role": role, "content": text, "timestamp": (updated + timedelta(seconds=9 * index)).isoformat()}
        for index, (role, text) in enumerate(said)
    ]
    started = (updated - timedelta(minutes=len(history))).isoformat()
    return {
        "context_id": context_id, "user_id": owner, "created_at": started, "updated_at": updated.isoformat(),
        "history": history, "revision": len(history),
    }  # fmt: skip


def damage(path: Path) -> None:
    """Flip one bit in the last line of a file."""
    data = bytearray(path.read_bytes())
    data[data.rindex(b'"content"') + 12] ^= 1
    path.write_bytes(bytes(data))


# --- what is printed ------------------------------------------------------------------------------------------------


def printed(*arguments: str, talk: tuple[str, ...] = ()) -> str:
    """Everything a command writes to its terminal while `talk` is typed at its prompts."""
    child = pexpect.spawn(
        COMMAND[0],
        [*COMMAND[1:], *arguments],
        env=environment(),
        encoding="utf-8",
        dimensions=(50, _COLUMNS),
        timeout=120,
    )
    shown = io.StringIO()
    child.logfile_read = shown
    for text in talk:
        child.expect_exact("you> ")
        child.sendline(text)
    if talk:
        child.expect_exact("you> ")
        child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    return shown.getvalue()


def settled(shown: str) -> tuple[str, list[str]]:
    """The final content of the terminal, and all states of the progress bar."""
    lines, bars = [""], []
    row = 0
    start = False
    for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", re.sub(r"\x1b\[\?[0-9]+[hl]", "", shown)):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\r":
            start = True
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            bars += [lines[row]] if "━" in lines[row] else []
            lines[row] = ""
        else:
            lines[row] = part if start else lines[row] + part
            start = False
    return "\n".join(lines), bars


def draw(name: str, command: str, output: str) -> None:
    """Write a picture."""
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
    console.print(Text.from_ansi(output.strip("\n")))
    svg = console.export_svg(title="agentstate", theme=SVG_EXPORT_THEME, code_format=_SVG, unique_id=name)
    svg = re.sub(r"<text[^>]*>\s*</text>", "", _TEXT.sub(_without_blanks, svg))
    svg = re.sub(r" +$", "", svg, flags=re.MULTILINE)
    (PICTURES / f"{name}.svg").write_text(svg, encoding="utf-8")


def _without_blanks(match: re.Match[str]) -> str:
    """A text without leading blanks, moved to its first letter: some programs ignore blanks."""
    before = match["before"].count(_BLANK)
    length = len(html.unescape(match["text"]))
    x = float(match["x"]) + before * _CHARACTER
    return f'x="{x:.1f}" {match["y"]} textLength="{length * _CHARACTER:.1f}">{match["text"]}</text>'


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, chdir(folder), ValkeyServer(find_server("9.1")) as server:

        def hide(text: str) -> str:
            for ours, theirs in (
                (server.url, "valkey://localhost:6379"),
                (f"127.0.0.1:{server.port}", "localhost:6379"),
            ):
                text = text.replace(ours, theirs)
            return text.replace(str(Path(folder).resolve()), "/srv/agent")

        def picture(name: str, *arguments: str, talk: tuple[str, ...] = (), with_bar: bool = False) -> None:
            output, bars = settled(hide(printed(*arguments, talk=talk)))
            if with_bar:
                output = f"{bars[len(bars) // 2]}\n{output}"
            draw(name, hide(" ".join(["agentstate", *arguments])), output)

        here = Path(folder)
        lines = "".join(json.dumps(each) + "\n" for each in archive())
        run("import", "-o", "fsync=no", "-", cwd=here, stdin=lines, timeout=300)
        picture("list", "list", "-n", "8")
        picture("show", "show", "alice")
        picture("stats", "stats")
        picture("migrate", "migrate", "./conversation_states", server.url, with_bar=True)
        (here / "my_agent.py").write_text(_HANDLER)
        picture("chat", "chat", "my_agent:assistant", talk=("I like tea", "Do you remember me?"))
        damage(here / "conversation_states" / "terminal.jsonl")
        picture("verify", "verify", "--repair")
        (here / "agent_config.yaml").write_text(f'state:\n  backend: valkey\n  url: "{server.url}"\n  ttl: 86400\n')
        picture("doctor", "doctor")


if __name__ == "__main__":
    main()
