"""The generate command: what it writes, what it repeats, and one clear line for bad input."""

import csv
import dataclasses
import inspect
import json
import signal
import string
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_cli import ROOT, call

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
    run = folder / "runs" / "a"
    run.mkdir(parents=True)
    config = ebm_at.recipe(str(folder / "data.npz"), "fgsm", model="small", width=8, epochs=2,
                           batch_size=16, probe_size=8, augment="none", device="cpu")  # fmt: skip
    data = ebm_at.load_data(config.dataset)
    list(ebm_at.train(config, data, folder=run))
    return folder


def generate(monkeypatch, capsys, shop, *arguments):
    monkeypatch.chdir(shop)
    return call(monkeypatch, capsys, "generate", *arguments, *FEW)


def pngs(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).rglob("*.png"))}


def test_defaults_are_those_of_the_functions():
    options = inspect.signature(cli.generate).parameters
    for function in (ebm_at.generate, ebm_at.sgld):
        for name, parameter in inspect.signature(function).parameters.items():
            if name == "quantile":  # so that it can be refused where it would be ignored
                assert options[name].default is None
            elif name in options and name not in ("batch_size", "x", "y"):
                assert options[name].default == parameter.default, name


def test_what_a_run_writes(monkeypatch, capsys, shop, tmp_path):
    options = ("--out", tmp_path / "g", "--trace", "--precision", "fp32")
    code, out, err = generate(monkeypatch, capsys, shop, *options)
    assert (code, err) == (0, "") and "a/best.pt" in out
    folder = tmp_path / "g"
    assert {p.name for p in folder.iterdir()} == {
        "grid.png", "samples", "report.json", "energies.csv", "trace", "trace.gif"
    }  # fmt: skip
    from PIL import Image

    with open(folder / "energies.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"samples/{name}" for name in pngs(folder / "samples")]
    assert len(rows) == 12 and rows[4]["file"] == "samples/00004-class-01-1.png"
    report = json.loads((folder / "report.json").read_text())
    model, _ = ebm_at.load_model(shop / "runs/a/best.pt")
    for row in rows:
        with Image.open(folder / row["file"]) as image:
            assert image.mode == "L"  # as the data are
            x = torch.from_numpy(np.asarray(image).copy())[None, None].float() / 255
        with torch.no_grad():  # up to the rounding to 8 bits
            energy = -model(x)[0, int(row["label"])].item()
        assert energy == pytest.approx(float(row["energy_end"]), rel=0.01, abs=0.1)
        reached = float(row["energy_end"]) <= float(row["target"])
        assert row["stopped"] == ("target" if reached else "cap")
        assert row["stopped"] == "target" or row["steps"] == "3"
    made = report["generated"]
    assert made["at_target"] + made["at_cap"] == made["n"] == 12 and made["diverged"] == 0
    assert made["steps"] == pytest.approx(sum(int(r["steps"]) for r in rows) / 12)
    assert report["reference"] == "45 test images" and report["real"]["n"] == 12
    with Image.open(folder / "trace.gif") as film:
        assert film.n_frames >= 1
    assert (shop / "runs/a/pca.pt").exists() and len(list((shop / "runs/judges").glob("*.pt"))) == 1


def test_classes_whose_names_differ_in_signs_keep_all_their_files(tmp_path):
    names, y = ["a/b", "a b", "a\nb", "猫", "c" * 300], torch.arange(5).repeat_interleave(3)
    record = {k: torch.zeros(15) for k in ("steps", "energy_start", "energy_end", "target",
                                           "stopped")}  # fmt: skip
    x8 = torch.zeros(15, 3, 8, 8, dtype=torch.uint8)
    cli.save_samples(tmp_path, x8, y, record, names)
    found = pngs(tmp_path / "samples")
    assert len(found) == 15 and all(set(name) <= SAFE for name in found)
    watch = SimpleNamespace(filmed=[0, 3, 6, 9, 12], frames=[x8[::3]] * 2)
    cli.save_film(tmp_path, watch, torch.ones(15, dtype=torch.int64), names)
    assert len(pngs(tmp_path / "trace")) == 5


def test_a_judge_that_hardly_knows_the_real_images_is_said(capsys, shop):
    data, where = ebm_at.load_data(str(shop / "data.npz")), torch.device("cpu")
    console = cli.Console(quiet=True)
    for constant, warned in ((True, True), (False, False)):
        judge = ebm_at.load_model(shop / "runs/a/best.pt")[0]
        if constant:
            torch.nn.init.zeros_([m for m in judge.modules() if hasattr(m, "weight")][-1].weight)
        judged = cli.Reference(judge, "a judge", data, [0, 1, 2], 0, where, console, 100)
        right, said = judged.words["judge_test_accuracy"], capsys.readouterr().err
        assert ("warning" in judged.words) == warned == (right < 2 / 3), right
        assert (said.count("\n") == 1 and f"knows only {right:.1%}" in said) == warned


def test_distances_in_pixels_are_the_same_taken_in_parts(monkeypatch, shop):
    data, where = ebm_at.load_data(str(shop / "data.npz")), torch.device("cpu")
    judge, found = ebm_at.load_model(shop / "runs/a/best.pt")[0], []
    for at_once in (2**26, 256 * 7):  # the second: seven images at a time
        monkeypatch.setattr(ebm_at.ClassPCA, "AT_ONCE", at_once)
        judged = cli.Reference(judge, "", data, [0, 2], 0, where, cli.Console(quiet=True), 100)
        found.append(judged.of(data.x_test[:20], data.y_test[:20]))
    assert found[0] == found[1] and found[0]["nearest_pixels"] > 0
    copies = judged.of(data.x_train[data.y_train != 1], data.y_train[data.y_train != 1])
    assert copies["nearest_pixels"] == 0 == copies["nearest_pixels_min"]


def test_same_seed_same_files_whatever_the_batch_size(monkeypatch, capsys, shop, tmp_path):
    for name, extra in (("a", ()), ("b", ("--batch-size", 5)), ("c", ("--seed", 1))):
        options = ("--no-metrics", "--precision", "fp32", "--out", tmp_path / name)
        assert generate(monkeypatch, capsys, shop, *options, *extra)[0] == 0
    a, b, c = (pngs(tmp_path / name / "samples") for name in "abc")
    assert a == b and a != c


def test_compare_tells_every_start_fixed_and_adaptive(monkeypatch, capsys, shop, tmp_path):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = generate(monkeypatch, capsys, shop, "--compare", "--out", tmp_path / "g",
                            "--classes", "2,0", "--judge", "runs/a")  # fmt: skip
    assert code == 0
    with open(tmp_path / "g" / "compare.csv", newline="") as file:
        rows = {r["name"]: r for r in csv.DictReader(file)}
    ways = ("fixed", "sampled", "zero steps", "zero steps one candidate")  # the last two: controls
    wanted = {f"{i} {way}" for i in ebm_at.STARTS for way in ways} | {"real images"}
    assert set(rows) == wanted and all(name.split()[0] in out for name in wanted)
    assert all(r["n"] == "8" and float(r["fd"]) >= 0 for r in rows.values())
    assert all(rows[n]["steps"] == "3" for n in wanted if n.endswith("fixed"))
    assert all(rows[n]["no_step"] == "8" for n in wanted if "zero" in n)
    assert len(pngs(tmp_path / "g" / "grids")) == 20


def test_save_real_lays_as_many_test_images_beside_the_samples(monkeypatch, capsys, shop, tmp_path):
    code, *_ = generate(monkeypatch, capsys, shop, "--save-real", "--no-metrics", "--out", tmp_path / "g")
    made, real = (sorted((tmp_path / "g" / d).iterdir()) for d in ("samples", "real"))
    assert code == 0 and 0 < len(real) <= len(made)
    assert all(p.is_file() and p.suffix == ".png" for p in made + real), "flat, nothing but pictures"


def test_the_default_folder_is_the_next_free_one_beside_the_checkpoint(monkeypatch, capsys, shop):
    for n in (1, 2):
        assert generate(monkeypatch, capsys, shop, "runs/a", "--no-metrics", "--quiet")[0] == 0
        assert (shop / "runs" / "a" / f"generate-{n}" / "grid.png").exists()


def test_a_kept_pca_is_used_only_where_it_fits(shop, tmp_path, monkeypatch):
    data, path = ebm_at.load_data(str(shop / "data.npz")), tmp_path / "pca.pt"
    first = cli.fitted_pca(path, data, 6, torch.device("cpu"))
    fits, fit = [], ebm_at.ClassPCA.fit
    monkeypatch.setattr(ebm_at.ClassPCA, "fit", lambda *a: fits.append(1) or fit(*a))
    again = cli.fitted_pca(path, data, 6, torch.device("cpu"))
    assert not fits and all(
        torch.equal(a, b) if torch.is_tensor(a) else a == b
        for a, b in zip(vars(first).values(), vars(again).values())
    )
    cli.fitted_pca(path, data, 5, torch.device("cpu"))
    data.x_train = data.x_train ^ 1
    cli.fitted_pca(path, data, 5, torch.device("cpu"))
    path.write_bytes(b"damaged")
    cli.fitted_pca(path, data, 5, torch.device("cpu"))
    assert len(fits) == 3


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--steps", "-1"], "--steps must lie in 0"),
        (["--per-class", "0"], "--per-class must lie in 1"),
        (["--neighbours", "31"], "31 neighbours, but class 0 has only"),
        (["--components", "0"], "components"),
        (["--init", "local"], "did you mean 'local-pca'"),
        (["--stop", "never"], "unknown stop"),
        (["--classes", "0,7"], "unknown class '7'"),
        (["--dataset", "other.npz"], "3 classes: 0, 1, 2"),
        (["--trace", "--compare"], "drop one"),
        (["--momentum", "1"], "momentum"),
        (["--quantile", "2", "--stop", "quantile"], "quantile"),
        (["--quantile", "0.1"], "--quantile needs --stop quantile"),
        (["--step-size", "0"], "--step-size must be positive"),
        (["--mix", "1.5"], "--mix must lie in 0 .. 1"),
        (["--neighbours", "1"], "--neighbours must lie in 2"),
        (["--seed", "4294967296"], "--seed must lie in"),
        (["--reference", "1"], "--reference 1"),
        (["--components", "2.5"], "components"),
        (["--metrics", "--per-class", "1", "--classes", "0"], "one image cannot be measured"),
        (["--metrics", "--judge", "clasifier"], "did you mean 'classifier'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, shop, tmp_path, arguments, says):
    usual = [] if arguments[0] in FEW else FEW
    monkeypatch.chdir(shop)
    out = ["--out", tmp_path / "g", "--device", "cpu"]
    code, _, err = call(monkeypatch, capsys, "generate", "--no-metrics", *out, *usual, *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "g").exists()


def test_two_runs_never_get_the_same_folder(tmp_path):
    """Started at once, each must claim a folder of its own, with nothing in it."""
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: cli.claim_folder(None, tmp_path, "run"), range(24)))
    assert sorted(p.name for p in claimed) == sorted(f"run-{i + 1}" for i in range(24))
    assert all(p.is_dir() for p in claimed)


def test_a_judge_of_other_channels_is_refused(monkeypatch, capsys, shop, tmp_path):
    judge = ebm_at.load_checkpoint(shop / "runs/a/best.pt")
    coloured = ebm_at.make_model("small", 3, 3, width=8)
    torch.save(judge | {"spec": coloured.spec, "model": coloured.state_dict()}, tmp_path / "j.pt")
    code, _, err = generate(monkeypatch, capsys, shop, "--judge", tmp_path / "j.pt")
    assert code == 2 and "trained on other images" in err and err.count("\n") == 1


def test_a_new_label_makes_a_new_judge_and_pca(shop):
    """Same pixels, other labels: what was kept for the old ones must not be taken."""
    data = ebm_at.load_data(str(shop / "data.npz"))
    relabelled = dataclasses.replace(data, y_train=data.y_train.flip(0))
    assert cli.checksum(data) != cli.checksum(relabelled)


@pytest.mark.parametrize("more, kept", [([], set()), (["--compare"], {"compare.csv"})])
def test_ctrl_c_at_any_moment_says_what_there_is(monkeypatch, capsys, shop, tmp_path, more, kept):
    """Before the first step there is nothing, and no folder; compare keeps the ways it finished."""
    calls, real = [], ebm_at.generate

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) > len(kept):
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(ebm_at, "generate", interrupted)
    out = ["--no-metrics", "--out", tmp_path / "g"]
    code, _, err = generate(monkeypatch, capsys, shop, *out, *more)
    assert code == 130 and "stopped" in err and "Traceback" not in err
    assert (tmp_path / "g").exists() == bool(kept)
    if kept:
        assert "1 of 20 ways" in err and kept <= {p.name for p in (tmp_path / "g").iterdir()}
        assert json.loads((tmp_path / "g/report.json").read_text())["complete"] is False


def test_run_time_errors_are_one_line_and_exit_1(monkeypatch, capsys, shop, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine")
    for arguments, says in (
        (["--out", tmp_path / "full"], "nothing was touched"),
        (["nowhere.pt"], "no checkpoint 'nowhere.pt'"),
        (["runs/a/pca.pt"], "lacks a model"),
        (["--dataset", "missing.npz"], "no file"),
        (["--device", "cuda:9"], "--device cpu"),
    ):
        arguments = [*arguments, *FEW[:-2], *(["--device", "cpu"] if "--device" not in arguments
                                              else [])]  # fmt: skip
        monkeypatch.chdir(shop)
        cli.fitted_pca(shop / "runs/a/pca.pt", ebm_at.load_data("data.npz"), 6, torch.device("cpu"))
        code, _, err = call(monkeypatch, capsys, "generate", *arguments)
        assert code == 1 and err.count("\n") == 1 and says in err, (arguments, err)
    assert (tmp_path / "full" / "kept").read_text() == "mine"
    monkeypatch.chdir(tmp_path)
    code, _, err = call(monkeypatch, capsys, "generate")
    assert code == 1 and "python cli.py train" in err


def test_a_class_without_images_is_named(monkeypatch, capsys, shop, tmp_path):
    with np.load(shop / "data.npz") as file:
        arrays = dict(file)
    keep = arrays["train_labels"] != 1
    arrays |= {"train_images": arrays["train_images"][keep], "train_labels":
               arrays["train_labels"][keep]}  # fmt: skip
    np.savez(tmp_path / "gap.npz", **arrays)
    code, _, err = generate(monkeypatch, capsys, shop, "--dataset", tmp_path / "gap.npz",
                            "--no-metrics", "--out", tmp_path / "g")  # fmt: skip
    assert code == 2 and "class 1 has no images" in err


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_keeps_the_pictures_so_far(shop, tmp_path):
    command = [sys.executable, str(ROOT / "cli.py"), "generate", "runs/a", "--no-metrics", *FEW]
    command += ["--steps", "1000000", "--stop", "fixed", "--out", str(tmp_path / "g")]
    process = subprocess.Popen(command, cwd=shop, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    while not (tmp_path / "g").exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "unfinished.png" in err
    assert (tmp_path / "g" / "unfinished.png").exists()
