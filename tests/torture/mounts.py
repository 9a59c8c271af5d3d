"""Real disks, where this machine lets us mount them: an ext4 image that loses power, and a disk of a few pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Final

from agentstate import FileStorage, SyncConversationContext

from .figures import Figures
from .model import Steps
from .places import scratch
from .troubles import full_disk
from .witness import Witness

_IMAGE_BYTES: Final = 16 * 1024 * 1024
_PER_IMAGE: Final = 40


class CannotMountError(Exception):
    """This machine does not let us."""


def mounted_power(random: Random, rounds: int, figures: Figures) -> None:
    """An ext4 image is copied right after each acknowledgement: what a disk holds if the power fails then.

    The copy is mounted (its journal is replayed) and looked at. Needs root and loop mounts; without them it makes no
    round, which shows in the figures.
    """
    if not can_mount():
        return
    with scratch() as folder:
        number = 0
        while figures.faults < rounds:
            number += 1
            _ImageCuts(folder, number, random, rounds, figures).run()


class _ImageCuts:
    def __init__(self, folder: Path, number: int, random: Random, rounds: int, figures: Figures) -> None:
        self.random = random
        self.rounds = rounds
        self.figures = figures
        self.number = number
        self.image = folder / "disk.ext4"
        self.copy = folder / "copy.ext4"
        self.disk = folder / "disk"
        self.after = folder / "after"

    def run(self) -> None:
        with self.image.open("wb") as file:
            file.truncate(_IMAGE_BYTES)
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(self.image))
        for place in (self.disk, self.after):
            place.mkdir(exist_ok=True)
        _run("mount", "-o", "loop", str(self.image), str(self.disk))
        try:
            storage = FileStorage(self.disk / "states")
            context = SyncConversationContext(storage)
            witness = Witness(self.figures, "alice")
            steps = Steps(self.random)
            for index in range(_PER_IMAGE):
                if self.figures.faults >= self.rounds:
                    break
                witness.call(context, next(steps))
                shutil.copyfile(self.image, self.copy)
                self.figures.faults += 1
                self._look(witness, f"image {self.number}, power cut after call {index}")
            storage.close()
        finally:
            _run("umount", str(self.disk))

    def _look(self, witness: Witness, when: str) -> None:
        _run("mount", "-o", "loop", str(self.copy), str(self.after))
        try:
            twin = Witness(self.figures, "alice")
            twin.possible = witness.possible
            with SyncConversationContext(FileStorage(self.after / "states", fsync="no")) as context:
                error = twin.look(context, when)
            if error is not None:
                self.figures.lose(f"{when}: {error}")
        finally:
            _run("umount", str(self.after))


def can_mount() -> bool:
    """Whether an image can be mounted here."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        return False
    with scratch() as folder:
        image = folder / "probe.ext4"
        with image.open("wb") as file:
            file.truncate(4 * 1024 * 1024)
        try:
            _run("mkfs.ext4", "-q", "-F", str(image))
            _run("mount", "-o", "loop", str(image), str(folder))
        except CannotMountError:
            return False
        _run("umount", str(folder))
        return True


def small_disk(random: Random, rounds: int, figures: Figures) -> None:
    """`full_disk` on a tmpfs of 256 kB in a mount namespace of a child; no rounds where there can be none."""
    if sys.platform != "linux" or threading.active_count() > 1:
        return
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            with scratch() as folder:
                if _enter_namespace(folder):
                    full_disk(folder, random, rounds, figures)
                os.write(write, figures.to_json().encode())
                _run("umount", "-l", str(folder))
        except CannotMountError:
            pass
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = pipe.read()
    os.waitpid(pid, 0)
    if not told:
        figures.fail_silently("the child on the small disk told nothing")
        return
    figures += Figures.from_json(told)


def _enter_namespace(folder: Path) -> bool:
    """Mount a small tmpfs that only this process sees."""
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
        _run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder))
    except CannotMountError:
        return False
    return True


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotMountError(f"{' '.join(command)}: {error}") from error
