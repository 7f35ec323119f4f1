"""python cli.py attack: its table and files, models of others, and one clear line per bad input."""

import csv
import hashlib
import json
import pickle
import signal
import sys
import time
from os import getcwd, utime

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import call, contents, start
from test_data import write_npz

import cli
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
def hundred(): return Net(100)
def soft(): return Net(3, lambda z: z.softmax(1))
def scripted(): return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))
def fails(): raise KeyError("weights")
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
    """A folder with data (16x16 images, 3 classes), runs/, and files of every bad kind."""
    folder, labels = tmp_path_factory.mktemp("attack"), np.arange(90) % 3
    path = write_npz(folder / "mine.npz", 90, 16, 3, train_labels=labels, test_labels=labels[:30])
    config = ebm_at.recipe(path, "fgsm", model="small", width=8, epochs=1, eps=8 / 255, limit=60,
                           device="cpu", batch_size=20)  # fmt: skip
    trainer = ebm_at.Trainer(config, ebm_at.load_data(config.dataset))
    for name in ("old", "new"):
        (folder / "runs" / name).mkdir(parents=True)
        ebm_at.save_run(trainer, folder / "runs" / name)
    utime(folder / "runs" / "old" / "best.pt", (1, 1))
    best = folder / "runs" / "new" / "best.pt"
    checkpoint = torch.load(best, weights_only=True)
    torch.save(checkpoint["model"], folder / "state.pt")
    (folder / "cut.pt").write_bytes(best.read_bytes()[:5000])
    (folder / "evil.pt").write_bytes(pickle.dumps(getcwd))
    older = checkpoint["config"] | {"ema": 0.0, "probe_every": 200}
    torch.save(checkpoint | {"config": older}, folder / "older.pt")
    torch.save(checkpoint | {"classes": ["ant", "bee", "cat"]}, folder / "named.pt")
    (folder / "strangers.py").write_text(STRANGERS)
    return folder


def run(place, monkeypatch, capsys, *arguments):
    monkeypatch.chdir(place)
    sys.modules.pop("strangers", None)
    return call(monkeypatch, capsys, "attack", *arguments)


@pytest.mark.parametrize("suite", ["standard", "energy", None])
def test_table_csv_and_json_say_the_same(suite, place, monkeypatch, capsys):
    chosen = ["--suite", suite] if suite else ["--attacks", "fgsm, energy-up,square"]
    folder = place / f"out-{suite}"
    code, out, err = run(place, monkeypatch, capsys, *chosen, "--out", folder, "--seed", 3, *SMALL)
    assert (code, err) == (0, "")
    assert "runs/new/best.pt on 12 test images" in out, "the newest run, and it says so"
    assert out.splitlines()[-1] == "Next: python cli.py generate runs/new" and "\x1b" not in out
    assert all(len(line) <= 80 for line in out.splitlines() if " fgsm " in line or " apgd" in line)
    told = json.loads((folder / "attack.json").read_text())
    best = (place / "runs/new/best.pt").read_bytes()
    assert told["sha256"] == hashlib.sha256(best).hexdigest()
    for key, value in (("n", 12), ("norm", "linf"), ("steps", 2), ("seed", 3), ("complete", True)):
        assert told[key] == value
    assert told["eps"] == pytest.approx(8 / 255)
    rows = list(csv.DictReader((folder / "attack.csv").read_text().splitlines()))
    names = ebm_at.SUITES[suite] if suite else ["fgsm", "energy-up", "square"]
    assert [r["attack"] for r in rows] == ["natural", *names][: len(rows)]
    assert len(rows) == 1 + len(names) or float(rows[-1]["worst"]) == 0
    for row, same in zip(rows, told["rows"]):
        assert row.keys() == same.keys()
        assert float(row["energy"]) == pytest.approx(same["energy"], abs=1e-4)
        assert f" {row['attack']} " in out and f"{same['accuracy']:.1%}" in out
    assert told["robust_acc"] == told["rows"][-1]["worst"]


def test_everything_can_be_changed_and_saved(place, monkeypatch, capsys):
    more = "--eps 0.5 --norm l2 --split val --batch-size 4 --quiet".split()
    code, out, _ = run(place, monkeypatch, capsys, "runs/old", "--suite", "quick", *more, *SMALL,
                       "--save", "adv.pt", "--save-png", "pngs", "--picture")  # fmt: skip
    assert code == 0 and "on 9 val images" not in out
    told = json.loads((place / "runs/old/attack-1/attack.json").read_text())
    assert told["n"] == 9 and told["norm"] == "l2"  # 10% of the 90 training images
    saved = torch.load(place / "adv.pt", weights_only=True)
    assert saved["x_adv"].shape == (9, 3, 16, 16) and saved["x_adv"].dtype == torch.float32
    data = ebm_at.load_data(str(place / "mine.npz"))
    moved = (saved["x_adv"] - data.x_val.float() / 255).flatten(1).norm(dim=1)
    assert moved.max() <= 0.5 + 1e-5 and torch.equal(saved["y"], data.y_val)
    pngs = sorted((place / "pngs").iterdir())
    image = np.asarray(Image.open(pngs[3])).transpose(2, 0, 1)
    assert len(pngs) == 9 and "after rounding to 8 bits" in out
    assert np.abs(image / 255 - saved["x_adv"][3].numpy()).max() <= 0.5 / 255 + 1e-6
    assert "pictures.png" in out and (place / "runs/old/attack-1/pictures.png").exists()


def test_the_picture_shows_fallen_images_of_each_class_first(tmp_path, monkeypatch):
    """Its columns: clean images, what was added (grey at 0), adversarial images."""
    x = torch.zeros(8, 3, 32, 32) + torch.arange(8).view(8, 1, 1, 1) / 10
    x_adv, y = x.clone(), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    x_adv[[2, 4]] += 0.05
    shown, draw = [], cli.draw_page
    monkeypatch.setattr(cli, "draw_page", lambda *a: shown.append(a) or draw(*a))
    model = ebm_at.make_model("small", 3, 3, width=8).eval()
    cli.draw_attacked(tmp_path / "p.png", model, x, y, x_adv, ["ant", "bee", "cat"])
    (rows, names, captions, _), = shown
    assert names[:2] == ["y = ant", "y = bee"] and len(rows) == 6
    assert torch.equal(rows[0, 0], cli.to_uint8(x[2]))
    assert torch.equal(rows[1, 2], cli.to_uint8(x_adv[4]))
    assert (rows[0, 1] == 255).all() and (rows[3, 1] == 128).all(), "the change times 10, or none"
    assert "perturbation x 10" in captions[0][1]
    logits = ebm_at.exact_logits(model, x_adv[[4]])
    assert f"E(x) = {ebm_at.energy_x(logits).item():.2f}" in captions[1][2]
    assert f"E(x, y) = {-logits[0, 1].item():.2f}" in captions[1][2]
    with Image.open(tmp_path / "p.png") as page:
        assert page.width < 800 and page.height < 1200


def test_a_checkpoint_with_fields_that_are_gone_is_read(place, monkeypatch, capsys):
    options = "--suite quick --split train --out from-older".split()
    code, out, _ = run(place, monkeypatch, capsys, "older.pt", *options, *SMALL[2:])
    assert code == 0 and "on 60 train images" in out, "those it was trained on"


@pytest.mark.parametrize("function", ["good", "hundred", "soft", "scripted"])
def test_models_of_others(function, place, monkeypatch, capsys):
    options = f"--model-from strangers:{function} --dataset mine.npz --attacks fgsm,square".split()
    code, out, err = run(place, monkeypatch, capsys, *options, "--eps", "1/255", *SMALL)
    assert (code, err) == (0, "") and f"strangers:{function} on 12" in out and "Next:" not in out
    assert ("WARNING" in out and "softmax" in out) == (function == "soft")
    assert ("has 100 logits" in out and "3 classes" in out) == (function == "hundred")


def test_a_model_that_fails_late_keeps_the_finished_attacks(place, monkeypatch, capsys):
    options = "--model-from strangers:late --dataset mine.npz --attacks fgsm,square".split()
    code, out, err = run(place, monkeypatch, capsys, *options, *SMALL, "--out", place / "failed")
    assert code == 1 and err.startswith("error: ValueError: the licence") and err.count("\n") == 1
    told = json.loads((place / "failed" / "attack.json").read_text())
    assert [row["attack"] for row in told["rows"]] == ["natural", "fgsm"] and not told["complete"]


@pytest.mark.parametrize("error, code", [(ValueError("masked"), 1), (KeyboardInterrupt(), 130)])
def test_what_is_finished_is_saved_before_masking_is_looked_for(error, code, place, monkeypatch,
                                                                capsys):  # fmt: skip
    def fails(*_):
        raise error

    folder = place / f"early-{code}"
    monkeypatch.setattr(ebm_at, "masking_signs", fails)
    options = ["--attacks", "fgsm", "--out", folder, "--save", place / f"early-{code}.pt"]
    got, out, err = run(place, monkeypatch, capsys, *options, *SMALL)
    assert got == code and " fgsm " in out and str(folder) in err and err.count("\n") == 1
    assert json.loads((folder / "attack.json").read_text())["complete"]
    assert (place / f"early-{code}.pt").exists()


def test_points_without_finite_logits_leave_strict_json_and_a_word(place, monkeypatch, capsys):
    options = "--model-from strangers:hole --dataset mine.npz --attacks pgd".split()
    code, out, err = run(place, monkeypatch, capsys, *options, *SMALL, "--out", place / "hole")
    assert (code, err) == (0, "") and "12 attacked points have NaN" in out
    text = (place / "hole" / "attack.json").read_text()
    row = json.loads(text, parse_constant=pytest.fail)["rows"][1]
    assert (row["nonfinite"], row["energy"], row["accuracy"]) == (12, None, 0)


def test_a_full_disk_still_prints_the_table(place, monkeypatch, capsys):
    def full(path, _):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cli, "write_atomically", full)
    options = ["--attacks", "fgsm", "--out", place / "disk"]
    code, out, err = run(place, monkeypatch, capsys, *options, *SMALL)
    assert code == 1 and " fgsm " in out and "attack.csv': No space left" in err
    assert not (place / "disk").exists()


def test_ctrl_c_prints_the_table_so_far(place):
    options = "--attacks fgsm,square --queries 1000000 --limit 0 --eps 1e-9 --out stopped"
    process = start("attack", *options.split(), cwd=place)
    assert "on 30 test images" in process.stdout.readline()
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.startswith("stopped: ") and err.count("\n") == 1
    assert "natural" in out and "fgsm" in out
    told = json.loads((place / "stopped" / "attack.json").read_text())
    assert told["complete"] is False and [r["attack"] for r in told["rows"]] == ["natural", "fgsm"]


FROM = "--dataset mine.npz --model-from strangers:"
BAD = {  # arguments: exit code, words of the one line on stderr
    "cut.pt": (1, "damaged"),
    "evil.pt": (1, "of plain tensors"),
    "state.pt": (1, "not a checkpoint of this project"),
    "--suite standrad": (2, "'standrad' is not one of"),
    "--attacks fgsm,pdg": (2, "did you mean 'pgd'"),
    "--eps 8": (2, "such as 8/255"),
    "--norm l2": (2, "needs --eps too"),
    "--steps 0": (2, "'--steps'"),
    "--save state.pt": (1, "'state.pt' exists: nothing was touched"),
    "named.pt --dataset shapes": (2, "trained on other images"),
    FROM + "fails": (1, "KeyError"),
    FROM + "frozen": (2, "--attacks square can"),
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_gets_one_clear_line_and_touches_nothing(arguments, place, monkeypatch, capsys):
    (expected, words), before = BAD[arguments], contents(place)
    suite = [] if "--suite" in arguments or "--attacks" in arguments else ["--suite", "quick"]
    code, _, err = run(place, monkeypatch, capsys, *suite, *SMALL, *arguments.split())
    assert code == expected and words in err, err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert contents(place) == before
