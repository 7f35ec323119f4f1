"""train and compare: their surface, run folders, interruptions, one clear line per bad input."""

import csv
import dataclasses
import inspect
import json
import os
import pickle
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data import Payload, write_npz

import cli
import ebm_at

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "tutorials/results/train/cpu"
QUICK = ("--limit 60 --batch-size 20 --epochs 2 --width 8 --probe-size 20 --test-size 20"
         " --eps-warmup 0 --device cpu").split()  # fmt: skip


def start(*arguments, cwd, **environment):
    """`python cli.py ARGUMENTS` in a process of its own, in pipes."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes)


def call(monkeypatch, capsys, *arguments):
    """The same inside this process, several times faster. Returns: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["cli.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def contents(folder):
    """Every file and folder below a folder, with its bytes."""
    paths = (p for p in sorted(folder.rglob("*")) if "__pycache__" not in p.parts)
    return {p: p.read_bytes() if p.is_file() else None for p in paths}


def read_history(folder):
    """history.csv as a list of dicts, without the columns in seconds."""
    with open(folder / "history.csv", newline="") as file:
        return [{k: v for k, v in r.items() if "seconds" not in k} for r in csv.DictReader(file)]


def test_options_are_the_fields_of_config(monkeypatch, capsys):
    parameters, panel = inspect.signature(cli.train).parameters, None
    fields = {f.name: f for f in dataclasses.fields(ebm_at.Config)}
    assert set(parameters) - {"preset", "out", "resume", "quiet"} == set(fields)
    for name, f in fields.items():
        option, panel = parameters[name].annotation.__metadata__[0], cli.PANELS.get(name, panel)
        assert parameters[name].default is None, "None: the recipe decides"
        assert option.help.startswith(f.metadata["note"]) and option.rich_help_panel == panel
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call(monkeypatch, capsys, "train", "--help")
    assert code == 0 and all("--" + name.replace("_", "-") in out for name in fields)


def test_parse_eps():
    assert [cli.parse_eps(text) for text in ("8/255", "0.031", "2e-2")] == [8 / 255, 0.031, 0.02]


def test_a_run_writes_and_says_what_the_readme_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, "train", "--der", *QUICK)
    assert (code, err) == (0, "")
    folder = tmp_path / "runs" / "shapes-fgsm-der-1"
    promised = {"config.json", "history.csv", "result.json", "last.pt", "best.pt"}
    assert promised <= {p.name for p in folder.iterdir()} <= promised | {"curves.png"}
    config = json.loads((folder / "config.json").read_text())
    assert config["der"] is True and [r["epoch"] for r in read_history(folder)] == ["1", "2"]
    assert (folder / "history.csv").read_text().startswith(",".join(ebm_at.HISTORY) + "\n")
    result = json.loads((folder / "result.json").read_text())
    model, _ = ebm_at.load_model(folder / "last.pt")
    data = ebm_at.load_data("shapes")
    again = ebm_at.evaluate(model, data.x_test[:20], data.y_test[:20], 20 / 255)
    assert result["attack"]["n"] == 20
    assert result["last"]["pgd_acc"] == pytest.approx(again["pgd_acc"])
    head, *lines = out.splitlines()
    assert "fgsm + DER on shapes" in head and "eps 20/255" in head
    assert all(len(line) <= 80 for line in lines[:3]) and "verdict: " in out and "\x1b" not in out
    assert ("curves.png" in out) == (folder / "curves.png").exists()
    assert ("pip install matplotlib" in out) != (folder / "curves.png").exists()
    assert lines[-1] == "Next: python cli.py attack runs/shapes-fgsm-der-1"
    code, out, _ = call(monkeypatch, capsys, "train", "--der", "--quiet", *QUICK)
    assert (tmp_path / "runs" / "shapes-fgsm-der-2").is_dir() and "fgsm + DER on" not in out


def test_after_a_collapse_the_same_command_with_der_is_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ebm_at.Trainer, "verdict", lambda _: ("CO", "It collapsed"))
    _, out, _ = call(monkeypatch, capsys, "train", "--out", "my run", *QUICK)
    assert out.splitlines()[-1] == f"Next: python cli.py train {' '.join(QUICK)} --der"


def test_own_images_through_the_command_line(tmp_path, monkeypatch, capsys):
    """Grey 28x28 images of four classes, the MedMNIST way."""
    monkeypatch.chdir(tmp_path)
    write_npz("mine.npz", size=28)
    options = "--dataset mine.npz --model small --method pgd --attack-steps 2 --out r".split()
    assert call(monkeypatch, capsys, "train", *options, *QUICK)[::2] == (0, "")
    spec = ebm_at.load_checkpoint(tmp_path / "r" / "last.pt")["spec"]
    assert (spec["num_classes"], spec["in_channels"]) == (4, 1)


def test_a_preset_never_lends_its_l_inf_eps_to_l2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, capsys, "train", "--preset", "ro", "--norm", "l2", "--out", "r", *QUICK)
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["eps"] == pytest.approx(128 / 255) and config["method"] == "pgd"


BAD = {
    "--dataset cifer10": (2, "did you mean 'cifar10'"),
    "--method fsgm": (2, "'fsgm' is not one of"),
    "--eps 8": (2, "8/255"),
    "--eps abc": (2, "'abc' is not a number"),
    "--attack-step 2/0": (2, "'2/0' is not a number"),
    "--epochs 0": (2, "epochs must lie in 1"),
    "--lr nan": (2, "lr must lie in"),
    "--out=": (2, "empty value"),
    "--out full": (1, "'full' exists"),
    "--resume nowhere": (1, "no run folder"),
    "--resume damaged": (1, "damaged"),
    "--resume hostile": (1, "not loaded"),
    "--resume finished": (1, "finished"),
    "--resume damaged --epochs 30": (2, "--resume takes every setting"),
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_gets_one_clear_line(arguments, tmp_path, monkeypatch, capsys):
    for name in ("full", "damaged", "hostile", "finished"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not touch")
    (tmp_path / "damaged" / "last.pt").write_bytes(b"PK\x03\x04 half a file")
    (tmp_path / "hostile" / "last.pt").write_bytes(pickle.dumps(Payload()))
    (tmp_path / "finished" / "result.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    code, words = BAD[arguments]
    got, out, err = call(monkeypatch, capsys, "train", "--quiet", *arguments.split())
    assert got == code and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert "Traceback" not in out + err
    assert contents(tmp_path) == before, "bad input creates, changes and runs nothing"


@pytest.mark.parametrize("error, line, code", [
    (KeyboardInterrupt(15), "stopped", 143),
    (PermissionError(13, "Permission denied", "x.pt"), "'x.pt': Permission denied", 1),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory", 1),
    (OverflowError("int too large"), "too large", 2),
])  # fmt: skip
def test_whatever_ends_the_program_is_one_line_and_a_code(error, line, code):
    said, found = cli.explain(error)
    assert line in said and found == code


def test_odd_names_neither_command_the_terminal_nor_stop_a_narrow_one(tmp_path):
    assert cli.printable("\x1b]0;a\x07 é\udcff\n") == "\\x1b]0;a\\x07 é\\udcff\n"
    process = start("train", "--dataset", "\x1b猫.npz", cwd=tmp_path, PYTHONIOENCODING="cp1252")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and "\\x1b\\u732b.npz" in err and err.count("\n") == 1


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number, code, tmp_path):
    process = start("train", *QUICK, "--epochs", "500", "--out", "r", cwd=tmp_path)
    while not process.stdout.readline().startswith("     2 "):
        assert process.poll() is None
    process.send_signal(number)
    process.send_signal(number)  # a second one must not cost what the first is saving
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and err.startswith("stopped") and err.count("\n") == 1
    assert "python cli.py train --resume r" in err and not (tmp_path / "r" / ".lock").exists()
    assert ebm_at.load_checkpoint(tmp_path / "r" / "last.pt")["epoch"] >= 2


def test_a_killed_run_resumes_to_the_very_numbers_of_a_whole_one(tmp_path, monkeypatch, capsys):
    options = [*QUICK, "--epochs", "5", "--method", "pgd", "--attack-steps", "2"]
    process = start("train", *options, "--out", "cut", cwd=tmp_path)
    while not process.stdout.readline().startswith("     2 "):
        assert process.poll() is None
    process.kill()
    process.communicate()
    (tmp_path / "cut" / "last.pt.77.partial").write_bytes(b"half")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    for arguments in (["--out", "whole", *options], ["--resume", "cut"]):
        code, _, err = call(monkeypatch, capsys, "train", "--quiet", *arguments)
        assert (code, err) == (0, "")
    torch.set_num_threads(threads)
    assert read_history(tmp_path / "cut") == read_history(tmp_path / "whole")
    whole, cut = (ebm_at.load_checkpoint(tmp_path / d / "last.pt") for d in ("whole", "cut"))
    assert all(torch.equal(v, cut["model"][k]) for k, v in whole["model"].items())
    assert not list((tmp_path / "cut").glob("*.partial"))


def test_a_run_that_another_process_works_on_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").mkdir()
    for option in ("--resume", "--out"):
        cli.hold(tmp_path / "r")  # main() lets all go
        code, _, err = call(monkeypatch, capsys, "train", option, "r")
        assert code == 1 and "another process works on 'r'" in err and err.count("\n") == 1


def test_a_run_whose_output_fails_at_once_leaves_nothing(tmp_path):
    process = start("train", *QUICK, "--out", "r", cwd=tmp_path)
    process.stdout.close()
    assert process.wait(timeout=100) == 1
    assert process.stderr.read() == "error: the output has ended: Broken pipe\n"
    assert not list(tmp_path.iterdir())


def test_the_time_left_is_as_fast_as_all_so_far(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    with cli.Bar("working", 100) as bar:
        for now[0], done in ((9.0, 10), (20.0, 25), (29.0, 30), (40.0, 80)):
            bar.to(done, "a part")
    assert capsys.readouterr().out.splitlines() == [
        "working: 25% a part (about 60 s left)", "working: 80% a part (about 10 s left)"
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_keep_one_history(tmp_path):
    """torchrun, gloo on the CPU: one folder, one line per epoch, a finished run."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(ROOT / "cli.py"), "train", *QUICK, "--out", "two"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Next: ") == 1 and len(read_history(tmp_path / "two")) == 2


@pytest.mark.slow
def test_fgsm_collapses_on_shapes_and_der_prevents_it(tmp_path):
    """The two commands the README opens with, seed 0, with the bounds it promises."""
    runs = {name: start("train", "--quiet", "--out", name, *extra, cwd=tmp_path)
            for name, extra in (("plain", []), ("der", ["--der"]))}  # fmt: skip
    results = {}
    for name, process in runs.items():
        _, err = process.communicate()
        assert process.returncode == 0, err
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
    assert results["plain"]["verdict"] == "CO" and results["plain"]["last"]["pgd_acc"] <= 0.1
    assert results["plain"]["best"]["pgd_acc"] >= 0.18, "it was robust before"
    assert results["der"]["verdict"] == "healthy" and results["der"]["last"]["pgd_acc"] >= 0.28
    assert results["der"]["last"]["clean_acc"] >= 0.5


def stored(folder, pattern):
    """Folders of the runs that tutorials/results keeps."""
    runpy.run_path(str(LOGS.parents[1] / "logs.py"))["unpack"](str(LOGS), folder, pattern)
    return sorted(folder.glob(pattern))


def test_compare_gives_runs_that_differ_by_their_seed_one_row(tmp_path, monkeypatch, capsys):
    """On stored logs, whose settings have fields that are gone (ema, probe_every)."""
    plain, der = stored(tmp_path, "shapes-fgsm-seed*"), stored(tmp_path, "shapes-fgsm-der-seed0")
    code, out, err = call(monkeypatch, capsys, "compare", *plain, *der)
    last = [json.loads((run / "result.json").read_text())["last"]["pgd_acc"] for run in plain]
    assert code == 0 and " / ".join(f"{100 * v:.1f}" for v in last) in out, err
    assert [line.split("|")[1].strip() for line in out.splitlines()[3:5]] == ["plain", "--der"]


def test_compare_calls_a_run_by_the_options_that_make_it_again(tmp_path, monkeypatch, capsys):
    """What all runs share is left out, and so is what the recipe gives (here beta .5, on AAEs)."""
    runs = stored(tmp_path, "cifar-fgsm-der*seed0")
    _, out, _ = call(monkeypatch, capsys, "compare", *runs)
    names = [line.split("|")[1].strip() for line in out.splitlines()[3:5]]
    assert sorted(names) == ["--der", "--der --beta 1.5 --der-on all --der-ramp 0.7"]
    _, out, _ = call(monkeypatch, capsys, "compare", runs[0])
    assert "--limit 10000" in out and "--der --epochs 15" in out and "--beta" not in out


def test_compare_names_what_it_cannot_compare(tmp_path, monkeypatch, capsys):
    run, older = stored(tmp_path, "shapes-fgsm-seed[01]")
    rows = (older / "history.csv").read_text().replace("train_adv_aae", "something_else")
    (older / "history.csv").write_text(rows)
    for runs, code, words in (
        (["nothing"], 1, "'nothing' is no finished run"),
        ([run, run], 2, "two runs of '--precision bf16'"),
        ([older], 1, "train_adv_aae"),  # the column that it lacks
    ):
        got, _, err = call(monkeypatch, capsys, "compare", *runs)
        assert got == code and words in err and err.count("\n") == 1
