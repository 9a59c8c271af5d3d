"""Seeded bugs: small patches of the library, applied while it is imported. The scenarios must catch every one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple


class Mutation(NamedTuple):
    """In `file` of the package, `old` (which occurs once) becomes `new`; `scenario` must catch it."""

    file: str
    old: str
    new: str
    scenario: str
    rounds: int


MUTATIONS: Final = {
    "a commit is not flushed": Mutation(
        "storage/file/logfile.py", "            folder.fs.sync(reader.fd)\n", "", "power", 400
    ),
    "the folder is not flushed": Mutation(
        "storage/file/folder.py", "        self.fs.sync_folder(self.path)\n", "", "power", 400
    ),
    "a new file gets its name before it is flushed": Mutation(
        "storage/file/filesystem.py", "            fs.sync(fd)\n", "", "power", 4_000
    ),
    "one temporary name is shared by all files": Mutation(
        "storage/file/filesystem.py",
        "    temporary = path + NEW\n",
        "    temporary = os.path.join(os.path.dirname(path), 'temporary' + NEW)\n",
        "kills",
        200,
    ),
    "after a failed flush the page cache is believed": Mutation(
        "storage/file/logfile.py",
        "            self._mark_suspect()\n            self._write_again()\n",
        "            pass\n",
        "power-after-errors",
        3_000,
    ),
    "an error is read as absent": Mutation(
        "storage/file/logview.py",
        "        except FileNotFoundError:\n            self.image = self._load_document()",
        "        except OSError:\n            self.image = self._load_document()",
        "system-errors",
        150,
    ),
    "the checksum is ignored": Mutation(
        "storage/file/logformat.py",
        """    return line[-SEAL_SIZE:] == b',"crc":"%08x"}' % crc32(body, (seed + offset) & 0xFFFFFFFF)""",
        """    return len(body) > 0""",
        "flipped-bits",
        1_500,
    ),
    "a damaged last newline is taken for a torn end": Mutation(
        "storage/file/logformat.py",
        "    return not any(end < len(text) and text[end] != 0 for end in complete)",
        "    return True",
        "flipped-bits",
        1_500,
    ),
    "a torn end is taken for damage": Mutation(
        "storage/file/logformat.py",
        "    *lines, fragment = region.split",
        "    return False\n    *lines, fragment = region.split",
        "torn-ends",
        200,
    ),
    "read, modify and write without a lock": Mutation(
        "storage/file/locks.py",
        "            if not lock_descriptor(self._fd, blocking=False):\n                return False\n",
        "",
        "crowd-files",
        3,
    ),
    "a deadline is overlooked": Mutation(
        "storage/file/locks.py",
        "            if time.monotonic() + pause >= deadline:\n                raise self._timeout(context_id)\n",
        "            if time.monotonic() - 3.0 >= deadline:\n                raise self._timeout(context_id)\n",
        "locks",
        5,
    ),
    "the fence is not checked": Mutation(
        "storage/resolve.py",
        "    if commit.fence is not None and commit.fence != lease:",
        "    if commit.fence is not None and commit.fence == '':",
        "turns-files",
        6,
    ),
    "a batch is committed in two parts": Mutation(
        "batches.py",
        "            yield self._caller._commit(self._context_id, self._commit_id, *self._changes)\n\n    def add_to",
        "            yield self._caller._commit(self._context_id, None, *self._changes[:1])\n"
        "            yield self._caller._commit(self._context_id, None, *self._changes[1:])\n\n    def add_to",
        "crowd-files",
        3,
    ),
    "a retry is blind": Mutation(
        "storage/valkey/script.lua",
        "    local place = call('LPOS', commits, commit_id, 'RANK', -1)\n    if not place then\n",
        "    local place\n    if not place then\n",
        "cuts",
        200,
    ),
    "a late copy is taken for the first": Mutation(
        "storage/valkey/script.lua", " or now <= guard\n", "\n", "cuts", 200
    ),
    "an update is not compared": Mutation(
        "storage/valkey/script.lua",
        "      if (exists and call('HGET', state, args[a])) ~= args[a + 1] then",
        "      if false then",
        "crowd-valkey",
        3,
    ),
    "an unknown outcome is called not done": Mutation(
        "storage/valkey/execution.py",
        "        if index in self._unknown:\n            return self._outcome_unknown(index, error)\n",
        "",
        "cuts",
        300,
    ),
    "a document is put away before its log has its name for good": Mutation(
        "storage/file/leftbehind.py",
        "            self.folder.sync()  # or a power cut could undo the log's name, and not this\n",
        "",
        "power",
        4_000,
    ),
    "an exclusive store finishes no adoption": Mutation(
        "storage/file/logview.py",
        "self.left_beside = self.left.is_there(adopted)",
        "self.left_beside = self.left.is_there(adopted) and not self.trusted",
        "power",
        4_000,
    ),
    "a damaged file is not kept for good before it is replaced": Mutation(
        "storage/file/logrepair.py",
        "        log.folder.sync()  # or a power cut could undo this name",
        "        # or a power cut could undo this name",
        "power",
        6_000,
    ),
    "a hole over the end of a line hides the next one": Mutation(
        "storage/file/logformat.py",
        """line.rpartition(b"\\0")[2]""",
        """line.lstrip(b"\\0")""",
        "moved-lines",
        2_000,
    ),
    "a handler runs twice": Mutation(
        "handlers/decorator.py",
        "            return function(*call.args, **call.kwargs)\n",
        "            try:\n                return function(*call.args, **call.kwargs)\n"
        "            except OSError:\n                return function(*call.args, **call.kwargs)\n",
        "handlers",
        24,
    ),
}


class StaleMutationError(Exception):
    """The library has changed, and the patch no longer applies: it must be rewritten."""


def plant(mutation: Mutation) -> None:
    """Import the library with this bug. No module of it may have been imported before."""
    spec = importlib.util.find_spec("agentstate")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    text = (Path(spec.submodule_search_locations[0]) / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        raise StaleMutationError(f"{mutation.file} does not contain exactly once: {mutation.old!r}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "agentstate"]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder(mutation))


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, mutation: Mutation) -> None:
        super().__init__(name, path)
        self._mutation = mutation

    def get_data(self, path: str) -> bytes:
        data = super().get_data(path)
        if Path(path).as_posix().endswith(f"/agentstate/{self._mutation.file}"):
            data = data.replace(self._mutation.old.encode(), self._mutation.new.encode())
        return data

    def get_code(self, fullname: str) -> Any:
        # Not from the cache of compiled modules, which does not have the bug.
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder(MetaPathFinder):
    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "agentstate":
            return None
        for finder in self._others():
            spec: ModuleSpec | None = finder.find_spec(fullname, path, target)
            if spec is not None:
                if isinstance(spec.loader, SourceFileLoader):
                    spec.loader = _Loader(fullname, spec.loader.path, self._mutation)
                return spec
        return None

    def _others(self) -> Iterator[Any]:
        return (finder for finder in sys.meta_path if finder is not self)


def how_caught(name: str, seed: int) -> str:
    """How the mutation's scenario catches it; empty if it does not."""
    from .scenarios import run_apart

    mutation = MUTATIONS[name]
    try:
        figures = run_apart(mutation.scenario, seed, mutation.rounds, mutation=name, timeout=90.0)
    except subprocess.TimeoutExpired:
        return "it hangs"
    except RuntimeError as error:
        if "StaleMutationError" in str(error):
            raise
        return "it breaks the scenario"
    counts = (("L", figures.lost), ("D", figures.doubled), ("S", figures.silent), ("H", figures.hanging))
    return " ".join(f"{figure}={count}" for figure, count in counts if count)


def prove(seed: int) -> Iterator[tuple[str, str]]:
    """How each mutation is caught. The same runs without a bug must be clean, or they prove nothing."""
    from .scenarios import run_apart

    needed: dict[str, int] = {}
    for mutation in MUTATIONS.values():
        needed[mutation.scenario] = max(mutation.rounds, needed.get(mutation.scenario, 0))
    blind = {name for name, rounds in needed.items() if not run_apart(name, seed, rounds).clean}
    for name, mutation in MUTATIONS.items():
        yield name, "" if mutation.scenario in blind else how_caught(name, seed)
