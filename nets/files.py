"""How a run writes its files whole, and numbers its folders. perf/ uses these functions too."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file: afterwards the path has the whole content, or what it had before.

    The content goes to a temporary name in the same folder first, and is flushed to the disk. Then
    the file gets its final name. This works because a rename is atomic.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # Otherwise a power cut could leave the name without content.
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def numbered(folder: Path, taken: Callable[[Path], bool]) -> tuple[Path, Path | None]:
    """Return the first free name of folder, folder-2, ..., and the taken name before it or None."""
    number, free, last = 1, folder, None
    while taken(free):
        number, last = number + 1, free
        free = folder.with_name(f"{folder.name}-{number}")
    return free, last
