"""Networks against a forward pass written out anew and published sizes; checkpoints."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_data import Payload, refuses

import ebm_at
from ebm_at import BadInput, RunError, load_checkpoint, load_model, make_model, save_checkpoint


def small(**options):
    """A network in eval mode with random BatchNorm; a fresh one is almost the identity."""
    model, g = make_model(**{"width": 8} | options), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t in (m.weight, m.running_var, m.bias, m.running_mean):
                    t.copy_(torch.rand(t.shape, generator=g) + (0.5 if t.min() > 0 else -0.5))
    return model.eval()


# Pre-activation ResNet-18 as in Rice et al. 2020 (with a last BatchNorm): 11.17 M. The wide
# ones: Zagoruyko & Komodakis 2016, 36.5 M; Zhang et al. 2019, 46.16 M. small: by hand.
@pytest.mark.parametrize("name, parameters", [
    ("preactresnet18", 11_172_170), ("wrn-28-10", 36_479_194), ("wrn-34-10", 46_160_474),
    ("small", 308_378),
])  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, parameters):
    with torch.device("meta"):  # shapes without memory
        model, other = make_model(name), make_model(name, 7, 1, [0.1], [0.2], 9)
        again = make_model(**other.spec)
    assert sum(p.numel() for p in model.parameters()) == parameters
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (other, again)]
    assert shapes[0] == shapes[1], "its spec does not build it again"


@pytest.mark.parametrize("name, stem_stride", [("small", 2), ("preactresnet18", 1)])
def test_forward_is_a_preactivation_resnet(name, stem_stride):
    """Written out in plain functions of the state_dict, normalisation included."""
    model, x = small(name=name, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4]), torch.rand(2, 3, 16, 16)
    s, found = model.state_dict(), model(x).detach()

    def norm_relu(x, key):
        parts = ("weight", "bias", "running_mean", "running_var")
        scale, shift, mean, var = (s[f"{key}.{part}"].view(1, -1, 1, 1) for part in parts)
        return ((x - mean) / (var + 1e-5).sqrt() * scale + shift).clamp(min=0)

    x = torch.stack([(x[:, c] - (0.4 + 0.1 * c)) / (0.2 + 0.1 * c) for c in range(3)], 1)
    x = F.conv2d(x, s["stem.weight"], stride=stem_stride, padding=1)
    channels = x.shape[1]
    for i in range(sum(1 for key in s if key.endswith("conv1.weight"))):
        key = f"blocks.{i}."
        c_out, c_in = s[key + "conv1.weight"].shape[:2]
        stride = 2 if c_in == channels and c_out == 2 * c_in else 1
        out, skip = norm_relu(x, key + "bn1"), x
        if key + "shortcut.weight" in s:
            skip = F.conv2d(out, s[key + "shortcut.weight"], stride=stride)
        out = F.conv2d(out, s[key + "conv1.weight"], stride=stride, padding=1)
        out = F.conv2d(norm_relu(out, key + "bn2"), s[key + "conv2.weight"], padding=1)
        x, channels = out + skip, c_out
    expected = norm_relu(x, "bn").mean((2, 3)) @ s["head.weight"].T + s["head.bias"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_the_narrowest_network_trains_and_a_narrower_one_is_refused():
    """In a process of its own: below 8, torch's kernel on AVX2 writes outside its memory."""
    with pytest.raises(BadInput, match="width must be at least 8"):
        make_model(width=7)
    script = """import torch, ebm_at
torch.set_num_threads(1)
for n in (2, 7, 64):
    ebm_at.make_model(width=8)(torch.rand(n, 3, 32, 32)).square().sum().backward()"""
    root = Path(ebm_at.__file__).parent
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


def checkpoint_of(model, **extra):
    return {"format": "ebm-at 1", "spec": model.spec, "model": model.state_dict(), **extra}


def refused(path, word=""):
    """load_model stops with a RunError of one line that names the file and says `word`."""
    refuses(RunError, [str(path), word], path, load=load_model)


def test_round_trip_keeps_every_bit(tmp_path):
    model = small(num_classes=3, in_channels=1, mean=[0.3], std=[0.7], width=10)
    path = tmp_path / "model.pt"
    save_checkpoint(str(path), checkpoint_of(model.train(), epoch=5, classes=["a", "b"]))
    loaded, checkpoint = load_model(str(path))
    assert checkpoint["epoch"] == 5 and checkpoint["classes"] == ["a", "b"]
    assert not loaded.training and loaded.spec == model.spec
    before, after, x = model.state_dict(), loaded.state_dict(), torch.rand(2, 1, 16, 16)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(model.eval()(x), loaded(x))
    stored = torch.load(path, weights_only=True)["model"]
    assert all(v.is_contiguous() for v in stored.values()), "safetensors saves no other"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused_unrun(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = checkpoint_of(small(), extra=Payload())
    torch.save(evil, "evil.pt", _use_new_zipfile_serialization=zipped)
    refused("evil.pt", "not loaded")
    assert os.listdir() == ["evil.pt"]
    torch.load("evil.pt", weights_only=False)  # the bait does work
    assert os.path.isdir("ran")


def test_missing_foreign_and_damaged_files_are_refused(tmp_path):
    model, path = small(), tmp_path / "bad.pt"
    save_checkpoint(str(path), checkpoint_of(model))
    blob, weights = path.read_bytes(), model.state_dict()
    refused(tmp_path / "missing.pt", "no checkpoint")
    refused(tmp_path, "no checkpoint")  # a folder
    half = len(blob) // 2
    flipped = blob[:half] + bytes([blob[half] ^ 1]) + blob[half + 1 :]  # of a weight: bit rot
    for content in (b"", b"<html>404</html>", blob[:half], blob[:-1], blob[100:], flipped):
        path.write_bytes(content)
        refused(path)
    for foreign in (weights, {"state_dict": weights}, [1, 2], torch.zeros(3), {"format": "x"}):
        torch.save(foreign, path)
        refused(path, "not a checkpoint of this project")
    zeros = {k: torch.zeros_like(v) for k, v in weights.items()}
    torch.save(checkpoint_of(model) | {"model": zeros}, tmp_path / "whole.pt")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:  # it would fill the memory
        with zipfile.ZipFile(tmp_path / "whole.pt") as whole:
            [packed.writestr(name, whole.read(name)) for name in whole.namelist()]
    refused(path, "not loaded")
    os.mkfifo(tmp_path / "pipe.pt")  # opening it would wait for a writer, for ever
    refused(tmp_path / "pipe.pt", "no regular file")


def test_no_file_gets_more_memory_than_it_holds_or_odd_values_in(tmp_path):
    model, path = small(), tmp_path / "greedy.pt"
    with torch.device("meta"):
        huge = make_model(width=512)
    views = {k: torch.zeros(()).expand(v.shape) for k, v in huge.state_dict().items()}
    nan = model.state_dict() | {"head.bias": torch.full((10,), torch.nan)}
    for odd in (
        {"spec": None}, {"model": {}}, {"spec": model.spec | {"width": 9}},
        {"spec": model.spec | {"name": "smal"}}, {"spec": huge.spec},
        {"spec": model.spec | {"num_classes": 20_000_000}}, {"model": nan},
        {"spec": model.spec | {"in_channels": 10**9}}, {"spec": huge.spec, "model": views},
        {"config": {"eps": "8/255"}}, {"classes": ["a", 2]},
    ):  # fmt: skip
        torch.save(checkpoint_of(model) | odd, path)
        refused(path, "NaN" if odd.get("model") is nan else "")


def test_saving_that_fails_keeps_the_old_file_and_leaves_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(str(path), {"format": "ebm-at 1", "epoch": 1})

    def disk_full(_, target):
        Path(target).write_bytes(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", disk_full)
        with pytest.raises(RunError, match=f"cannot save '{path}'.* older one is kept"):
            save_checkpoint(str(path), {"format": "ebm-at 1", "epoch": 2})
    (tmp_path / "taken.pt").mkdir()
    for target in (tmp_path / "no/such/folder.pt", tmp_path / "taken.pt"):
        with pytest.raises(RunError, match="cannot save"):
            save_checkpoint(str(target), {"epoch": 1})
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "taken.pt"]
    assert load_checkpoint(str(path))["epoch"] == 1
