"""python cli.py attack: its table and files, models of others, and one clear line per bad input."""

import csv
import hashlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from test_cli import ROOT, call

import ebm_at

SMALL = "--limit 12 --steps 2 --queries 5 --device cpu".split()
STRANGERS = """
import torch, torch.nn as nn
class Net(nn.Module):
    def __init__(self, classes=10, last=None):
        super().__init__()
        self.head, self.last = nn.Linear(3 * 16 * 16, classes), last
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(0))
    def forward(self, x):
        z = self.head(x.reshape(len(x), -1))
        return self.last(z) if self.last else z
def good(): return Net(3)
def few(): return Net(2)
def hundred(): return Net(100)
def one(): return Net(1)
def soft(): return Net(3, lambda z: z.softmax(1))
def nan(): return Net(3, lambda z: z * float("nan"))
def maps(): return Net(3, lambda z: z[:, :, None])
def string(): return "net"
def fails(): raise KeyError("weights")
def needs(argument): return Net()
def picky(): return Net(3, lambda z: 1 / 0)
def frozen(): return Net(3, lambda z: z.detach())
class Late(Net):
    calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls > 12:
            raise ValueError("the licence has run out")
        return super().forward(x)
def late(): return Late(3)
class Hole(Net):
    def forward(self, x):
        off_grid = ((x * 255).round() - x * 255).abs().flatten(1).amax(1) > 1e-3
        return torch.where(off_grid[:, None], float("nan"), super().forward(x))
def hole(): return Hole(3)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data (grey-free 16x16 images, 3 classes), runs/, and files of every bad kind."""
    folder = tmp_path_factory.mktemp("attack")
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 90), ("test", 40)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 16, 16, 3), np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 3).astype(np.uint8)
    np.savez(folder / "mine.npz", **arrays)
    data = ebm_at.load_data(str(folder / "mine.npz"))
    settings = dict(
        model="small", width=8, epochs=1, eps=8 / 255, limit=60, device="cpu", batch_size=20
    )
    config = ebm_at.recipe(str(folder / "mine.npz"), "fgsm", **settings)
    trainer = ebm_at.Trainer(config, data, ebm_at.build_model(config, data))
    (folder / "runs" / "old").mkdir(parents=True)
    (folder / "runs" / "new").mkdir()
    trainer.save(folder / "runs" / "old")
    os.utime(folder / "runs" / "old" / "best.pt", (1, 1))
    trainer.save(folder / "runs" / "new")
    best = folder / "runs" / "new" / "best.pt"
    checkpoint = torch.load(best, weights_only=True)
    torch.save(checkpoint["model"], folder / "state.pt")
    torch.save({f"module.{k}": v for k, v in checkpoint["model"].items()}, folder / "parallel.pt")
    compiled = {f"module._orig_mod.{k}": v for k, v in checkpoint["model"].items()}
    torch.save(compiled, folder / "compiled.pt")
    torch.save({"state_dict": checkpoint["model"], "epoch": 3}, folder / "wrapped.pt")
    torch.save(checkpoint["model"], folder / "ancient.pt", _use_new_zipfile_serialization=False)
    torch.save({"fc.weight": torch.zeros(3, 3)}, folder / "foreign.pt")
    torch.save({"epoch": 3, "format": "other"}, folder / "other.pt")
    (folder / "cut.pt").write_bytes(best.read_bytes()[:5000])
    (folder / "page.pt").write_text("<html>404 not found</html>")
    (folder / "evil.pt").write_bytes(pickle.dumps(os.getcwd))
    wide = checkpoint | {"spec": checkpoint["spec"] | {"width": 16}}
    torch.save(wide, folder / "wide.pt")
    grey = ebm_at.make_model("small", 3, 1, width=8)
    torch.save(checkpoint | {"spec": grey.spec, "model": grey.state_dict()}, folder / "grey.pt")
    two = ebm_at.make_model("small", 2, 3, width=8)
    torch.save(checkpoint | {"spec": two.spec, "model": two.state_dict()}, folder / "two.pt")
    broken = {k: v * math.nan if v.is_floating_point() else v for k, v in two.state_dict().items()}
    torch.save(checkpoint | {"spec": two.spec, "model": broken}, folder / "nan.pt")
    (folder / "strangers.py").write_text(STRANGERS)
    grey = {k: v[..., 0] if v.ndim == 4 else v for k, v in arrays.items()}
    np.savez(folder / "grey.npz", **grey)
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").write_text("keep me")
    return folder


def run(place, monkeypatch, capsys, *arguments):
    monkeypatch.chdir(place)
    sys.modules.pop("strangers", None)
    return call(monkeypatch, capsys, "attack", *arguments)


@pytest.mark.parametrize("suite", [*ebm_at.SUITES, None])
def test_table_csv_and_json_say_the_same(suite, place, monkeypatch, capsys):
    chosen = ["--suite", suite] if suite else ["--attacks", "fgsm, energy-up,square"]
    folder = place / f"out-{suite}"
    code, out, err = run(place, monkeypatch, capsys, *chosen, "--out", folder, "--seed", 3, *SMALL)
    assert (code, err) == (0, "")
    assert "runs/new/best.pt on 12 test images" in out, "the newest run, and it says so"
    told = json.loads((folder / "attack.json").read_text())
    best = (place / "runs/new/best.pt").read_bytes()
    assert told["sha256"] == hashlib.sha256(best).hexdigest()
    for key, value in (("n", 12), ("norm", "linf"), ("steps", 2), ("seed", 3), ("complete", True)):
        assert told[key] == value
    assert told["eps"] == pytest.approx(8 / 255)
    with open(folder / "attack.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = ebm_at.SUITES[suite] if suite else ["fgsm", "energy-up", "square"]
    assert [r["attack"] for r in rows] == ["natural", *names][: len(rows)]
    assert len(rows) == 1 + len(names) or float(rows[-1]["worst"]) == 0
    for row, same in zip(rows, told["rows"]):
        assert row.keys() == same.keys()
        assert float(row["energy"]) == pytest.approx(same["energy"], abs=1e-4)
        assert f"{same['accuracy']:.1%}" in out
    assert told["robust_acc"] == told["rows"][-1]["worst"]
    assert "E(x), natural images" in out and "\x1b" not in out
    for name in names[: len(rows) - 1]:
        assert out.count(f" {name} ") >= 2, "in the table and in the histograms"


def test_everything_can_be_changed_and_saved(place, monkeypatch, capsys):
    more = "--eps 0.5 --norm l2 --split val --batch-size 4 --precision fp32 --quiet".split()
    code, out, _ = run(place, monkeypatch, capsys, "runs/old", "--suite", "quick", *more, *SMALL,
                       "--save", "adv.pt", "--save-png", "pngs")  # fmt: skip
    assert code == 0 and "on 9 val images" not in out and "(l2)" in out
    told = json.loads((place / "runs/old/attack-1/attack.json").read_text())
    assert told["n"] == 9 and told["norm"] == "l2"  # 10% of the 90 training images
    saved = torch.load(place / "adv.pt", weights_only=True)
    assert saved["x_adv"].shape == (9, 3, 16, 16) and saved["x_adv"].dtype == torch.float32
    data = ebm_at.load_data(str(place / "mine.npz"))
    moved = (saved["x_adv"] - data.x_val.float() / 255).flatten(1).norm(dim=1)
    assert moved.max() <= 0.5 + 1e-5 and torch.equal(saved["y"], data.y_val)
    pngs = sorted((place / "pngs").iterdir())
    assert len(pngs) == 9
    from PIL import Image

    image = np.asarray(Image.open(pngs[3])).transpose(2, 0, 1)
    assert np.abs(image / 255 - saved["x_adv"][3].numpy()).max() <= 0.5 / 255 + 1e-6
    assert "as float tensors" in out and "after rounding to 8 bits" in out
    run(place, monkeypatch, capsys, "runs/old", "--suite", "quick", *SMALL)
    assert (place / "runs/old/attack-2/attack.csv").exists(), "the next free folder"


def test_train_split_is_what_the_run_was_trained_on(place, monkeypatch, capsys):
    _, out, _ = run(place, monkeypatch, capsys, "--suite", "quick", "--split", "train", *SMALL[2:])
    assert "on 60 train images" in out


@pytest.mark.parametrize("file", ["state.pt", "parallel.pt", "compiled.pt", "wrapped.pt"])
def test_plain_state_dicts_of_our_networks(file, place, monkeypatch, capsys):
    options = "--dataset mine.npz --eps 8/255 --suite quick --out".split()
    out = f"from-{file}"
    code, _, err = run(place, monkeypatch, capsys, file, *options, out, *SMALL)
    assert (code, err) == (0, "")
    run(place, monkeypatch, capsys, "--suite", "quick", "--out", f"{out}-same", *SMALL)
    rows = [
        json.loads((place / o / "attack.json").read_text())["rows"] for o in (out, f"{out}-same")
    ]
    for a, b in zip(*rows):
        assert a["energy"] == b["energy"] and a["accuracy"] == b["accuracy"]


@pytest.mark.parametrize("name", ["small", "preactresnet18", "wrn-28-10"])
def test_the_kind_of_network_is_told_from_its_weights(name):
    import cli

    with torch.device("meta"):
        state = ebm_at.make_model(name, 7, 1, width=8).state_dict()
    state = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in state.items()}
    spec = cli.model_of(state, "x.pt").spec
    assert (spec["name"], spec["num_classes"], spec["in_channels"]) == (name, 7, 1)


@pytest.mark.parametrize("function", ["good", "hundred", "soft"])
def test_models_of_others(function, place, monkeypatch, capsys):
    options = f"--model-from strangers:{function} --dataset mine.npz --suite standard".split()
    code, out, err = run(place, monkeypatch, capsys, *options, "--eps", "1/255", *SMALL)
    assert (code, err) == (0, "") and f"strangers:{function} on 12" in out
    assert ("WARNING" in out and "softmax" in out) == (function == "soft")
    assert ("has 100 logits" in out and "3 classes" in out) == (function == "hundred")
    assert "strangers" not in " ".join(sys.path)


def test_a_model_without_gradients_is_named(place, monkeypatch, capsys):
    options = "--model-from strangers:frozen --dataset mine.npz --attacks pgd".split()
    code, _, err = run(place, monkeypatch, capsys, *options, *SMALL, "--out", place / "frozen")
    assert code == 2 and "no gradient reaches the images" in err and err.count("\n") == 1


def test_square_can_attack_a_model_without_gradients(place, monkeypatch, capsys):
    options = "--model-from strangers:frozen --dataset mine.npz --attacks square".split()
    code, out, err = run(place, monkeypatch, capsys, *options, *SMALL, "--out", place / "square")
    assert (code, err) == (0, "") and "no gradient reaches the images" in out
    assert json.loads((place / "square" / "attack.json").read_text())["complete"] is True


def test_a_model_that_fails_late_keeps_the_finished_attacks(place, monkeypatch, capsys):
    options = "--model-from strangers:late --dataset mine.npz --attacks fgsm,square".split()
    code, out, err = run(place, monkeypatch, capsys, *options, *SMALL, "--out", place / "failed")
    assert code == 1 and err.startswith("error: ValueError: the licence") and err.count("\n") == 1
    told = json.loads((place / "failed" / "attack.json").read_text())
    assert [row["attack"] for row in told["rows"]] == ["natural", "fgsm"] and not told["complete"]


def test_what_is_finished_is_saved_before_masking_is_looked_for(place, monkeypatch, capsys):
    def fails(*_):
        assert (place / "early" / "attack.json").exists() and (place / "early.pt").exists()
        raise ValueError("masked")

    monkeypatch.setattr(ebm_at, "masking_signs", fails)
    options = ["--attacks", "fgsm", "--out", place / "early", "--save", place / "early.pt"]
    code, _, err = run(place, monkeypatch, capsys, *options, *SMALL)
    assert code == 1 and "masked" in err and err.count("\n") == 1
    assert json.loads((place / "early" / "attack.json").read_text())["complete"]


def test_points_without_finite_logits_leave_strict_json_and_a_word(place, monkeypatch, capsys):
    def no_constant(name):
        raise AssertionError(name)

    options = "--model-from strangers:hole --dataset mine.npz --attacks pgd".split()
    code, out, err = run(place, monkeypatch, capsys, *options, *SMALL, "--out", place / "hole")
    assert (code, err) == (0, "") and "12 attacked points have NaN" in out
    text = (place / "hole" / "attack.json").read_text()
    row = json.loads(text, parse_constant=no_constant)["rows"][1]
    assert (row["nonfinite"], row["energy"], row["accuracy"]) == (12, None, 0)


@pytest.mark.parametrize("known", [["ant", "bee", "cat"], ["3", "5", "7"]])
def test_labels_are_matched_by_the_names_of_their_classes(known, place, monkeypatch, capsys):
    from PIL import Image

    checkpoint = torch.load(place / "runs/new/best.pt", weights_only=True)
    torch.save(checkpoint | {"classes": known}, place / f"{known[0]}.pt")
    rng, zoo = np.random.default_rng(1), place / f"without-{known[0]}"
    for name in (f"{split}/{c}/{i}.png" for split in ("train", "test") for c in known[1:]
                 for i in range(6)):  # fmt: skip
        (zoo / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(zoo / name)
    command = [f"{known[0]}.pt", "--dataset", zoo, "--eps", "0", "--suite", "quick", *SMALL]
    adv = place / f"adv-{known[0]}.pt"
    run(place, monkeypatch, capsys, *command, "--out", f"named-{known[0]}", "--save", adv)
    assert torch.load(adv)["y"].tolist() == [1] * 6 + [2] * 6
    for split in ("train", "test"):
        (zoo / split / known[1]).rename(zoo / split / (2 * known[1]))
    code, _, err = run(place, monkeypatch, capsys, *command, "--out", "strange")
    assert code == 2 and f"'{2 * known[1]}': did you mean '{known[1]}'?" in err
    assert err.count("\n") == 1 and not (place / "strange").exists()


def test_ctrl_c_while_looking_for_masking_keeps_the_finished_table(place, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ebm_at, "masking_signs", interrupted)
    options = ["--attacks", "fgsm", "--out", place / "late"]
    code, out, err = run(place, monkeypatch, capsys, *options, *SMALL)
    assert code == 130 and "fgsm" in out and str(place / "late") in err
    told = json.loads((place / "late" / "attack.json").read_text())
    assert [row["attack"] for row in told["rows"]] == ["natural", "fgsm"]


def test_a_full_disk_still_prints_the_table(place, monkeypatch, capsys):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    import cli

    monkeypatch.setattr(cli, "write_atomically", full)
    options = ["--attacks", "fgsm", "--out", place / "disk"]
    code, out, err = run(place, monkeypatch, capsys, *options, *SMALL)
    assert code == 1 and " fgsm " in out and "attack.csv': No space left" in err
    assert not (place / "disk").exists()


def test_out_of_memory_is_one_line(place, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ebm_at, "exact_logits", full)
    code, _, err = run(place, monkeypatch, capsys, *SMALL, "--out", place / "full")
    assert code == 1 and "lower --batch-size" in err and err.count("\n") == 1


def test_ctrl_c_prints_the_table_so_far(place):
    options = "--attacks fgsm,square --queries 1000000 --limit 0 --eps 1e-9 --out stopped"
    command = [sys.executable, str(ROOT / "cli.py"), "attack", *options.split()]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    first = process.stdout.readline()  # the headline, then fgsm's batch
    deadline = time.monotonic() + 60
    while not (place / "stopped").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "on 40 test images" in first
    assert "stopped" in err and "Traceback" not in err
    assert "natural" in out and "fgsm" in out
    told = json.loads((place / "stopped" / "attack.json").read_text())
    assert told["complete"] is False and [r["attack"] for r in told["rows"]] == ["natural", "fgsm"]


BAD = {  # what is wrong: (arguments, exit code, words of the one line on stderr)
    "no file": (["nowhere.pt"], 1, "no checkpoint 'nowhere.pt'"),
    "empty folder": (["taken"], 1, "no checkpoint"),
    "a web page": (["page.pt"], 1, "damaged"),
    "cut short": (["cut.pt"], 1, "damaged"),
    "in the format before torch 1.6": (["ancient.pt"], 1, "torch before 1.6"),
    "square in l2": (["--attacks", "square", "--norm", "l2", "--eps", "1"], 2, "in l2 'square'"),
    "a pickle that runs code": (["evil.pt"], 1, "not a checkpoint of plain tensors"),
    "another project's": (["other.pt"], 1, "not a checkpoint of this project"),
    "another network's weights": (["foreign.pt", "--dataset", "mine.npz"], 1, "none of our"),
    "weights of another width": (["wide.pt"], 1, "do not fit its spec"),
    "weights without data": (["state.pt"], 2, "give --dataset"),
    "grey model, coloured images": (["grey.pt"], 2, "have 3 channels, the model takes 1"),
    "too few classes": (["two.pt"], 2, "but the model has 2 classes"),
    "NaN weights": (["nan.pt"], 1, "NaN"),
    "unknown suite": (["--suite", "standrad"], 2, "did you mean 'standard'"),
    "unknown attack": (["--attacks", "fgsm,pdg"], 2, "did you mean 'pgd'"),
    "no attack": (["--attacks", ""], 2, "empty value"),
    "eps without /255": (["--eps", "8"], 2, "such as 8/255"),
    "eps no number": (["--eps", "eight"], 2, "not a number"),
    "eps negative": (["--eps=-1/255"], 2, "eps must be >= 0"),
    "eps nan": (["--eps", "nan"], 2, "eps must be >= 0"),
    "l2 with an l_inf eps": (["--norm", "l2"], 2, "needs --eps too"),
    "unknown norm": (["--norm", "l1", "--eps", "1"], 2, "unknown norm 'l1'"),
    "no steps": (["--steps", "0"], 2, "--steps is too small"),
    "no queries": (["--queries", "0"], 2, "--queries is too small"),
    "negative limit": (["--limit", "-1"], 2, "--limit is too small"),
    "no batch": (["--batch-size", "0"], 2, "--batch-size is too small"),
    "negative seed": (["--seed", "-1"], 2, "--seed"),
    "unknown split": (["--split", "tset"], 2, "did you mean 'test'"),
    "unknown data": (["--dataset", "cifar11"], 2, "did you mean 'cifar10'"),
    "unknown precision": (["--precision", "fp16"], 2, "unknown precision"),
    "no such device": (["--device", "cuda:99"], 1, "device 'cuda:99' is not there"),
    "out exists": (["--out", "taken"], 1, "'taken' exists: nothing was touched"),
    "save exists": (["--save", "state.pt"], 1, "'state.pt' exists"),
    "pngs exist": (["--save-png", "taken"], 1, "'taken' exists"),
    "out cannot be made": (["--out", "mine.npz/x"], 1, "cannot write"),
    "model-from without :": (["--model-from", "strangers"], 2, "MODULE:FUNCTION"),
    "model-from and a file": (["state.pt", "--model-from", "a:b"], 2, "not both"),
    "no such module": (["--model-from", "nobody:f"], 1, "ModuleNotFoundError"),
    "no such function": (["--model-from", "strangers:x"], 1, "AttributeError"),
    "function fails": (["--model-from", "strangers:fails"], 1, "KeyError"),
    "function wants more": (["--model-from", "strangers:needs"], 1, "TypeError"),
    "not a module": (["--model-from", "strangers:string"], 2, "returned str"),
    "model without data": (["--model-from", "strangers:good"], 2, "give --dataset"),
    "model of one class": (["--model-from", "strangers:one", "--dataset", "mine.npz"], 2, "K >= 2"),
    "model gives NaN": (["--model-from", "strangers:nan", "--dataset", "mine.npz"], 2, "NaN"),
    "model raises": (["--model-from", "strangers:picky", "--dataset", "mine.npz"], 2, "does not"),
    "other data, too few": (["--dataset", "grey.npz"], 2, "have 1 channels, the model takes 3"),
    "no folder to save in": (["--save", "nowhere/adv.pt"], 2, "no folder 'nowhere'"),
    "model gives maps": (["--model-from", "strangers:maps", "--dataset", "mine.npz"], 2, "K >= 2"),
    "unknown option": (["--epsilon", "1"], 2, "No such option"),
    "too many files": (["state.pt", "cut.pt"], 2, "unexpected extra argument"),
}


def contents(folder):
    """Every file and folder with a checksum."""
    paths = (p for p in sorted(folder.rglob("*")) if "__pycache__" not in p.parts)
    read = {str(p): p.read_bytes() if p.is_file() else b"" for p in paths}
    return {k: hashlib.sha256(v).hexdigest() for k, v in read.items()}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gives_one_clear_line_and_touches_nothing(what, place, monkeypatch, capsys):
    arguments, expected, words = BAD[what]
    before = contents(place)
    suite = [] if "--suite" in arguments or "--attacks" in arguments else ["--suite", "quick"]
    code, _, err = run(place, monkeypatch, capsys, *suite, *SMALL, *arguments)
    assert code == expected and words in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert contents(place) == before


def test_without_any_run_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    code, _, err = run(tmp_path, monkeypatch, capsys)
    assert code == 1 and "train one first" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
