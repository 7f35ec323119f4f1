"""The generate command: what it writes, what it repeats, and one clear line for bad input."""

import csv
import inspect
import json
import signal
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import call, start

import cli
import ebm_at

SAFE = set(string.ascii_letters + string.digits + "-_.")
FEW = "--per-class 4 --neighbours 5 --components 6 --steps 3 --device cpu".split()


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with data.npz (three classes, grey, 16x16), other.npz (two) and runs/a/best.pt."""
    folder, rng = tmp_path_factory.mktemp("shop"), np.random.default_rng(0)
    for name, classes in (("data", 3), ("other", 2)):
        arrays = {}
        for split, n in (("train", 90), ("test", 45)):
            y = np.arange(n) % classes
            bright = 60 + 60 * y[:, None, None] * (np.arange(16) < 8)
            x = bright + rng.normal(0, 20, (n, 16, 16))
            arrays |= {f"{split}_images": x.clip(0, 255).astype(np.uint8), f"{split}_labels": y}
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "runs" / "a").mkdir(parents=True)
    config = ebm_at.recipe(str(folder / "data.npz"), "fgsm", model="small", width=8, epochs=2,
                           batch_size=16, probe_size=8, augment="none", device="cpu")  # fmt: skip
    list(ebm_at.train(config, ebm_at.load_data(config.dataset), folder=folder / "runs" / "a"))
    checkpoint = torch.load(folder / "runs/a/best.pt", weights_only=True)
    odd = ["a/b", "a b", "猫\n"]
    torch.save(checkpoint | {"classes": odd}, folder / "odd.pt")
    model = ebm_at.make_model("small", 3, 3, width=8)
    other = {"spec": model.spec, "model": model.state_dict()}
    torch.save(checkpoint | other, folder / "coloured.pt")
    return folder


def generate(monkeypatch, capsys, shop, *arguments):
    monkeypatch.chdir(shop)
    return call(monkeypatch, capsys, "generate", *FEW, *arguments)


def pngs(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).rglob("*.png"))}


def test_defaults_are_those_of_the_functions():
    options = inspect.signature(cli.generate).parameters
    for function in (ebm_at.generate, ebm_at.sgld):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in options and parameter.default is not parameter.empty:
                default = options[name].default
                assert cli.GUIDES.get(default, default) == parameter.default, name


def test_what_a_run_writes(monkeypatch, capsys, shop, tmp_path):
    folder = tmp_path / "g"
    options = ("--out", folder, "--trace", "--save-real")
    code, out, err = generate(monkeypatch, capsys, shop, *options)
    assert (code, err) == (0, "") and "a/best.pt" in out
    assert {p.name for p in folder.iterdir()} == {
        "grid.png", "samples", "report.json", "energies.csv", "trace", "trace.gif", "real"
    }  # fmt: skip
    rows = list(csv.DictReader((folder / "energies.csv").read_text().splitlines()))
    assert [row["file"] for row in rows] == [f"samples/{name}" for name in pngs(folder / "samples")]
    assert len(rows) == 12 and rows[4]["file"] == "samples/00004-class-01-1.png"
    model, _ = ebm_at.load_model(shop / "runs/a/best.pt")
    for row in rows:
        with Image.open(folder / row["file"]) as image:
            assert image.mode == "L"  # as the data are
            x = torch.from_numpy(np.asarray(image).copy())[None, None]
        energy = -ebm_at.exact_logits(model, x)[0, int(row["label"])].item()
        # up to the rounding to 8 bits:
        assert energy == pytest.approx(float(row["energy_end"]), rel=0.01, abs=0.1)
        assert float(row["energy_end"]) <= float(row["target"]) or row["steps"] == "3"
    report = json.loads((folder / "report.json").read_text())
    still = sum(row["steps"] == "0" for row in rows)
    assert report["generated"]["no_step"] == still and f"{still} of 12 images took no step" in out
    assert report["generated"]["steps"] == pytest.approx(sum(int(r["steps"]) for r in rows) / 12)
    assert report["reference"] == "45 test images" and report["real"]["n"] == 12
    assert len(pngs(folder / "real")) == 12 and len(pngs(folder / "trace")) == 3
    judges = list((shop / "runs/judges").rglob("last.pt"))
    before = judges[0].stat().st_mtime_ns
    assert generate(monkeypatch, capsys, shop, "--quiet")[0] == 0
    assert len(judges) == 1 and judges[0].stat().st_mtime_ns == before, "the judge is kept"
    assert (shop / "runs" / "a" / "generate-1" / "grid.png").exists(), "the next free folder"


def test_class_guidance_walks_down_the_cross_entropy(monkeypatch, capsys, shop, tmp_path):
    """From the same starts, with the same targets: another energy, another picture."""
    found = {}
    for guide in cli.GUIDES:
        options = ("--no-metrics", "--stop", "fixed", "--noise", "0", "--guide", guide)
        assert generate(monkeypatch, capsys, shop, *options, "--out", tmp_path / guide)[0] == 0
        with open(tmp_path / guide / "energies.csv", newline="") as file:
            found[guide] = list(csv.DictReader(file))
    began, ended = ([sum(float(row[key]) for row in found[guide]) for guide in cli.GUIDES]
                    for key in ("energy_start", "energy_end"))  # fmt: skip
    assert began[0] == began[1]
    assert ended[0] < ended[1], "E(x, y) falls most where it is what one walks down"


def test_names_that_differ_in_signs_keep_all_their_files(monkeypatch, capsys, shop, tmp_path):
    options = ("odd.pt", "--no-metrics", "--trace", "--classes", "a/b,1", "--out", tmp_path / "g")
    assert generate(monkeypatch, capsys, shop, *options)[::2] == (0, "")
    found = pngs(tmp_path / "g" / "samples") | pngs(tmp_path / "g" / "trace")
    assert len(found) == 8 + 2 and all(set(name) <= SAFE for name in found)


def test_distances_to_training_images(shop):
    data = ebm_at.load_data(str(shop / "data.npz"))
    config = ebm_at.recipe(str(shop / "data.npz"), device="cpu")
    judge = cli.Judge(str(shop / "runs/a"), config, data, [0, 2], 0, 100, True)
    x, y = data.x_test[:20], data.y_test[:20]
    chosen = data.x_train[data.y_train != 1].float().flatten(1) / 255
    nearest = torch.cdist(x.float().flatten(1) / 255, chosen).amin(1)
    assert judge.of(x, y)["nearest_pixels"] == pytest.approx(nearest.median().item(), rel=1e-4)
    copies = judge.of(data.x_train[data.y_train != 1], data.y_train[data.y_train != 1])
    assert copies["nearest_pixels"] == 0 == copies["nearest_pixels_min"]


def test_same_seed_same_files_whatever_the_batch_size(monkeypatch, capsys, shop, tmp_path):
    for name, extra in (("a", ()), ("b", ("--batch-size", 5)), ("c", ("--seed", 1))):
        options = ("--no-metrics", "--out", tmp_path / name)
        assert generate(monkeypatch, capsys, shop, *options, *extra)[0] == 0
    a, b, c = (pngs(tmp_path / name / "samples") for name in "abc")
    assert a == b and a != c


def test_compare_tells_every_start_fixed_and_adaptive(monkeypatch, capsys, shop, tmp_path):
    options = ("--compare", "--out", tmp_path / "g", "--classes", "2,0", "--judge", "runs/a")
    code, out, _ = generate(monkeypatch, capsys, shop, *options)
    assert code == 0 and all(len(line) <= 80 for line in out.splitlines() if "zero" in line)
    with open(tmp_path / "g" / "compare.csv", newline="") as file:
        rows = {r["name"]: r for r in csv.DictReader(file)}
    ways = ("fixed", "sampled", "zero steps", "zero steps, one candidate")  # the last two: controls
    wanted = {f"{i}, {way}" for i in ebm_at.STARTS for way in ways} | {"real images"}
    assert set(rows) == wanted and all(name in out for name in wanted)
    assert all(r["n"] == "8" and float(r["fd"]) >= 0 for r in rows.values())
    assert all(rows[n]["steps"] == "3" for n in wanted if n.endswith("fixed"))
    assert all(rows[n]["no_step"] == "8" for n in wanted if "zero" in n)
    assert len(pngs(tmp_path / "g" / "grids")) == 20


def test_ctrl_c_keeps_the_ways_that_are_compared(monkeypatch, capsys, shop, tmp_path):
    calls, real = [], ebm_at.generate

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(ebm_at, "generate", interrupted)
    options = ["--no-metrics", "--compare", "--out", tmp_path / "g"]
    code, _, err = generate(monkeypatch, capsys, shop, *options)
    assert code == 130 and err.startswith("stopped: 1 of 20 ways are in") and err.count("\n") == 1
    assert json.loads((tmp_path / "g/report.json").read_text())["complete"] is False
    assert (tmp_path / "g/compare.csv").exists()


def test_sigterm_in_a_walk_is_one_line_and_leaves_nothing(shop, tmp_path):
    options = "--no-metrics --steps 1000000 --stop fixed --out".split()
    process = start("generate", "runs/a", *FEW, *options, tmp_path / "g", cwd=shop)
    assert "12 images of 3 classes" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == "stopped\n" and not (tmp_path / "g").exists()


BAD = {  # arguments: exit code, words of the one line on stderr
    "--steps -1": (2, "'--steps'"),
    "--neighbours 31": (2, "neighbours"),
    "--init local": (2, "'local' is not one of"),
    "--classes 0,7": (2, "unknown class '7'"),
    "--dataset other.npz": (2, "classes 0, 1, 2"),
    "--trace --compare": (2, "--compare runs many"),
    "--metrics --reference 1": (2, "--reference"),
    "--metrics --per-class 1 --classes 0": (2, "one cannot be measured"),
    "--metrics --judge clasifier": (1, "no checkpoint 'clasifier'"),
    "--metrics --judge coloured.pt": (2, "trained on other images"),
    "nowhere.pt": (1, "no checkpoint 'nowhere.pt'"),
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, monkeypatch, capsys, shop, tmp_path):
    expected, words = BAD[arguments]
    options = ["--no-metrics", "--out", tmp_path / "g", *arguments.split()]
    code, _, err = generate(monkeypatch, capsys, shop, *options)
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert code == expected and not (tmp_path / "g").exists()
