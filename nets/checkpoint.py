"""Checkpoints that survive a kill -9: written whole, checked before they are believed.

Files are written under a temporary name and renamed (files.py), so at every moment the folder holds
complete files only.

`torch.save` writes a zip archive with a CRC-32 of every tensor, but `torch.load` does not check
them: a flipped bit would silently become a wrong weight. `load` checks them, and unpickles tensors
and plain Python values only (weights_only), so a checkpoint from a stranger cannot run code.
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
    """A checkpoint is missing, damaged or of another kind; the message is one line."""


def save(path: Path, state: dict) -> None:
    """Write the state of a run: tensors, numbers, strings, lists and dicts of them."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_whole(path, buffer.getvalue())


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU, after checking every byte of it.

    Returns:
        What was saved, and its "path".

    Raises:
        CheckpointError: if it is missing, damaged, or not a checkpoint of nets.train.
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
    except Exception as error:  # zipfile, pickle and torch raise many kinds for damaged files
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of nets.train (format {FORMAT!r})")
    return {**state, "path": path}


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Return where the checkpoint after that many epochs is; 0 is the untrained network."""
    return folder / f"checkpoint-{epoch:03d}.pt"


def find(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest (of the highest epoch) first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    found = [
        (int(match[1]), path)
        for path in paths
        if (match := re.fullmatch(r"checkpoint-(\d+)\.pt", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def load_newest(folder: Path) -> dict:
    """Read the newest good checkpoint of a folder; say on stderr which damaged ones it skipped.

    Raises:
        CheckpointError: if there is none.
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
