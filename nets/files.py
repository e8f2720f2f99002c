"""Files and folders of a run: written whole, and numbered where one is taken. For perf/ as well."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there completely or not at all.

    It is written under a temporary name of this process in the same folder, flushed to the disk,
    and renamed over the final name. A rename is atomic.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave the name without the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def numbered(folder: Path, taken: Callable[[Path], bool]) -> tuple[Path, Path | None]:
    """Of folder, folder-2, folder-3, ... the first that is free, and the last before it, if any."""
    number, free, last = 1, folder, None
    while taken(free):
        number, last = number + 1, free
        free = folder.with_name(f"{folder.name}-{number}")
    return free, last
