"""Data: the drawn set, the splits, every file format with its refusals, augmentation."""

import builtins
import gzip
import hashlib
import math
import os
import shutil
import struct
import sys
import urllib.error
import urllib.request
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ebm_at
from ebm_at import SHAPES, BadInput, RunError, augment, load_data, make_shapes

# The bytes of make_shapes(200, 0): images, then labels. Any change of the drawing changes it; the
# same drawing must give the same bytes on every machine, or no number could be repeated.
SHAPES_SHA256 = "1bd3a4cebcc07a6b2ea2fb1eeea7d2ba1be3392b6c28afc9d1c730b0cd7f4e00"
# The grating of class k: its direction is (k % 5) * 36 degrees, its periods across the picture
GRATING_PERIODS = [5] * 5 + [9] * 5


@pytest.fixture(scope="module")
def shapes():
    return make_shapes(1000, 7)


# -------------------------------------------------------------------------------------- shapes


def test_shapes_have_the_promised_form(shapes):
    x, y = shapes
    assert x.shape == (1000, 3, 32, 32) and x.dtype == torch.uint8
    assert y.shape == (1000,) and y.dtype == torch.int64
    assert y.bincount(minlength=10).tolist() == [100] * 10
    assert make_shapes(23, 1)[1].bincount(minlength=10).tolist() == [3] * 3 + [2] * 7
    assert not torch.equal(y, y.sort().values)  # shuffled
    assert x.float().std((1, 2, 3)).min() > 2  # no blank picture
    saturated = ((x == 0) | (x == 255)).float().mean()
    assert saturated < 0.2  # clamping to [0, 1] is the exception


def test_shapes_repeat_by_seed_and_differ_between_seeds():
    x, y = make_shapes(50, 3)
    x2, y2 = make_shapes(50, 3)
    assert torch.equal(x, x2) and torch.equal(y, y2)
    x3, y3 = make_shapes(50, 4)
    assert not torch.equal(y, y3)
    assert (x != x3).float().mean() > 0.9
    state = torch.get_rng_state()
    np.random.seed(0)
    make_shapes(20, 0)
    assert torch.equal(torch.get_rng_state(), state)
    after = np.random.random()
    np.random.seed(0)
    assert np.random.random() == after  # the global generators are not used


def test_shapes_are_the_same_bytes_everywhere():
    x, y = make_shapes(200, 0)
    found = hashlib.sha256(x.numpy().tobytes() + y.numpy().astype("<i8").tobytes()).hexdigest()
    assert found == SHAPES_SHA256


def test_the_grating_has_the_direction_and_period_of_its_class(shapes):
    """Correlates all images with gratings of 5 directions and 3 to 12 periods, at free phase.

    Shapes have power at these frequencies too, hence the excess of a class over all the others: it
    must be largest at the class's own direction and period.
    """
    x, y = shapes
    axis = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    fade = (math.pi * axis).sin()  # towards the borders, or their edges leak into all frequencies
    grey = x.double().mean(1) * torch.outer(fade, fade)
    answers = torch.empty(len(x), 5, 13, dtype=torch.float64).fill_(-math.inf)
    for turn in range(5):
        angle = turn * math.pi / 5
        wave = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
        for periods in range(3, 13):
            phase = 2 * math.pi * periods * wave
            even, odd = ((grey * f(phase)).sum((1, 2)) for f in (torch.cos, torch.sin))
            answers[:, turn, periods] = torch.hypot(even, odd)
    for k in range(10):
        excess = (answers[y == k].mean(0) - answers[y != k].mean(0)).nan_to_num(-math.inf)
        assert divmod(excess.argmax().item(), 13) == (k % 5, GRATING_PERIODS[k])


def test_areas_of_the_shapes():
    """The distance functions by the areas they enclose, against geometry on paper."""
    half = 600
    axis = (torch.arange(2 * half, dtype=torch.float64) + 0.5) / half - 1
    u, v = axis[None, :] * 1.2, axis[:, None] * 1.2
    # a lens of two circles, radii 1 and .8, centres .45 apart: what the crescent lacks
    d, a, b = 0.45, 1.0, 0.8
    cos_a, cos_b = (d * d + a * a - b * b) / (2 * d * a), (d * d + b * b - a * a) / (2 * d * b)
    kite = math.sqrt((a + b + d) * (a + b - d) * (d + a - b) * (d + b - a)) / 2
    lens = a * a * math.acos(cos_a) + b * b * math.acos(cos_b) - kite
    expected = {
        "disc": math.pi * 0.9**2,
        "ring": math.pi * (0.97**2 - 0.53**2),
        "square": 1.6**2,
        "triangle": 3 * math.sqrt(3) * 0.55**2,
        "plus": 2 * 2 * 0.6 - 0.6**2,
        "star": 10 * 0.5 * 1.1 * 0.45 * math.sin(math.pi / 5),
        "crescent": math.pi - lens,
        "bars": 2 * 0.5 * 1.8,
        "frame": 1.76**2 - 1.04**2,
        "H": 2 * 0.4 * 1.8 + 0.9 * 0.4,
    }
    assert list(expected) == list(SHAPES)
    for name, area in expected.items():
        inside = SHAPES[name](u.expand(2 * half, -1), v.expand(-1, 2 * half)) < 0
        found = inside.double().mean().item() * 2.4**2
        assert found == pytest.approx(area, rel=0.01), name


def test_shapes_as_data():
    data = load_data("shapes", limit=200, val_fraction=0.1)
    assert data.classes == list(SHAPES) and data.name == "shapes"
    assert len(data.x_train) == 200 and len(data.x_test) == 2000
    assert len(data.x_val) == ebm_at.SHAPES_TRAIN // 10
    seen = {image.numpy().tobytes() for image in torch.cat([data.x_train, data.x_val])}
    assert not any(image.numpy().tobytes() in seen for image in data.x_test)


# ------------------------------------------------------------------------------ splits and .npz


def numbered(n, size=8, channels=0, seed=0):
    """Random images with their number in the first two pixels, so that splits can be compared."""
    shape = (n, size, size, channels) if channels else (n, size, size)
    x = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    first = x[..., 0] if channels else x
    first[:, 0, 0], first[:, 0, 1] = np.arange(n) // 256, np.arange(n) % 256
    return x


def numbers(x):
    """The numbers of `numbered` images, from a tensor (N, C, H, W)."""
    return (x[:, 0, 0, 0].int() * 256 + x[:, 0, 0, 1].int()).tolist()


def write_npz(path, n=200, n_test=30, size=8, channels=0, labels=None, **changes):
    """An .npz with MedMNIST's keys; `changes` replaces an array, or drops it where None."""
    labels = np.arange(n) % 4 if labels is None else labels
    arrays = {
        "train_images": numbered(n, size, channels), "train_labels": labels,
        "test_images": numbered(n_test, size, channels, 1), "test_labels": np.arange(n_test) % 4,
        **changes,
    }  # fmt: skip
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return str(path)


@pytest.mark.parametrize("seed", range(4))
def test_splits_are_disjoint_stratified_and_whole(seed, tmp_path):
    rng = np.random.default_rng(seed)
    n, classes = int(rng.integers(150, 700)), int(rng.integers(2, 8))
    fraction = float(rng.uniform(0.05, 0.5))
    share = rng.dirichlet(np.ones(classes))  # unbalanced on purpose
    labels = np.concatenate([np.arange(classes), rng.choice(classes, n - classes, p=share)])
    path = write_npz(tmp_path / "a.npz", n, labels=labels, test_labels=np.zeros(30, int))
    data = load_data(path, val_fraction=fraction, seed=seed)
    train, val = numbers(data.x_train), numbers(data.x_val)
    assert len(val) == round(n * fraction)
    assert sorted(train + val) == list(range(n))  # disjoint, nothing lost, nothing twice
    assert data.y_train.tolist() == labels[train].tolist()  # labels stay with their images
    assert data.y_val.tolist() == labels[val].tolist()
    for k in range(classes):
        assert abs((labels[val] == k).sum() - fraction * (labels == k).sum()) <= 1.5
    assert numbers(data.x_test) == list(range(30))  # order and content of test stay


@pytest.mark.parametrize("seed", range(4))
def test_limit_is_stratified_and_leaves_val_and_test_whole(seed, tmp_path):
    rng = np.random.default_rng(seed)
    labels = np.sort(rng.choice(4, 300, p=[0.1, 0.2, 0.3, 0.4]))  # sorted files exist in the wild
    path = write_npz(tmp_path / "a.npz", 300, labels=labels)
    full, limited = load_data(path, seed=seed), load_data(path, limit=60, seed=seed)
    for key in ("x_val", "y_val", "x_test", "y_test"):
        assert torch.equal(getattr(full, key), getattr(limited, key))
    kept = numbers(limited.x_train)
    assert len(set(kept)) == 60 and set(kept) <= set(numbers(full.x_train))
    assert limited.y_train.tolist() == labels[kept].tolist()
    shares = 60 * full.y_train.bincount() / len(full.y_train)
    assert (limited.y_train.bincount() - shares).abs().max() <= 1
    # `limit` also orders the images, so no batch of a small set holds one class only
    assert (limited.y_train.diff() != 0).sum() > 20


def test_splits_follow_the_seed(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    a, b, c = (numbers(load_data(path, limit=50, seed=s).x_train) for s in (0, 0, 1))
    assert a == b and set(a) != set(c)
    va, vc = (set(numbers(load_data(path, seed=s).x_val)) for s in (0, 1))
    assert va != vc


def test_impossible_splits_are_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    for fraction in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(BadInput, match="val_fraction"):
            load_data(path, val_fraction=fraction)
    for limit in (-5, 3, 181):  # 4 classes; 180 training images are left after validation
        with pytest.raises(BadInput, match="limit"):
            load_data(path, limit=limit)
    assert len(load_data(path, limit=180).x_train) == 180


def test_a_validation_split_is_never_silently_empty(tmp_path):
    """Of 4 images a tenth rounds to none; accuracies over none are nan and 'best' meaningless."""
    path = write_npz(tmp_path / "a.npz", 4)
    try:
        data = load_data(path)
    except BadInput:
        return
    assert len(data.x_val) > 0 and len(data.x_train) > 0


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("channels", [0, 1, 3])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("val", [False, True])
def test_npz_in_all_variants(size, channels, column, val, tmp_path):
    """MedMNIST's forms: (N, H, W) or (N, H, W, C), labels (N,) or (N, 1), with or without val."""
    labels = (np.arange(40) % 4).astype(np.uint8)
    own = {}
    if val:
        own = {"val_images": numbered(12, size, channels, 5), "val_labels": labels[:12]}
    if column:
        own = {k: v[:, None] if "labels" in k else v for k, v in own.items()}
        labels = labels[:, None]
    path = write_npz(tmp_path / "a.npz", 40, 30, size, channels, labels, **own)
    data = load_data(path)
    raw = np.load(path)
    count = max(channels, 1)
    for split in ("train", "val", "test"):
        x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
        source = split if split != "val" or val else "train"
        images, truth = raw[f"{source}_images"], raw[f"{source}_labels"].reshape(-1)
        assert x.shape[1:] == (count, size, size) and x.dtype == torch.uint8
        assert y.dtype == torch.int64 and y.shape == (len(x),)
        for i, number in enumerate(numbers(x)):
            expected = images[number].reshape(size, size, count)
            assert all(np.array_equal(x[i, c].numpy(), expected[:, :, c]) for c in range(count))
            assert y[i] == truth[number]
    assert len(data.x_val) == (12 if val else 4)  # the file's own split wins over val_fraction
    assert data.classes == ["0", "1", "2", "3"]


def bad_npz(tmp_path, **changes):
    return write_npz(tmp_path / "bad.npz", 40, 30, **changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(test_images=None, x_test=numbered(9)), ["lacks test_images", "test_labels, x_test"]),
        (dict(test_labels=None), ["test_labels"]),
        (dict(train_images=None), ["train_images"]),
        (dict(train_labels=None), ["train_labels"]),
        (dict(val_images=numbered(5)), ["val_labels"]),
        (dict(val_labels=np.zeros(5, int)), ["val_images"]),
        (dict(train_images=numbered(40) / 255), ["train_images", "uint8", "float64"]),
        (dict(train_images=numbered(40).astype(np.int64)), ["uint8", "int64"]),
        (dict(test_images=numbered(30)[:, :, :7]), ["test_images", "(30, 8, 7, 1)"]),
        (dict(train_images=numbered(40, 8, 4)), ["train_images", "(40, 8, 8, 4)"]),
        (dict(train_images=numbered(40).transpose(1, 2, 0)), ["train_images"]),
        (dict(train_images=numbered(40, 4)), ["S >= 8"]),
        (dict(train_images=numbered(40) // 128), ["train_images", "no value is above 1"]),
        (dict(train_images=numbered(40) // 16), ["train_images", "no value is above 15"]),
        (dict(train_labels=np.arange(40) % 4 + 1), ["class 0 has no images", "number labels 0"]),
        (dict(train_labels=np.arange(40) // 39 * 10**12), ["labels of train"]),
        (dict(train_labels=np.zeros(40, int), test_labels=np.zeros(30, int)), ["class 1 has no"]),
        (dict(train_images=numbered(40)[:0], train_labels=np.zeros(0, int)), ["no images"]),
        (dict(train_images=numbered(40).reshape(40, 64)), ["train_images"]),
        (dict(test_images=numbered(30, 12)), ["test", "size"]),
        (dict(test_images=numbered(30, 8, 3)), ["test", "size"]),
        (dict(test_labels=np.full(30, 4)), ["labels of test", "0..3"]),
        (dict(test_labels=np.full(30, -1)), ["labels of test", "0..3"]),
        (dict(train_labels=np.arange(40) % 4 - 1), ["labels of train"]),
        (dict(train_labels=np.arange(40) % 4 + 0.0), ["train_labels", "float64"]),
        (dict(train_labels=np.arange(39) % 4), ["train_labels", "(39,)"]),
        (dict(train_labels=np.eye(40, 4, dtype=int)), ["train_labels", "(40, 4)"]),  # multi-label
    ],
)
def test_npz_with_unusable_arrays_is_refused(changes, words, tmp_path):
    path = bad_npz(tmp_path, **changes)
    with pytest.raises(BadInput) as caught:
        load_data(path)
    for word in [path, *words]:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


class Payload:
    """Unpickling it would create a file: what a hostile .npz does, in harmless."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (builtins.open, (self.target, "w"))


def test_a_pickle_inside_an_npz_is_refused_unrun(tmp_path):
    mark = tmp_path / "ran"
    objects = np.empty(40, dtype=object)
    objects[:] = [Payload(mark)] * 40
    path = bad_npz(tmp_path, train_labels=objects)
    with pytest.raises(RunError, match="bad.npz"):
        load_data(path)
    assert not mark.exists()
    np.load(path, allow_pickle=True)["train_labels"]  # the bait does work
    assert mark.exists()


def test_files_that_are_no_npz_are_refused(tmp_path):
    path = tmp_path / "bad.npz"
    with pytest.raises(RunError, match="no file"):
        load_data(str(path))
    blob = open(write_npz(tmp_path / "good.npz"), "rb").read()
    broken = bytearray(blob)
    broken[len(blob) // 3] ^= 255
    alone = tmp_path / "alone.npy"
    np.save(alone, numbered(5))
    for content in (
        b"",
        b"<!DOCTYPE html><html>404</html>",
        blob[: len(blob) // 2],  # an interrupted download
        bytes(broken),  # a damaged copy
        alone.read_bytes(),
    ):
        path.write_bytes(content)
        with pytest.raises(RunError, match="bad.npz"):
            load_data(str(path))


def test_an_npz_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path):
    """A zip that says it unpacks to 4 GB, and an array of 40 GB of which the file holds 1 kB."""
    form = dict(descr="|u1", fortran_order=False, shape=(40_000_000, 32, 32))
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        with archive.open("train_images.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, form)
            file.write(bytes(1000))
    size, blob = struct.pack("<I", 1128), (tmp_path / "liar.npz").read_bytes()
    assert size in blob
    (tmp_path / "bomb.npz").write_bytes(blob.replace(size, struct.pack("<I", 2**32 - 2)))
    for name, words in (("bomb", "4.0 GB"), ("liar", "")):
        with pytest.raises(RunError, match=f"{name}.npz.*{words}"):
            load_data(str(tmp_path / f"{name}.npz"))


def test_keys_of_an_archive_that_are_no_arrays_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for key in ("train_images", "train_labels", "test_images", "test_labels"):
            archive.writestr(key, "text")
    with pytest.raises(BadInput, match="uint8"):
        load_data(str(tmp_path / "a.npz"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="FIFOs")
def test_fifos_and_devices_are_refused_unopened(tmp_path):
    write_folder(tmp_path / "a")
    for path in (tmp_path / "a.npz", tmp_path / "a/train/cat/9.png"):
        os.mkfifo(path)  # opening it would wait for a writer, for ever
        with pytest.raises(RunError, match=path.name):
            load_data(str(tmp_path / "a") + path.suffix.removesuffix(".png"))
        path.unlink()
        path.symlink_to("/dev/zero")
        with pytest.raises(RunError, match=path.name):
            load_data(str(tmp_path / "a") + path.suffix.removesuffix(".png"))


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(BadInput, match="did you mean 'cifar10'"):
        load_data("cifar-10")
    with pytest.raises(RunError, match="no data at"):
        load_data(str(tmp_path / "nowhere"))


def test_data_to_keeps_values_and_lays_images_channels_last(tmp_path):
    data = load_data(write_npz(tmp_path / "a.npz", channels=3))
    moved = data.to("cpu")
    for split in ("train", "val", "test"):
        x = getattr(moved, f"x_{split}")
        assert torch.equal(x, getattr(data, f"x_{split}"))
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(getattr(moved, f"y_{split}"), getattr(data, f"y_{split}"))
    assert moved.classes == data.classes and moved.name == data.name


# -------------------------------------------------------------------------------- image folders


def write_folder(
    root, splits=("train", "test"), classes=("cat", "dog"), n=6, size=(10, 10), mode="RGB"
):
    """PNG files train/<class>/<i>.png; the pixels are returned, {(split, class, i): array}."""
    from PIL import Image

    rng, pixels = np.random.default_rng(0), {}
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                shape = size if mode == "L" else (*size, 3)
                pixels[split, name, i] = a = rng.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(a, mode).save(root / split / name / f"{i}.png")
    return pixels


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Image.fromarray's mode
@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 1)])
@pytest.mark.parametrize("val", ["", "val", "valid", "validation"])
def test_image_folder(mode, channels, val, tmp_path):
    splits = ("train", val, "test") if val else ("train", "test")
    pixels = write_folder(tmp_path, splits, mode=mode)
    data = load_data(str(tmp_path), val_fraction=0.25)
    assert data.classes == ["cat", "dog"]
    assert len(data.x_val) == (12 if val else 3) and len(data.x_test) == 12
    assert len(data.x_train) == (12 if val else 9)
    for split in ("train", "val", "test"):
        x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
        assert x.shape[1:] == (channels, 10, 10) and x.dtype == torch.uint8
        source = split if split != "val" else val or "train"
        known = {}
        for (s, name, _), a in pixels.items():
            if s == source:
                a = a.reshape(10, 10, channels)
                known[a.transpose(2, 0, 1).tobytes()] = data.classes.index(name)
        assert [known[image.numpy().tobytes()] for image in x] == y.tolist()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_image_folders_that_cannot_be_used_are_refused(tmp_path):
    roots = (tmp_path / str(i) for i in range(99))  # names that lend the messages no word

    def refuse(error, *words):
        with pytest.raises(error) as caught:
            load_data(str(root))
        for word in (str(root), *words):
            assert word in str(caught.value)

    root = next(roots)
    write_folder(root, ("train",))
    refuse(RunError, "one test/")
    root = next(roots)
    root.mkdir()
    refuse(RunError, "one train/")
    root = next(roots)
    write_folder(root, ("train",))
    write_folder(root, ("test",), ("cat", "horse"))
    refuse(BadInput, "test", "train/'s classes")
    root = next(roots)  # a class without images
    write_folder(root)
    (root / "train" / "eel").mkdir()
    refuse(RunError, "eel")
    root = next(roots)  # two sizes in one split
    write_folder(root)
    write_folder(root, ("train",), ("bird",), size=(12, 12))
    refuse(BadInput, "bird/0.png' is (12, 12, 3)", "cat/0.png' is (10, 10, 3)", "one size")
    root = next(roots)  # each split has its own size
    write_folder(root, ("train",))
    write_folder(root, ("test",), size=(12, 12))
    refuse(BadInput, "test/cat/0.png", "train/cat/0.png", "one size")
    root = next(roots)  # not square
    write_folder(root, size=(10, 12))
    refuse(BadInput, "cat/0.png", "10, 12")
    root = next(roots)  # grey among colour
    write_folder(root)
    write_folder(root, ("train",), ("bird",), mode="L")
    refuse(BadInput, "bird/0.png' is (10, 10)", "cat/0.png", "all grey or all in colour")
    root = next(roots)  # one folder too deep
    write_folder(root, classes=("photos/cat", "photos/dog"))
    refuse(BadInput, "class 1 has no images", "two train/<class>/")
    root = next(roots)  # a picture beside the classes
    write_folder(root)
    shutil.copy(root / "train/cat/0.png", root / "train")
    refuse(BadInput, "train", "no class")
    root = next(roots)  # which is it?
    write_folder(root, ("train", "test", "val", "validation"))
    refuse(RunError, "one val or valid or validation/")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_damaged_picture_is_refused_whatever_the_damage(tmp_path):
    """Pillow raises OSError for some damage and SyntaxError for other; a user sees one kind."""
    write_folder(tmp_path, n=5)
    picture = tmp_path / "train" / "cat" / "1.png"
    blob = picture.read_bytes()
    for content in (b"", b"<html>404</html>", blob[:50], blob[: len(blob) // 2]):
        picture.write_bytes(content)
        with pytest.raises(RunError, match="train/cat/1.png' cannot be used"):
            load_data(str(tmp_path))
    for at in range(45):  # signature, header and the length of the data, one flipped bit each
        picture.write_bytes(blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :])
        try:
            load_data(str(tmp_path))
        except (RunError, BadInput) as error:
            assert str(picture) in str(error)


@pytest.mark.parametrize("target", [".", "..", "../cat", "../../test", "../.."])
def test_a_link_back_to_pictures_that_are_read_already_is_refused(target, tmp_path):
    """Followed, it would double them, leak between the splits, or never end."""
    write_folder(tmp_path, n=3)
    (tmp_path / "train/dog/link").symlink_to(target)
    with pytest.raises(RunError, match="read already"):
        load_data(str(tmp_path))


def test_linked_classes_and_folders_inside_classes_are_read(tmp_path):
    write_folder(tmp_path / "real", classes=("cat/images", "dog/images"))
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / split).symlink_to(tmp_path / "real" / split)
    data = load_data(str(tmp_path / "data"))
    assert data.classes == ["cat", "dog"] and len(data.x_test) == 12 and data.note == ""


def test_hidden_and_other_files_are_left_out_and_counted(tmp_path):
    """Jupyter's .ipynb_checkpoints holds second copies: a leak between train and validation."""
    write_folder(tmp_path)
    for folder in (tmp_path / "train", tmp_path / "train/cat"):
        shutil.copytree(tmp_path / "train/dog", folder / ".ipynb_checkpoints")
    (tmp_path / "test/.DS_Store").touch()
    (tmp_path / "test/dog/labels.csv").touch()
    data = load_data(str(tmp_path), val_fraction=0.25)
    assert data.classes == ["cat", "dog"] and len(data.x_train) + len(data.x_val) == 12
    assert data.note == "4 hidden or other files left out"


def test_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    from PIL import Image

    drawing = np.zeros((8, 8, 4), np.uint8)
    drawing[2:4, 5:, 3] = 255  # black on black, visible by its transparency alone
    seen = 255 - drawing[:, :, 3]
    turned = Image.Exif()
    turned[274] = 6  # "turn by 90 degrees, clockwise"
    grey, colour = Image.fromarray(seen), Image.fromarray(seen).convert("RGB")
    for i, (image, options, expected) in enumerate((
        (Image.fromarray(drawing), {}, colour), (Image.fromarray(drawing).convert("LA"), {}, grey),
        (Image.fromarray(drawing[:, :, 3]), dict(transparency=0), Image.new("L", (8, 8), "white")),
        (Image.fromarray(drawing).quantize(), {}, colour), (grey.convert("1"), {}, grey),
        (grey, dict(exif=turned), grey.rotate(-90)), (colour, dict(exif=turned), colour.rotate(-90)),
    )):  # fmt: skip
        image.save(tmp_path / f"{i}.png", **options)
        found = ebm_at._read_picture(str(tmp_path / f"{i}.png"))
        assert np.array_equal(found, np.asarray(expected)), i


def test_pictures_that_8_bits_or_memory_cannot_hold_are_refused_by_name(tmp_path, recwarn):
    from PIL import Image

    pixels = np.full((8, 8), 300)
    for name, image in (
        ("16.png", Image.fromarray(pixels.astype(np.uint16))),
        ("32.tif", Image.fromarray(pixels.astype(np.int32))),
        ("float.tif", Image.fromarray(pixels.astype(np.float32))),
        ("large.png", Image.new("1", (10_000, 10_000))),  # Pillow only warns
        ("bomb.png", Image.new("1", (14_000, 14_000))),
    ):
        image.save(tmp_path / name)
        with pytest.raises(RunError, match=name):
            ebm_at._read_picture(str(tmp_path / name))
    assert not recwarn.list


# ----------------------------------------------------------------------------- torchvision sets


def test_svhn_by_torchvisions_reader(tmp_path, monkeypatch):
    """Pixels in the right order; in the files 10 means 0."""
    scipy_io = pytest.importorskip("scipy.io")
    sets = ebm_at.import_torchvision().datasets
    monkeypatch.setattr(sets.SVHN, "download", lambda self: None)
    monkeypatch.setattr(sets.SVHN, "_check_integrity", lambda self: True)
    rng, made = np.random.default_rng(0), {}
    for split in ("train", "test"):
        x, y = rng.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8), np.arange(20) % 10 + 1
        made[split] = x
        scipy_io.savemat(tmp_path / f"{split}_32x32.mat", {"X": x, "y": y[:, None]})
    data = load_data("svhn", str(tmp_path), val_fraction=0.5)
    assert np.array_equal(data.x_test.numpy(), made["test"].transpose(3, 2, 0, 1))
    assert data.y_test.tolist() == [(i + 1) % 10 for i in range(20)]


def test_svhn_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_: pytest.fail("downloaded in vain"))
    with pytest.raises(RunError, match="pip install scipy"):
        load_data("svhn", str(tmp_path))


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_from_files_on_disk(name, folder, tmp_path):
    """torchvision's own reader on hand-made idx files: grey images, one channel."""
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    rng, made = np.random.default_rng(0), {}
    for prefix, n in (("train", 40), ("t10k", 10)):
        x = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        y = (np.arange(n) % 10).astype(np.uint8)
        made[prefix] = x, y
        for file, magic, a in (("images-idx3", 0x803, x), ("labels-idx1", 0x801, y)):
            blob = struct.pack(f">I{a.ndim}I", magic, *a.shape) + a.tobytes()
            (raw / f"{prefix}-{file}-ubyte").write_bytes(blob)
            (raw / f"{prefix}-{file}-ubyte.gz").write_bytes(gzip.compress(blob))
    data = load_data(name, str(tmp_path), val_fraction=0.25)
    assert np.array_equal(data.x_test.numpy()[:, 0], made["t10k"][0])
    assert data.y_test.tolist() == made["t10k"][1].tolist() and data.y_test.dtype == torch.int64
    assert data.x_train.shape == (30, 1, 28, 28) and data.x_val.shape == (10, 1, 28, 28)
    assert len(data.classes) == 10


def test_cifar_as_torchvision_hands_it_over(tmp_path, monkeypatch):
    """CIFAR's archives are checked by md5, so here the class that reads them is replaced."""
    sets = ebm_at.import_torchvision().datasets
    rng = np.random.default_rng(0)
    made = {n: rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for n in (40, 8)}

    def reader(root, train, download):
        assert root == str(tmp_path) and download
        images = made[40 if train else 8]
        return SimpleNamespace(data=images, targets=[i % 4 for i in range(len(images))],
                               classes=["a", "b", "c", "d"])  # fmt: skip

    monkeypatch.setattr(sets, "CIFAR10", reader)
    data = load_data("cifar10", str(tmp_path))
    assert data.classes == ["a", "b", "c", "d"]
    assert np.array_equal(data.x_test.numpy().transpose(0, 2, 3, 1), made[8])
    assert data.y_test.tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    "name, files",
    [
        ("cifar10", ["cifar-10-python.tar.gz", "cifar-10-batches-py"]),
        ("cifar100", ["cifar-100-python.tar.gz", "cifar-100-python"]),
        ("svhn", ["train_32x32.mat", "test_32x32.mat"]),
        ("mnist", ["MNIST/raw", "-ubyte.gz"]),
        ("fashion-mnist", ["FashionMNIST/raw", "-ubyte.gz"]),
    ],
)
def test_a_host_that_is_down_is_answered_with_what_to_do(name, files, tmp_path, monkeypatch):
    """Data hosts fail often: the message says which files to put where."""

    def down(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", down)
    with pytest.raises(RunError) as caught:
        load_data(name, str(tmp_path / "data"))
    message = str(caught.value)
    for word in [name, str(tmp_path / "data"), "--data-dir", *files]:
        assert word in message
    assert "\n" not in message


def test_the_files_named_in_that_message_are_those_torchvision_looks_for():
    """Else a user would follow the advice and still be told that the set is missing."""
    sets = ebm_at.import_torchvision().datasets
    advice = ebm_at.TORCHVISION_SETS
    for name, kind in (("cifar10", sets.CIFAR10), ("cifar100", sets.CIFAR100)):
        assert kind.filename in advice[name] and kind.base_folder in advice[name]
    for split in ("train", "test"):
        assert sets.SVHN.split_list[split][1] in advice["svhn"]
    for name, kind in (("mnist", sets.MNIST), ("fashion-mnist", sets.FashionMNIST)):
        assert f"{kind.__name__}/raw" in advice[name] and "four files *-ubyte.gz" in advice[name]
        assert [file.endswith("-ubyte.gz") for file, _ in kind.resources] == [True] * 4


# --------------------------------------------------------------------------------- augmentation


def windows_of(image, found):
    """Every (row, column, flipped) at which `found` is a window of `image` padded by 2."""
    c, h, w = image.shape
    padded = np.zeros((c, h + 4, w + 4), image.dtype)
    padded[:, 2:-2, 2:-2] = image
    places = []
    for row in range(5):
        for column in range(5):
            window = padded[:, row : row + h, column : column + w]
            for flipped, candidate in ((False, window), (True, window[:, :, ::-1])):
                if np.array_equal(candidate, found):
                    places.append((row, column, flipped))
    return places


@pytest.mark.parametrize("how", ["crop", "crop-flip"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmented_images_are_windows_of_the_padded_ones(how, dtype, tmp_path):
    """Height and width differ, so that a mix-up of rows and columns cannot pass."""
    n, shape = 120, (3, 18, 16)  # an eighth of the shorter side is 2
    x = torch.randint(1, 256, (n, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    out = augment(x, how, torch.Generator().manual_seed(1))
    assert out.shape == x.shape and out.dtype == dtype
    assert torch.equal(x, before)
    places = [windows_of(a.numpy(), b.numpy()) for a, b in zip(x, out)]
    assert all(len(p) == 1 for p in places)
    rows, columns, flipped = zip(*(p[0] for p in places))
    assert set(rows) == set(columns) == set(range(5))
    if how == "crop":
        assert not any(flipped)  # a mirrored digit is another sign
    else:
        assert 0.3 < np.mean(flipped) < 0.7
    draws = np.array([rows, columns, flipped])[: 3 if how == "crop-flip" else 2]
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.4  # drawn independently


def test_augmentation_follows_its_generator_and_nothing_else():
    x = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
    state = torch.get_rng_state()
    a, b, c = (augment(x, "crop-flip", torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(augment(x, "none"), x)
    # the layout of the input (data on a device lie channels-last) changes nothing
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(last, "crop-flip", torch.Generator().manual_seed(0)), a)


def test_unknown_augmentation_is_refused():
    """A typo such as "crop_flip" must not quietly train without flips."""
    with pytest.raises(BadInput, match="crop-flip"):
        augment(torch.zeros(2, 3, 8, 8), "crop_flip")
