"""Data: the packaged digits, IDX files good and bad, folders, downloads, batches and shifts."""

import functools
import gzip
import hashlib
import http.server
import threading

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import requests
import torch

from tilelab.nets import data
from tilelab.nets.data import DataError, batches, load, read_idx, shift_images, write_idx

# --- the packaged digits ------------------------------------------------------------------------


def test_the_split_is_stratified_complete_and_without_overlap():
    digits = load()
    assert digits.shape == (1, 28, 28) and digits.classes == tuple("0123456789")
    assert digits.train_images.dtype == digits.test_images.dtype == torch.uint8
    assert torch.bincount(digits.train_labels).tolist() == [400] * 10
    assert torch.bincount(digits.test_labels).tolist() == [100] * 10
    with np.load(data.PACKAGED) as file:
        everything = sorted(image.tobytes() for image in file["images"])
    parts = torch.cat([digits.train_images, digits.test_images]).numpy()
    assert sorted(image.tobytes() for image in parts) == everything


def test_images_keep_their_labels():
    with np.load(data.PACKAGED) as file:
        label_of = {
            image.tobytes(): label
            for image, label in zip(file["images"], file["labels"], strict=True)
        }
    digits = load(seed=3)
    for images, labels in (
        (digits.train_images, digits.train_labels),
        (digits.test_images, digits.test_labels),
    ):
        pairs = zip(images.numpy(), labels.tolist(), strict=True)
        assert all(label_of[image.tobytes()] == label for image, label in pairs)


def test_the_seed_chooses_the_split():
    assert load(seed=1).checksum() == load(seed=1).checksum() != load(seed=2).checksum()


def test_limit_keeps_a_few_of_each_part():
    few = load(limit=30)
    assert len(few.train_images) == len(few.train_labels) == len(few.test_images) == 30
    assert len(few.classes) == 10  # the network's size does not depend on the limit
    assert few.train_labels.unique().numel() > 5  # not the first 30, which are all zeros
    assert few.checksum() == load(limit=30).checksum()
    assert len(load(limit=2000).test_labels) == 1000


def test_mean_and_std_are_those_of_the_training_pixels():
    digits = load(limit=100)
    pixels = digits.train_images.numpy().astype(np.float64)
    assert digits.mean_std() == pytest.approx((pixels.mean(), pixels.std()), rel=1e-12)


def test_a_damaged_package_says_so(tmp_path, monkeypatch):
    damaged = tmp_path / "mnist5k.npz"
    damaged.write_bytes(data.PACKAGED.read_bytes()[:5000])
    for path in (damaged, tmp_path / "none.npz"):
        monkeypatch.setattr(data, "PACKAGED", path)
        with pytest.raises(DataError, match="reinstall"):
            load()


# --- IDX files ----------------------------------------------------------------------------------

CUBE = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
CUBE_IDX = bytes.fromhex("00000803 00000002 00000002 00000003 000102030405060708090a0b")


@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_idx_is_the_documented_format(tmp_path, name):
    # Against bytes made by hand: a round trip alone would not notice two equal mistakes.
    path = tmp_path / name
    write_idx(path, CUBE)
    raw = path.read_bytes()
    assert (gzip.decompress(raw) if name.endswith("gz") else raw) == CUBE_IDX
    np.testing.assert_array_equal(read_idx(path), CUBE)


@hypothesis.given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=1, max_dims=5, min_side=0)), st.booleans()
)
def test_idx_round_trip(tmp_path_factory, array, zipped):
    path = tmp_path_factory.mktemp("idx") / ("a.gz" if zipped else "a")
    write_idx(path, array)
    got = read_idx(path)
    assert got.dtype == np.uint8 and got.shape == array.shape
    np.testing.assert_array_equal(got, array)


def test_gzip_is_known_by_content(tmp_path):
    (tmp_path / "a").write_bytes(gzip.compress(CUBE_IDX))
    (tmp_path / "b.gz").write_bytes(CUBE_IDX)
    for name in ("a", "b.gz"):
        np.testing.assert_array_equal(read_idx(tmp_path / name), CUBE)


ZIPPED = gzip.compress(CUBE_IDX)
BAD_IDX = {
    "empty": (b"", "not an IDX file"),
    "three bytes": (CUBE_IDX[:3], "not an IDX file"),
    "another magic": (b"\x01" + CUBE_IDX[1:], "not an IDX file: it begins with 01 00 08 03"),
    "no dimensions": (b"\0\0\x08\0", "not an IDX file"),
    "of floats": (b"\0\0\x0d" + CUBE_IDX[3:], "type 0x0d"),
    "half a header": (CUBE_IDX[:10], "header"),
    "a byte short": (CUBE_IDX[:-1], r"should have 28 bytes for \(2, 2, 3\), has 27"),
    "a byte long": (CUBE_IDX + b"\0", "should have 28 bytes.* has 29"),
    "a huge dimension": (CUBE_IDX[:4] + b"\xff" * 12 + CUBE_IDX[16:], "should have 79,"),
    "a web page": (b"<!doctype html><title>404</title>", "not an IDX file"),
    "gzip, cut": (ZIPPED[:-9], "cannot read"),
    "gzip, a wrong byte": (ZIPPED[:20] + bytes([ZIPPED[20] ^ 255]) + ZIPPED[21:], "cannot read"),
    "gzip, a wrong checksum": (
        ZIPPED[:-8] + bytes([ZIPPED[-8] ^ 1]) + ZIPPED[-7:],
        "cannot read",
    ),
    "gzip of nothing": (gzip.compress(b""), "not an IDX file"),
}


@pytest.mark.parametrize("case", BAD_IDX)
def test_a_bad_idx_file_is_one_clear_line(tmp_path, case):
    raw, message = BAD_IDX[case]
    path = tmp_path / "bad"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@hypothesis.given(st.binary(max_size=40), st.sampled_from([b"", b"\0\0\x08", b"\x1f\x8b\x08"]))
@hypothesis.settings(max_examples=200)
def test_no_bytes_raise_anything_but_data_error(tmp_path_factory, raw, begin):
    path = tmp_path_factory.getbasetemp() / "bytes"
    path.write_bytes(begin + raw)
    try:
        read_idx(path)
    except DataError as error:
        assert "\n" not in str(error)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_idx(tmp_path / "none")
    with pytest.raises(DataError, match="directory"):
        read_idx(tmp_path)


@pytest.mark.parametrize("array", [np.zeros(3), np.uint8(3)], ids=["floats", "a scalar"])
def test_write_idx_refuses_what_idx_cannot_hold(tmp_path, array):
    with pytest.raises(ValueError, match="uint8"):
        write_idx(tmp_path / "a", array)


# --- folders ------------------------------------------------------------------------------------

PARTS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
STYLES = {
    "MNIST": "{part}-idx{dims}-ubyte{gz}",
    "with a dot": "{part}.idx{dims}-ubyte{gz}",
    "with two dots": "{part}-idx{dims}.ubyte{gz}",
    "EMNIST": "emnist-letters-{part}-idx{dims}-ubyte{gz}",
}


def arrays(classes=3, seed=0):
    """The four arrays of a small set; rows and columns differ, so that a transpose shows."""
    rng = np.random.default_rng(seed)
    made = {}
    for part, count in (("train", 12), ("t10k", 6)):
        made[f"{part}-images"] = rng.integers(0, 256, (count, 11, 11), dtype=np.uint8)
        made[f"{part}-labels"] = (np.arange(count) % classes).astype(np.uint8)
    return made


def write_folder(folder, made, style="MNIST", gz=".gz"):
    folder.mkdir(exist_ok=True)
    for part, array in made.items():
        name = STYLES[style].format(part=part, dims=3 if "images" in part else 1, gz=gz)
        if style == "EMNIST":
            name = name.replace("t10k", "test")
        write_idx(folder / name, array)
    return folder


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("style", STYLES)
def test_a_folder_is_read_whatever_the_names(tmp_path, style, gz):
    made = arrays()
    dataset = load(str(write_folder(tmp_path / "set", made, style, gz)))
    turn = (0, 2, 1) if style == "EMNIST" else (0, 1, 2)  # EMNIST is stored transposed
    np.testing.assert_array_equal(dataset.train_images, made["train-images"].transpose(turn))
    np.testing.assert_array_equal(dataset.test_images, made["t10k-images"].transpose(turn))
    np.testing.assert_array_equal(dataset.train_labels, made["train-labels"])
    np.testing.assert_array_equal(dataset.test_labels, made["t10k-labels"])
    assert dataset.classes == ("0", "1", "2") and dataset.shape == (1, 11, 11)


def test_a_file_and_its_gz_are_one(tmp_path):
    folder = write_folder(tmp_path / "set", arrays(seed=0), gz="")
    write_folder(folder, arrays(seed=1), gz=".gz")
    np.testing.assert_array_equal(load(str(folder)).train_images, arrays()["train-images"])


def test_a_folder_of_several_sets_asks_which(tmp_path):
    folder = write_folder(tmp_path / "emnist", arrays(), "EMNIST")
    for path in list(folder.iterdir()):
        path.with_name(path.name.replace("letters", "digits")).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="choose one: .*emnist-digits, .*emnist-letters"):
        load(str(folder))
    assert len(load(str(folder / "emnist-digits")).train_labels) == 12
    with pytest.raises(DataError, match="no data set or folder .*emnist-balanced"):
        load(str(folder / "emnist-balanced"))


def test_class_names_come_from_emnists_mapping(tmp_path):
    folder = write_folder(tmp_path / "emnist", arrays(), "EMNIST")
    mapping = folder / "emnist-letters-mapping.txt"
    mapping.write_text("1 65 97\n2 66 98\n")  # of the letters: there is no class 0
    assert load(str(folder)).classes == ("0", "A", "B")
    for text in ("1 A\n", "1\n", "1 99999999999\n", ""):
        mapping.write_text(text)
        with pytest.raises(DataError, match="mapping"):
            load(str(folder))
    mapping.write_text("0 65\n1 66\n")
    with pytest.raises(DataError, match="2 class names, but labels up to 2"):
        load(str(folder))


def one_changed(part, change):
    made = arrays()
    made[part] = change(made[part])
    return made


BAD_FOLDERS = {
    "a label too few": (one_changed("train-labels", lambda x: x[:-1]), "12 images, .* 11 labels"),
    "an image too few": (one_changed("t10k-images", lambda x: x[:-1]), "5 images, .* 6 labels"),
    "other sizes": (one_changed("t10k-images", lambda x: x[:, :9]), r"\(11, 11\).*\(9, 11\)"),
    "flat images": (one_changed("train-images", lambda x: x.reshape(12, -1)), "2 dimensions"),
    "labels of images": (one_changed("train-labels", lambda x: x[:, None]), "2 dimensions"),
    "no images": (one_changed("train-images", lambda x: x[:0]), "no images"),
    "no pixels": (one_changed("train-images", lambda x: x[:, :0]), "no images"),
    "one class": (arrays(classes=1), "one class"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_files_that_do_not_belong_together_are_one_clear_line(tmp_path, case):
    made, message = BAD_FOLDERS[case]
    with pytest.raises(DataError, match=message) as error:
        load(str(write_folder(tmp_path / "set", made)))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    folder = write_folder(tmp_path / "set", arrays())
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="lacks the file of the test labels; it has t10k-images"):
        load(str(folder))


def test_a_folder_without_data_and_no_folder_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="holds no MNIST-format files"):
        load(str(tmp_path))
    for name in (str(tmp_path / "none"), str(tmp_path / "none" / "none"), "minst"):
        with pytest.raises(DataError, match="no data set or folder .*; known by name") as error:
            load(name)
        assert name in str(error.value)


# --- downloads ----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A small "mnist" on a web server of this machine, in place of the real one."""
    folder = write_folder(tmp_path / "www", arrays(classes=3))
    md5 = tuple(hashlib.md5((folder / file).read_bytes()).hexdigest() for file in data._FILES)
    requested = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, _, request, *rest):
            requested.append(request)

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}/"
        monkeypatch.setitem(data.DOWNLOADS, "mnist", (address, md5))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield folder, requested
        running.shutdown()


def test_a_download_is_kept_and_not_repeated(tmp_path, server, capsys):
    first = load("mnist", tmp_path / "cache")
    np.testing.assert_array_equal(first.train_images, arrays()["train-images"])
    assert first.classes == tuple("0123456789")
    assert len(server[1]) == 4 and "downloading http://127" in capsys.readouterr().err
    assert load("mnist", tmp_path / "cache").checksum() == first.checksum()
    assert len(server[1]) == 4 and capsys.readouterr().err == ""


def test_a_damaged_download_is_replaced(tmp_path, server):
    load("mnist", tmp_path / "cache")
    (tmp_path / "cache" / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(b"torn")
    np.testing.assert_array_equal(
        load("mnist", tmp_path / "cache").test_images, arrays()["t10k-images"]
    )
    assert len(server[1]) == 5


def test_a_wrong_checksum_is_refused_and_not_kept(tmp_path, server):
    (server[0] / "train-labels-idx1-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match="is not the file it should be") as error:
        load("mnist", tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache" / "mnist" / "train-labels-idx1-ubyte.gz").exists()


def test_a_file_that_is_not_there_any_more(tmp_path, server):
    (server[0] / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="cannot download .*train-labels.* .HTTPError"):
        load("mnist", tmp_path / "cache")


@pytest.mark.parametrize("name", list(data.DOWNLOADS))
@pytest.mark.parametrize("error", [requests.ConnectionError, requests.Timeout])
def test_no_network_is_one_clear_line(tmp_path, monkeypatch, name, error):
    def get(*_, **__):
        raise error("HTTPSConnectionPool(host=...): a very long story")

    monkeypatch.setattr(requests, "get", get)
    with pytest.raises(DataError, match="is there a network.*--dataset mnist5k") as raised:
        load(name, tmp_path)
    message = str(raised.value)
    assert "\n" not in message and data.DOWNLOADS[name][0] in message and str(tmp_path) in message


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write to .*file"):
        load("mnist", tmp_path / "file")


def test_data_dir_is_refused_where_nothing_is_downloaded(tmp_path):
    with pytest.raises(DataError, match="--dataset FOLDER"):
        load("mnist5k", tmp_path)


# --- batches ------------------------------------------------------------------------------------


def epoch_of(count=10, size=4, **options):
    """All batches of an epoch over images that are constant: image n is full of n + 1."""
    images = torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None].expand(-1, 5, 6)
    options = {"seed": 0, "epoch": 1, **options}
    return list(batches(images.contiguous(), torch.arange(count), size, **options))


def test_an_epoch_has_every_image_once_with_its_label():
    made = epoch_of()
    assert [len(labels) for _, labels in made] == [4, 4, 2]  # the last ones are not dropped
    labels = torch.cat([labels for _, labels in made])
    assert labels.sort().values.tolist() == list(range(10)) != labels.tolist()
    images = torch.cat([images for images, _ in made])
    assert images.dtype == torch.uint8
    assert torch.equal(images, (labels + 1)[:, None, None].expand(-1, 5, 6).to(torch.uint8))


def test_order_depends_on_seed_and_epoch_alone():
    def order(**options):
        return torch.cat([labels for _, labels in epoch_of(100, **options)]).tolist()

    torch.manual_seed(1)
    first = order()
    torch.manual_seed(2)
    assert order() == first != order(epoch=2)
    assert order(seed=1) not in (first, order(epoch=2), order(seed=1, epoch=2))
    assert order(shift=2) == first  # augmentation does not change the order


def test_shifts_differ_among_images_and_epochs_but_not_among_runs():
    def pixels(**options):
        return torch.cat([images for images, _ in epoch_of(100, shift=2, **options)])

    assert torch.equal(pixels(), pixels())
    rows_lost = (pixels().amax(2) == 0).sum(1)
    assert rows_lost.unique().tolist() == [0, 1, 2]
    assert not torch.equal(pixels() == 0, pixels(epoch=2) == 0)


def test_a_shift_moves_and_does_not_wrap():
    images = torch.arange(1, 2 * 5 * 4 + 1, dtype=torch.uint8).view(2, 5, 4)
    moves = torch.tensor([[2, -1], [-1, 0]])
    want = torch.zeros_like(images)
    want[0, 2:, :-1] = images[0, :-2, 1:]  # down by 2 and left by 1
    want[1, :-1, :] = images[1, 1:, :]  # up by 1
    assert torch.equal(shift_images(images, moves, 2), want)


@hypothesis.given(st.integers(0, 3), st.data())
def test_a_shift_there_and_back_keeps_what_stayed_inside(limit, draw):
    move = draw.draw(st.tuples(*[st.integers(-limit, limit)] * 2))
    image = torch.zeros(1, 12, 13, dtype=torch.uint8)
    image[0, 4:8, 4:9] = torch.arange(1, 21).view(4, 5)
    moves = torch.tensor([move])
    there = shift_images(image, moves, limit)
    assert torch.equal(shift_images(there, -moves, limit), image)
    assert torch.equal(there, image) == (move == (0, 0))
