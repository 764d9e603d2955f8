"""The system calls of the disk tier, in one place: tests put faults in their place."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OWNER_ONLY = 0o700
SAFE = os.O_CLOEXEC | os.O_NOFOLLOW


class Files:
    """Thin: every method is one call of the system or two, and raises `OSError`."""

    def make_folder(self, folder: Path) -> None:
        """A folder nobody else may look into.

        Raises:
            PermissionError: it is a link, or somebody else's.
        """
        folder.mkdir(mode=OWNER_ONLY, parents=True, exist_ok=True)
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise PermissionError(f"{folder} is not a folder of this user")
        if stat.S_IMODE(found.st_mode) != OWNER_ONLY:
            folder.chmod(OWNER_ONLY)

    def names(self, folder: Path) -> list[str]:
        """What lies in a folder."""
        return os.listdir(folder)

    def open(self, path: Path, flags: int) -> int:
        """A descriptor; new files are readable by this user only."""
        return os.open(path, flags | SAFE, 0o600)

    def lock(self, file: int) -> None:
        """Own a file until it is closed or this process ends.

        Raises:
            BlockingIOError: another process owns it.
        """
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def size(self, file: int) -> int:
        """Bytes of an open file."""
        return os.fstat(file).st_size

    def read(self, file: int, buffers: Sequence[Any], at: int) -> int:
        """Read into buffers from a place; how many bytes there were, fewer at the file's end."""
        return os.preadv(file, buffers, at)

    def write(self, file: int, data: Any, at: int) -> int:
        """Write bytes at a place; how many were written, perhaps fewer."""
        return os.pwrite(file, data, at)

    def close(self, file: int) -> None:
        """Let go of a descriptor."""
        os.close(file)

    def unlink(self, path: Path) -> None:
        """Remove a file; one that is gone already is no error."""
        path.unlink(missing_ok=True)
