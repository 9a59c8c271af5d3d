"""Real file systems, where they can be mounted: ext4 images that lose power, and a disk of a few pages.

What is mounted is seen by the process of the scenario alone, and is gone with it.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random
from typing import Any, Final

from agentstate import FileStorage, SyncConversationContext
from agentstate.errors import StateOutcomeUnknownError, StateUnavailableError

from .figures import Figures
from .model import Step, Steps
from .places import scratch
from .power import power
from .seam import CHANGING, Failing, Seam
from .witness import Witness

_IMAGE_BYTES: Final = 16 * 1024 * 1024


class CannotMountError(Exception):
    """Mounting is not possible on this machine."""


# --- power ----------------------------------------------------------------------------------------------------------


def mounted_power(random: Random, rounds: int, figures: Figures, *, layout: str = "log") -> None:
    """Power cuts at every change of an ext4 disk: its image is copied, and the copy is mounted and checked.

    Mounting it replays its journal. Needs root and loop mounts; without them it makes no round, which shows in the
    figures.
    """
    if _can_mount_images() and _enter_namespace():
        power(random, rounds, figures, layout=layout, disk=mounted)


class _Mounted:
    """An image that is mounted at `root`."""

    def __init__(self, root: Path, image: Path) -> None:
        self.root = root
        self.seam = Seam(self._around)
        self.failing: Failing | None = None
        self.watch: Callable[[str], None] = lambda name: None
        self._image = image

    def _around(self, name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        result = call(*arguments)
        if name in CHANGING:
            self.watch(name)
        return result

    def after(self, random: Random) -> Iterator[tuple[str, AbstractContextManager[Path]]]:
        yield "image copied", self._copied()

    @contextmanager
    def _copied(self) -> Iterator[Path]:
        copy, place = self._image.with_name("copy.ext4"), self._image.with_name("after")
        shutil.copyfile(self._image, copy)
        place.mkdir(exist_ok=True)
        with _mount("-o", "loop", str(copy), place):
            yield place


@contextmanager
def mounted(folder: Path, lay_out: Callable[[Path], object]) -> Iterator[_Mounted]:
    """A new disk in this folder, on which the files of `lay_out` are synced."""
    image, root = folder / "disk.ext4", folder / "disk"
    root.mkdir(exist_ok=True)
    _make_image(image, _IMAGE_BYTES)
    with _mount("-o", "loop", str(image), root):
        lay_out(root)
        os.sync()
        yield _Mounted(root, image)


def _make_image(image: Path, size: int) -> None:
    with image.open("wb") as file:
        file.truncate(size)
    _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(image))


def _can_mount_images() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        return False
    with scratch() as folder:
        image = folder / "probe.ext4"
        try:
            _make_image(image, 4 * 1024 * 1024)
            with _mount("-o", "loop", str(image), folder):
                return True
        except CannotMountError:
            return False


# --- a disk of a few pages ------------------------------------------------------------------------------------------


def small_disk(random: Random, rounds: int, figures: Figures, *, layout: str = "log") -> None:
    """A tmpfs of 256 kB that is full, has space again, or is read-only. No rounds where it cannot be mounted."""
    with scratch() as folder:
        try:
            if sys.platform != "linux" or not _enter_namespace():
                return
            with _mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", folder):
                for number in range(rounds):
                    _Small(folder / str(number % 2), random, figures, layout).run()
        except CannotMountError:
            return


class _Small:
    """One conversation on a small disk."""

    def __init__(self, folder: Path, random: Random, figures: Figures, layout: str) -> None:
        self.folder = folder
        self.disk = folder.parent
        self.figures = figures
        self.layout = layout
        self.witness = Witness(figures, "alice")
        self.steps = Steps(random, clears=False)
        self.times = random.randint(1, 4)

    def _open(self) -> SyncConversationContext:
        return SyncConversationContext(FileStorage(self.folder, layout=self.layout, deadline=2.0))

    def run(self) -> None:
        with self._open() as context:
            self.witness.call(context, next(self.steps))
            for _ in range(self.times):
                with self._full():
                    for _ in range(3):
                        self.witness.call(context, next(self.steps), insist=True)
                        self.witness.look(context, "on a full disk")
                self._goes_on(context, "on a disk with space again")
        # (A disk is made read-only only while no file is open for writing.)
        with self._read_only(), self._open() as context:
            error = self.witness.look(context, "on a read-only disk")
            if error is not None:
                self.figures.fail_silently(f"a read from a read-only disk: {error!r}")
            error = self.witness.call(context, Step("add_to_history", ("user", "on a read-only disk")))
            if not isinstance(error, StateUnavailableError) or isinstance(error, StateOutcomeUnknownError):
                self.figures.fail_silently(f"a write to a read-only disk: {error!r}")
        with self._open() as context:
            self._goes_on(context, "on a disk that can be written again")
        shutil.rmtree(self.folder)

    def _goes_on(self, context: SyncConversationContext, when: str) -> None:
        for step in (Step("trim_history", (10,)), next(self.steps)):
            error = self.witness.call(context, step) or self.witness.look(context, when)
            if error is not None:
                self.figures.lose(f"{when}: {error!r}")

    @contextmanager
    def _full(self) -> Iterator[None]:
        ballast = self.disk / "ballast"
        try:
            with ballast.open("ab", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        self.figures.faults += 1
        yield
        ballast.unlink()

    @contextmanager
    def _read_only(self) -> Iterator[None]:
        _run("mount", "-o", "remount,ro", str(self.disk))
        self.figures.faults += 1
        try:
            yield
        finally:
            _run("mount", "-o", "remount,rw", str(self.disk))


# --- mounting -------------------------------------------------------------------------------------------------------


def _enter_namespace() -> bool:
    """Give this process a mount namespace of its own; false where that is not allowed."""
    user, group = os.geteuid(), os.getegid()
    flags = 0x00020000 | (0 if user == 0 else 0x10000000)  # CLONE_NEWNS, CLONE_NEWUSER
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(flags) != 0:
        return False
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    try:
        _run("mount", "--make-rprivate", "/")
    except CannotMountError:
        return False
    return True


@contextmanager
def _mount(*arguments: str | Path) -> Iterator[None]:
    """Mounts as the command `mount` does with these arguments, of which the mount point is the last."""
    _run("mount", *map(str, arguments))
    try:
        yield
    finally:
        _unmount(str(arguments[-1]))


def _unmount(place: str) -> None:
    for _ in range(20):
        try:
            _run("umount", place)
        except CannotMountError:  # busy for a moment
            time.sleep(0.05)
        else:
            return
    _run("umount", "-l", place)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotMountError(f"{' '.join(command)}: {error}") from error
