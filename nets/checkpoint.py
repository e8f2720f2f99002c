"""Checkpoints: the state of a run in files that survive a `kill -9` and are checked when read.

Each file is written under a temporary name and then renamed (files.py). So every checkpoint in the
folder is complete at every moment.

`torch.save` writes a zip archive with a checksum (CRC-32) of every tensor. `torch.load` does not
check it: a flipped bit would become a wrong weight, and nobody would know. `load` checks it.

`load` accepts tensors and plain Python values only (`weights_only=True`). So a checkpoint from a
stranger cannot run code.
"""

import io
import re
import sys
import zipfile
from pathlib import Path

import torch

from .files import write_whole

FORMAT = "tilelab.nets 1"


class CheckpointError(ValueError):
    """A checkpoint is missing, is damaged or is no checkpoint of ours. The message is one line."""


def save(path: Path, state: dict) -> None:
    """Write the state of a run: tensors, numbers and strings, in lists and dicts."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_whole(path, buffer.getvalue())


def load(path: str | Path) -> dict:
    """Check every byte of a checkpoint, then read it onto the CPU.

    Returns:
        The state that was saved, and under "path" the path of the file.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a checkpoint of tilelab.nets.train.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"checkpoint {path} is damaged: {damaged} fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"no checkpoint {path}") from error
    except Exception as error:  # zipfile, pickle and torch raise many types for damaged files.
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a checkpoint of tilelab.nets.train (format {FORMAT!r})"
        )
    return {**state, "path": path}


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Return the path of the checkpoint after `epoch` epochs. Epoch 0 is the untrained network."""
    return folder / f"checkpoint-{epoch:03d}.pt"


def find(folder: Path) -> list[Path]:
    """Return the paths of the checkpoints in a folder; the one with the highest epoch is first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [
        (int(match[1]), path)
        for path in paths
        if (match := re.fullmatch(r"checkpoint-(\d+)\.pt", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def load_newest(folder: Path) -> dict:
    """Read the newest good checkpoint of a folder.

    It skips damaged checkpoints, and prints a note on stderr for each.

    Raises:
        CheckpointError: if the folder has no good checkpoint.
    """
    skipped = []
    for path in find(folder):
        try:
            state = load(path)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        for reason in skipped:
            print(f"note: {reason}; going back to {path.name}", file=sys.stderr)
        return state
    raise CheckpointError(
        f"no checkpoint to resume in {folder}"
        if not skipped
        else f"no good checkpoint in {folder}: {'; '.join(skipped)}"
    )
