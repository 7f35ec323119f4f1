"""Networks against a forward pass written out anew and published sizes; checkpoints."""

import builtins
import os
import zipfile

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import ebm_at
from ebm_at import (
    MODELS,
    BadInput,
    BatchNorm,
    RunError,
    load_checkpoint,
    load_model,
    make_model,
    save_checkpoint,
)


def randomised(model, seed=0):
    """Random BatchNorm parameters and statistics: fresh ones are almost the identity."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t in (m.weight, m.running_var):
                    t.copy_(torch.rand(t.shape, generator=g) + 0.5)
                for t in (m.bias, m.running_mean):
                    t.copy_(torch.rand(t.shape, generator=g) - 0.5)
    return model.eval()


def images(seed, n=2, channels=3, size=16):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "name, parameters",
    # Pre-activation ResNet-18 as in Rice et al. 2020 (with a last BatchNorm): 11.17 M. The wide
    # ones: Zagoruyko & Komodakis 2016, 36.5 M; Zhang et al. 2019, 46.16 M. small: by hand.
    [
        ("preactresnet18", 11_172_170),
        ("wrn-28-10", 36_479_194),
        ("wrn-34-10", 46_160_474),
        ("small", 308_378),
    ],
)
def test_parameter_counts_are_the_published_ones(name, parameters):
    with torch.device("meta"):  # shapes without memory
        model = make_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("width", [8, 11])
@pytest.mark.parametrize("channels, classes", [(1, 2), (3, 7)])
def test_parameter_count_of_the_small_model(width, channels, classes):
    """Counted from the layout: stages of w, 2w, 4w, 8w channels, one block of two convolutions."""
    count, c_in = 9 * channels * width, width
    for c_out in (width, 2 * width, 4 * width, 8 * width):
        count += 9 * c_in * c_out + 9 * c_out * c_out + 2 * c_in + 2 * c_out
        count += c_in * c_out if c_in != c_out else 0
        c_in = c_out
    count += 2 * c_in + c_in * classes + classes
    model = make_model("small", classes, channels, width=width)
    assert sum(p.numel() for p in model.parameters()) == count


def plain_forward(model, x, stem_stride):
    """The network in plain functions of its state_dict, in eval mode."""
    s = model.state_dict()

    def norm_relu(x, key):
        shape = (1, -1, 1, 1)
        scale, shift, mean, var = (
            s[f"{key}.{part}"].view(shape)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    x = F.conv2d((x - s["mean"]) / s["std"], s["stem.weight"], stride=stem_stride, padding=1)
    channels = x.shape[1]
    for i in range(sum(1 for key in s if key.endswith("conv1.weight"))):
        key = f"blocks.{i}."
        c_in, c_out = s[key + "conv1.weight"].shape[1], s[key + "conv1.weight"].shape[0]
        stride = 2 if c_in == channels and c_out == 2 * c_in else 1
        out = norm_relu(x, key + "bn1")
        skip = x
        if key + "shortcut.weight" in s:
            skip = F.conv2d(out, s[key + "shortcut.weight"], stride=stride)
        out = F.conv2d(out, s[key + "conv1.weight"], stride=stride, padding=1)
        out = F.conv2d(norm_relu(out, key + "bn2"), s[key + "conv2.weight"], padding=1)
        x, channels = out + skip, c_out
    return norm_relu(x, "bn").mean((2, 3)) @ s["head.weight"].T + s["head.bias"]


@pytest.mark.parametrize("name, stem_stride", [("small", 2), ("preactresnet18", 1)])
def test_forward_is_a_preactivation_resnet(name, stem_stride):
    model = randomised(make_model(name, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4], width=8))
    x = images(0)
    with torch.no_grad():
        expected = plain_forward(model, x, stem_stride)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_normalising_inside_equals_normalising_outside():
    mean, std = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
    inside = randomised(make_model("small", mean=mean, std=std, width=8))
    outside = make_model("small", mean=[0.0] * 3, std=[1.0] * 3, width=8)
    outside.load_state_dict(
        {k: v for k, v in inside.state_dict().items() if k not in ("mean", "std")}, strict=False
    )
    outside.eval()
    x = images(1)
    normalised = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(inside(x), outside(normalised))
    assert not torch.allclose(inside(x), outside(x), atol=1e-3)  # it does matter
    default = make_model("small", in_channels=1, width=8)
    assert default.mean.flatten().tolist() == [0.5] and default.std.flatten().tolist() == [0.25]


@pytest.mark.parametrize("size", [28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_and_channels(size, channels):
    """Logits (N, K) at every size, each image's own: its neighbours do not change them."""
    model = randomised(make_model("small", 4, channels, width=8))
    x = images(2, 3, channels, size)
    logits = model(x)
    assert logits.shape == (3, 4)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]), logits[i : i + 1], rtol=1e-4, atol=1e-5)
    # every region of the picture reaches the logits (a wrong stride or padding may lose a border)
    x.requires_grad_(True)
    (g,) = torch.autograd.grad(model(x).square().sum(), x)
    assert (g.abs().amax((0, 1)) > 0).float().mean() > 0.95


def test_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(BadInput, match="did you mean 'preactresnet18'"):
        make_model("preact-resnet18")
    with pytest.raises(BadInput, match="'wrn-28-10'"):
        make_model("wrn28-10")


def compare_with_torch(mine, channels=3):
    """Output, gradients, running statistics against nn.BatchNorm2d; three steps, then eval."""
    theirs = nn.BatchNorm2d(channels)
    theirs.load_state_dict(mine.state_dict())
    for step in range(3):
        x = images(step, 4, channels, 5) * 3 - step
        a, b = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
        weight = images(step + 10, 4, channels, 5)
        out_a, out_b = mine(a), theirs(b)
        torch.testing.assert_close(out_a, out_b)
        (out_a * weight).sum().backward()
        (out_b * weight).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
        for p, q in zip(mine.parameters(), theirs.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
        for (key, p), q in zip(mine.state_dict().items(), theirs.state_dict().values()):
            torch.testing.assert_close(p, q, msg=key)
    assert theirs.num_batches_tracked == 3
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


def test_batchnorm_is_torchs_in_a_single_process():
    compare_with_torch(BatchNorm(3))


def test_batchnorm_of_a_process_group_is_torchs_for_the_global_batch(tmp_path):
    """A group of one takes the distributed path, where mean and variance are hand-written."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        compare_with_torch(BatchNorm(3))
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------- checkpoints


def checkpoint_of(model, **extra):
    return {"format": "ebm-at 1", "spec": model.spec, "model": model.state_dict(), **extra}


def refused(path, *words):
    """load_model stops with a RunError of one line that names the file; returns the message."""
    with pytest.raises(RunError) as caught:
        load_model(str(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("classes, channels, width", [(10, 3, 8), (3, 1, 10)])
def test_round_trip_keeps_every_bit(classes, channels, width, tmp_path):
    mean, std = [0.3] * channels, [0.7] * channels
    model = randomised(make_model("small", classes, channels, mean, std, width))
    path = tmp_path / "model.pt"
    save_checkpoint(str(path), checkpoint_of(model, epoch=5, classes=["a", "b"]))
    model.train()
    loaded, checkpoint = load_model(str(path))
    assert checkpoint["epoch"] == 5 and checkpoint["classes"] == ["a", "b"]
    assert not loaded.training and loaded.spec == model.spec
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    x = images(3, 2, channels)
    assert torch.equal(model.eval()(x), loaded(x))
    assert os.listdir(tmp_path) == ["model.pt"]
    stored = torch.load(path, weights_only=True)["model"]
    assert all(v.is_contiguous() for v in stored.values()), "safetensors saves no other"


class Payload:
    """Unpickling it would create a file: what a hostile checkpoint does, in harmless."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (builtins.open, (self.target, "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_unrun(zipped, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    model = make_model("small", width=8)
    torch.save(
        checkpoint_of(model, extra=Payload(mark)), path, _use_new_zipfile_serialization=zipped
    )
    refused(path, "not loaded")
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the bait does work
    assert mark.exists()


def test_missing_foreign_and_damaged_files_are_refused(tmp_path):
    model = randomised(make_model("small", width=8))
    whole = tmp_path / "whole.pt"
    save_checkpoint(str(whole), checkpoint_of(model))
    blob = whole.read_bytes()
    assert "no checkpoint" in refused(tmp_path / "missing.pt")
    path = tmp_path / "bad.pt"
    for content in (
        b"",
        b"<!DOCTYPE html><html>404</html>",  # a download that was a web page
        blob[: len(blob) // 2],
        blob[:-1],
        blob[100:],
        bytes(1000),
    ):
        path.write_bytes(content)
        refused(path)
    plain = model.state_dict()
    for foreign in (plain, {"state_dict": plain}, [1, 2], torch.zeros(3), {"format": "x"}):
        torch.save(foreign, path)
        refused(path, "not a checkpoint of this project")
    refused(tmp_path)  # a folder


def test_a_checkpoint_of_ours_with_parts_missing_is_refused(tmp_path):
    model, path = make_model("small", width=8), tmp_path / "bad.pt"
    whole = checkpoint_of(model)
    for broken in (
        {k: v for k, v in whole.items() if k != "spec"},
        {k: v for k, v in whole.items() if k != "model"},
        {**whole, "model": {}},
        {**whole, "spec": {**model.spec, "width": 9}},
        {**whole, "spec": {**model.spec, "name": "smal"}},
    ):
        torch.save(broken, path)
        refused(path)


def views(shapes):
    """Tensors of any size over the memory of one number, as a checkpoint can store them."""
    return {k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in shapes.items()}


@pytest.mark.parametrize("what", ["width", "classes", "channels", "views", "config", "names"])
def test_no_file_gets_more_memory_than_it_holds_or_odd_values_in(what, tmp_path):
    model, path = make_model("small", width=8), tmp_path / "greedy.pt"
    whole = checkpoint_of(model)
    with torch.device("meta"):
        huge = make_model("small", width=512)
    odd = {
        "width": {"spec": huge.spec},
        "classes": {"spec": model.spec | {"num_classes": 20_000_000}},
        "channels": {"spec": model.spec | {"in_channels": 10**9}},
        "views": {"spec": huge.spec, "model": views(huge.state_dict())},
        "config": {"config": {"eps": "8/255"}},
        "names": {"classes": ["a", 2]},
    }
    torch.save(whole | odd[what], path)
    refused(path, "not loaded")


def test_packed_files_and_pipes_are_refused(tmp_path):
    save_checkpoint(str(tmp_path / "whole.pt"), checkpoint_of(make_model("small", width=8)))
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
        with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
            for part in whole.infolist():
                packed.writestr(part.filename, b"\0" * 10**6 if "data/" in part.filename
                                else whole.read(part))  # fmt: skip
    refused(tmp_path / "packed.pt", "not loaded")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "not a regular file")


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    model = make_model("small", width=8)
    model.head.bias.data[0] = float("nan")
    save_checkpoint(str(tmp_path / "nan.pt"), checkpoint_of(model))
    refused(tmp_path / "nan.pt", "NaN")


def test_a_flipped_byte_is_never_loaded_as_other_weights(tmp_path):
    """Bit rot and broken copies: either the file is refused or the weights are the saved ones."""
    model = randomised(make_model("small", num_classes=2, width=8))
    path = tmp_path / "model.pt"
    save_checkpoint(str(path), checkpoint_of(model))
    blob, expected = path.read_bytes(), model.state_dict()
    for at in range(0, len(blob), len(blob) // 60):
        damaged = bytearray(blob)
        damaged[at] ^= 0x10
        path.write_bytes(damaged)
        try:
            found, _ = load_model(str(path))
        except RunError:
            continue
        found = found.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in found.items()), f"byte {at}"


def test_saving_that_fails_keeps_the_old_file_and_leaves_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(str(path), {"format": "ebm-at 1", "epoch": 1})
    old = path.read_bytes()

    def disk_full(_, target):
        with open(target, "wb") as file:
            file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ebm_at.torch, "save", disk_full)
    with pytest.raises(RunError, match="cannot save") as caught:
        save_checkpoint(str(path), {"format": "ebm-at 1", "epoch": 2})
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["last.pt"]
    monkeypatch.undo()
    assert load_checkpoint(str(path))["epoch"] == 1


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "taken.pt").mkdir()
    for path in (tmp_path / "no" / "such" / "folder.pt", tmp_path / "taken.pt"):
        with pytest.raises(RunError, match="cannot save"):
            save_checkpoint(str(path), {"epoch": 1})
    assert os.listdir(tmp_path) == ["taken.pt"]


def test_every_model_can_be_rebuilt_from_its_spec():
    for name in MODELS:
        with torch.device("meta"):
            model = make_model(name, 7, 1, [0.1], [0.2], 9)
            again = make_model(**model.spec)
        shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, again)]
        assert shapes[0] == shapes[1]
