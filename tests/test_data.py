"""Data: the drawn set, the splits, every file format with its refusals, augmentation."""

import hashlib
import math
import os
import shutil
import struct
import urllib.request
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import ebm_at
from ebm_at import BadInput, RunError, augment, load_data, make_shapes

# Of make_shapes(200, 0), images, then labels: every machine must draw the same bytes.
SHAPES_SHA256 = "1bd3a4cebcc07a6b2ea2fb1eeea7d2ba1be3392b6c28afc9d1c730b0cd7f4e00"


def refuses(error, words, name, *arguments, load=load_data):
    """load_data stops with `error`, on one line that says all of `words`."""
    with pytest.raises(error) as caught:
        load(str(name), *arguments)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def random_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_shapes_have_the_promised_form():
    x, y = make_shapes(1000, 7)
    assert x.shape == (1000, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    assert y.bincount().tolist() == [100] * 10 and not torch.equal(y, y.sort().values)
    assert make_shapes(23, 1)[1].bincount().tolist() == [3] * 3 + [2] * 7
    data = load_data("shapes", limit=200)
    assert data.classes == list(ebm_at.SHAPES) and len(data.x_val) == 550
    images = torch.cat([data.x_train, data.x_val, data.x_test])
    assert len(images.unique(dim=0)) == len(images) == 2750  # test stays apart


def test_shapes_are_the_same_bytes_everywhere():
    x, y = make_shapes(200, 0)
    found = hashlib.sha256(x.numpy().tobytes() + y.numpy().astype("<i8").tobytes()).hexdigest()
    assert found == SHAPES_SHA256 and (make_shapes(200, 1)[0] != x).float().mean() > 0.9


def test_the_grating_has_the_direction_and_period_of_its_class():
    """Its direction is (k % 5) * 36 degrees, 5 or 9 periods cross the picture, at any phase."""
    x, y = make_shapes(1000, 7)
    axis = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    fade = (math.pi * axis).sin()  # towards the borders, or their edges leak into all frequencies
    grey = x.double().mean(1) * torch.outer(fade, fade)
    for k in range(10):
        angle, periods = k % 5 * math.pi / 5, 5 if k < 5 else 9
        wave = axis[None, :] * math.cos(angle) + axis[:, None] * math.sin(angle)
        phase = 2 * math.pi * periods * wave
        answer = torch.hypot(*((grey * f(phase)).sum((1, 2)) for f in (torch.cos, torch.sin)))
        means = torch.stack([answer[y == j].mean() for j in range(10)])
        assert means.argmax() == k and means[k] > 1.5 * means.sort().values[-2]


def numbered(n, size=8, channels=0, seed=0):
    """Random images with their number in the first two pixels, so that splits can be compared."""
    x = random_images(*((n, size, size, channels) if channels else (n, size, size)), seed=seed)
    first = x[..., 0] if channels else x
    first[:, 0, 0], first[:, 0, 1] = np.arange(n) // 256, np.arange(n) % 256
    return x


def numbers(x):
    """The numbers of `numbered` images, from a tensor (N, C, H, W)."""
    return (x[:, 0, 0, 0].int() * 256 + x[:, 0, 0, 1].int()).tolist()


def write_npz(path, n=200, size=8, channels=0, **changes):
    """An .npz with MedMNIST's keys; `changes` replaces an array, or drops it where None."""
    arrays = {"train_labels": np.arange(n) % 4, "test_labels": np.arange(30) % 4}
    arrays |= {"train_images": numbered(n, size, channels)}
    arrays |= {"test_images": numbered(30, size, channels, 1)} | changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
    return str(path)


def test_splits_are_disjoint_stratified_and_whole(tmp_path):
    labels = np.sort(np.random.default_rng(0).choice(5, 400, p=[0.05, 0.1, 0.2, 0.3, 0.35]))
    path = write_npz(tmp_path / "a.npz", 400, train_labels=labels)
    data, again, other = (load_data(path, val_fraction=0.23, seed=seed) for seed in (0, 0, 1))
    train, val = numbers(data.x_train), numbers(data.x_val)
    assert len(val) == 92 and sorted(train + val) == list(range(400))  # nothing lost, or twice
    assert numbers(again.x_val) == val and set(numbers(other.x_val)) != set(val)
    limited = load_data(path, limit=60, val_fraction=0.23)  # leaves the other splits whole
    assert torch.equal(limited.x_val, data.x_val) and torch.equal(limited.x_test, data.x_test)
    some = numbers(limited.x_train)
    assert len(set(some)) == 60 and set(some) <= set(train)
    assert (limited.y_train.diff() != 0).sum() > 20  # the file was sorted by class, this is not
    for rows, y in ((train, data.y_train), (val, data.y_val), (some, limited.y_train)):
        assert y.tolist() == labels[rows].tolist()  # labels stay with their images
        shares = np.bincount(labels) * len(rows) / 400
        assert np.abs(np.bincount(y) - shares).max() <= 1.5


def test_impossible_splits_and_missing_data_are_refused(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    for fraction in (0, 1, 0.001):  # .001 of 200 images rounds to none
        refuses(BadInput, ["val_fraction"], path, "data", 0, fraction)
    for limit in (-5, 3, 181):  # 4 classes; 180 training images are left after validation
        refuses(BadInput, ["limit"], path, "data", limit)
    refuses(RunError, ["no data at"], tmp_path / "nowhere")


@pytest.mark.parametrize("size, channels", [(28, 0), (28, 1), (64, 3)])
def test_npz_in_all_variants(size, channels, tmp_path):
    """MedMNIST's forms: (N, H, W) or (N, H, W, C), labels (N,) or (N, 1); its own val wins."""
    x_val, x_test = (numbered(n, size, channels, seed) for n, seed in ((12, 5), (30, 1)))
    labels = np.arange(30, dtype=np.uint8) % 4 if channels == 1 else np.arange(30)[:, None] % 4
    path = write_npz(tmp_path / "a.npz", 40, size, channels, val_images=x_val,
                     val_labels=labels[:12], test_labels=labels)  # fmt: skip
    data = load_data(path)
    assert data.classes == ["0", "1", "2", "3"] and data.y_test.dtype == torch.int64
    for x, y, images in ((data.x_val, data.y_val, x_val), (data.x_test, data.y_test, x_test)):
        assert x.shape == (len(images), max(channels, 1), size, size) and x.dtype == torch.uint8
        assert np.array_equal(x.permute(0, 2, 3, 1).reshape(images.shape), images)
        assert y.tolist() == labels.flatten()[: len(y)].tolist()


@pytest.mark.parametrize("changes, words", [
    (dict(test_images=None, x_test=numbered(9)), ["lacks test_images", "x_test"]),
    (dict(val_images=numbered(5)), ["lacks", "val_labels"]),
    (dict(train_images=numbered(40) / 255), ["train_images", "uint8", "float64"]),
    (dict(test_images=numbered(30)[:, :, :7]), ["test_images", "(30, 8, 7, 1)"]),
    (dict(train_images=numbered(40) // 128), ["train_images", "no value is above 1"]),
    (dict(test_images=numbered(30, 12)), ["test", "another size"]),
    (dict(train_images=numbered(40)[:0], train_labels=np.zeros(0, int)), ["no images"]),
    (dict(train_labels=np.arange(40) % 4 + 1), ["labels of train", "0..3"]),
    (dict(test_labels=np.full(30, 4)), ["labels of test", "0..3"]),
    (dict(train_labels=np.arange(40) % 4 + 0.0), ["train_labels", "float64"]),
    (dict(train_labels=np.eye(40, 4, dtype=int)), ["train_labels", "(40, 4)"]),  # multi-label
])  # fmt: skip
def test_npz_with_unusable_arrays_is_refused(changes, words, tmp_path):
    path = write_npz(tmp_path / "bad.npz", 40, **changes)
    refuses(BadInput, [path, *words], path)


class Payload:
    """Unpickling it makes the folder `ran`: what a hostile file does, in harmless."""

    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_a_pickle_inside_an_npz_is_refused_unrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_npz("bad.npz", train_labels=np.array([Payload()]))
    refuses(RunError, ["bad.npz"], "bad.npz")
    assert os.listdir() == ["bad.npz"]
    np.load("bad.npz", allow_pickle=True)["train_labels"]  # the bait does work
    assert os.path.isdir("ran")


def test_files_that_are_no_npz_are_refused(tmp_path):
    path = tmp_path / "bad.npz"
    refuses(RunError, ["no file"], path)
    blob = open(write_npz(tmp_path / "good.npz"), "rb").read()
    at = len(blob) // 3
    for content in (b"", b"<html>404</html>", blob[:at], blob[:at] + b"??" + blob[at + 2 :]):
        path.write_bytes(content)
        refuses(RunError, ["bad.npz"], path)


def test_an_npz_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path):
    """A zip that says it unpacks to 4 GB, and an array of 40 GB of which the file holds 1 kB."""
    form = dict(descr="|u1", fortran_order=False, shape=(40_000_000, 32, 32))
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        with archive.open("train_images.npy", "w") as file:
            np.lib.format.write_array_header_1_0(file, form)
            file.write(bytes(1000))
    size, blob = struct.pack("<I", 1128), (tmp_path / "liar.npz").read_bytes()
    (tmp_path / "bomb.npz").write_bytes(blob.replace(size, struct.pack("<I", 2**32 - 2)))
    refuses(RunError, ["bomb.npz", "4.0 GB"], tmp_path / "bomb.npz")
    refuses(RunError, ["liar.npz"], tmp_path / "liar.npz")


@pytest.mark.parametrize("name", ["a.npz", "train/cat/9.png"])
def test_fifos_and_devices_are_refused_unopened(name, tmp_path):
    write_folder(tmp_path)
    path, given = tmp_path / name, tmp_path / "a.npz" if name == "a.npz" else tmp_path
    os.mkfifo(path)  # opening it would wait for a writer, for ever
    refuses(RunError, [path.name], given)
    path.unlink()
    path.symlink_to("/dev/zero")
    refuses(RunError, [path.name], given)


def write_folder(root, splits=("train", "test"), classes=("cat", "dog"), side=(10, 10, 3)):
    """PNG files train/<class>/<i>.png, 6 of each; returns {pixels as bytes: (split, class)}."""
    rng, pixels = np.random.default_rng(0), {}
    for split, name in [(split, name) for split in splits for name in classes]:
        (root / split / name).mkdir(parents=True)
        for i in range(6):
            a = rng.integers(0, 256, side, dtype=np.uint8)
            Image.fromarray(a).save(root / split / name / f"{i}.png")
            pixels[a.tobytes()] = split, name
    return pixels


@pytest.mark.parametrize("colour, val", [(True, ""), (False, "val"), (True, "validation")])
def test_image_folder(colour, val, tmp_path):
    side = (10, 10, 3) if colour else (10, 10)
    pixels = write_folder(tmp_path, ("train", val, "test") if val else ("train", "test"), side=side)
    data = load_data(str(tmp_path), val_fraction=0.25)
    counts = [len(y) for y in (data.y_train, data.y_val, data.y_test)]
    assert counts == ([12, 12, 12] if val else [9, 3, 12]) and data.note == ""
    for split in ("train", "val", "test"):
        x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
        found = [pixels[image.tobytes()] for image in x.permute(0, 2, 3, 1).numpy()]
        source = split if split != "val" else val or "train"
        assert found == [(source, ["cat", "dog"][k]) for k in y]


def test_image_folders_that_cannot_be_used_are_refused(tmp_path):
    train, test, large = dict(splits=["train"]), dict(splits=["test"]), dict(side=(12, 12, 3))
    bird = train | dict(classes=["bird"])
    for i, (error, words, calls) in enumerate((
        (RunError, ["one test/"], [train]),
        (BadInput, ["test", "train/'s classes"], [train, test | dict(classes=["cat", "eel"])]),
        (BadInput, ["bird/0.png' is (12, 12, 3)", "cat/0.png' is (10"], [{}, bird | large]),
        (BadInput, ["bird/0.png' is (10, 10)", "all grey"], [{}, bird | dict(side=(10, 10))]),
        (BadInput, ["another size"], [train, test | large]),
        (BadInput, ["cat/0.png", "10, 12"], [dict(side=(10, 12, 3))]),
        (BadInput, ["class 1 has no", "two classes"], [dict(classes=["photos/cat"])]),
        (RunError, ["one val or valid"], [dict(splits=["train", "test", "val", "validation"])]),
    )):  # fmt: skip
        for options in calls:
            write_folder(tmp_path / str(i), **options)
        refuses(error, [str(tmp_path / str(i)), *words], tmp_path / str(i))
    write_folder(tmp_path / "a")
    (tmp_path / "a/train/eel").mkdir()  # a class without pictures
    refuses(RunError, ["no picture", "train/eel"], tmp_path / "a")


def test_links_are_followed_unless_they_lead_back_and_hidden_files_left_out(tmp_path):
    """Second copies would leak between the splits: Jupyter's .ipynb_checkpoints holds such."""
    write_folder(tmp_path / "real", classes=("cat/images", "dog/images"))
    shutil.copytree(tmp_path / "real/train/dog", tmp_path / "real/train/cat/.ipynb_checkpoints")
    (tmp_path / "real/test/dog/labels.csv").touch()
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / split).symlink_to(tmp_path / "real" / split)
    data = load_data(str(tmp_path / "data"), val_fraction=0.25)
    assert data.classes == ["cat", "dog"] and data.note == "2 hidden or other files left out"
    assert len(data.x_train) + len(data.x_val) == 12
    for target in (".", "../cat", "../../test", "../.."):
        link = tmp_path / "data/train/dog/link"
        link.symlink_to(target)
        refuses(RunError, ["read already"], tmp_path / "data")
        link.unlink()


def test_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    drawing = np.zeros((8, 8, 4), np.uint8)
    drawing[2:4, 5:, 3] = 255  # black on black, visible by its transparency alone
    turned = Image.Exif()
    turned[274] = 6  # "turn by 90 degrees, clockwise"
    clear, grey = Image.fromarray(drawing), Image.fromarray(255 - drawing[:, :, 3])
    colour = grey.convert("RGB")
    for i, (image, options, expected) in enumerate((
        (clear, {}, colour), (clear.convert("LA"), {}, grey), (clear.quantize(), {}, colour),
        (Image.fromarray(drawing[:, :, 3]), dict(transparency=0), Image.new("L", (8, 8), "white")),
        (grey.convert("1"), {}, grey), (grey, dict(exif=turned), grey.rotate(-90)),
        (colour, dict(exif=turned), colour.rotate(-90)),
    )):  # fmt: skip
        image.save(tmp_path / f"{i}.png", **options)
        found = ebm_at.read_picture(str(tmp_path / f"{i}.png"))
        assert np.array_equal(found, np.asarray(expected)), i


def test_pictures_that_cannot_be_used_are_refused_by_name(tmp_path, recwarn):
    """Pillow raises OSError for some damage, SyntaxError for other, and only warns of a bomb."""
    path, faulty = tmp_path / "1.png", []
    for mode, side in (("I;16", 8), ("1", 10_000), ("L", 8)):
        Image.new(mode, (side, side)).save(path)
        faulty.append(path.read_bytes())
    blob = faulty.pop()
    faulty += [blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :] for at in (0, 11, 16, 30)]
    for content in (b"", b"<html>404</html>", blob[:45], *faulty):
        path.write_bytes(content)
        with pytest.raises(RunError, match="1.png' cannot be used"):
            ebm_at.read_picture(str(path))
    assert not recwarn.list


def test_mnist_from_files_on_disk(tmp_path):
    """torchvision's own reader on hand-made idx files: grey images, one channel."""
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 40), ("t10k", 10)):
        x, y = random_images(n, 28, 28), (np.arange(n) % 10).astype(np.uint8)
        for file, magic, a in (("images-idx3", 0x803, x), ("labels-idx1", 0x801, y)):
            header = struct.pack(f">I{a.ndim}I", magic, *a.shape)
            (raw / f"{prefix}-{file}-ubyte").write_bytes(header + a.tobytes())
    data = load_data("fashion-mnist", str(tmp_path), val_fraction=0.25)
    assert np.array_equal(data.x_test.numpy()[:, 0], x) and data.y_test.tolist() == y.tolist()
    assert data.x_train.shape == (30, 1, 28, 28) and len(data.classes) == 10


def test_cifar_as_torchvision_hands_it_over(tmp_path, monkeypatch):
    """CIFAR's archives are checked by md5, so here the class that reads them is replaced."""
    x, y = random_images(40, 32, 32, 3), [i % 4 for i in range(40)]
    made = SimpleNamespace(data=x, targets=y, classes=["a", "b", "c", "d"])
    monkeypatch.setattr(ebm_at.import_torchvision().datasets, "CIFAR10", lambda *_, **__: made)
    data = load_data("cifar10", str(tmp_path))
    assert data.classes == made.classes and data.y_test.tolist() == y
    assert np.array_equal(data.x_test.permute(0, 2, 3, 1), x)


def test_a_host_that_is_down_is_answered_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", None)
    files = ["cifar-100-python.tar.gz", "folder cifar-100-python", "--data-dir"]
    refuses(RunError, ["cifar100", str(tmp_path / "data"), *files], "cifar100", tmp_path / "data")


@pytest.mark.parametrize("how", ["crop", "crop-flip"])
def test_augmented_images_are_windows_of_the_padded_ones(how):
    """Height and width differ, so that a mix-up of rows and columns cannot pass."""
    x = torch.from_numpy(random_images(120, 3, 18, 16))  # an eighth of the shorter side is 2
    before, state = x.clone(), torch.get_rng_state()
    out = augment(x, how, torch.Generator().manual_seed(1))
    assert out.shape == x.shape and out.dtype == torch.uint8 and torch.equal(x, before)
    padded, found = np.pad(x, ((0, 0), (0, 0), (2, 2), (2, 2))), []
    for image, wanted in zip(padded, out.numpy()):
        places = [(r, c, flip) for r in range(5) for c in range(5) for flip in (0, 1)
                  if np.array_equal(image[:, r : r + 18, c : c + 16][..., :: 1 - 2 * flip], wanted)]
        assert len(places) == 1
        found += places
    rows, columns, flipped = draws = np.array(found).T
    assert set(rows) == set(columns) == set(range(5))
    assert 0.3 < flipped.mean() < 0.7 if how == "crop-flip" else not any(flipped)
    draws = draws[: 3 if how == "crop-flip" else 2]
    assert np.abs(np.corrcoef(draws) - np.eye(len(draws))).max() < 0.4  # drawn independently
    assert torch.equal(augment(x, "none"), x) and torch.equal(torch.get_rng_state(), state)
