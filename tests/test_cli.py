"""The command line: its surface, its run folders, and one clear line for every kind of bad input."""

import csv
import dataclasses
import inspect
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cli
import ebm_at

ROOT = Path(__file__).resolve().parents[1]
QUICK = "--limit 60 --batch-size 20 --epochs 2 --width 8 --probe-size 20 --test-size 20 --device cpu".split()


def run(*arguments, cwd, **environment):
    """`python cli.py train ARGUMENTS` in a process of its own, in a pipe."""
    command = [sys.executable, str(ROOT / "cli.py"), "train", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)


def call(monkeypatch, capsys, *arguments):
    """The same inside this process, several times faster. Returns: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["cli.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def read_history(folder):
    """history.csv as a list of dicts, without the columns in seconds."""
    with open(folder / "history.csv", newline="") as file:
        return [{k: v for k, v in r.items() if "seconds" not in k} for r in csv.DictReader(file)]


# ----------------------------------------------------------------------------------------- the surface


def test_options_are_the_fields_of_config():
    parameters = inspect.signature(cli.train).parameters
    own = {"preset", "out", "resume", "quiet"}
    assert set(parameters) - own == {f.name for f in dataclasses.fields(ebm_at.Config)}
    for f in dataclasses.fields(ebm_at.Config):
        assert parameters[f.name].default is None, "None: the recipe decides"
        option = parameters[f.name].annotation.__metadata__[0]
        assert option.help.startswith(f.metadata["note"])
        assert option.rich_help_panel == f.metadata["panel"]


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = call(monkeypatch, capsys, "train", "--help")
    assert code == 0
    for f in dataclasses.fields(ebm_at.Config):
        assert "--" + f.name.replace("_", "-") in out
    assert "8/255" in out and "Regularizers" in out


@pytest.mark.parametrize(
    "text, value", [("8/255", 8 / 255), ("0.031", 0.031), ("1/2", 0.5), ("8", 8.0), ("2e-2", 0.02)]
)
def test_parse_eps(text, value):
    assert cli.parse_eps(text) == pytest.approx(value)


def test_run_folder_holds_what_the_readme_promises(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, "train", "--der", *QUICK)
    assert (code, err) == (0, "")
    folder = tmp_path / "runs" / "shapes-fgsm-der-1"
    promised = {"config.json", "history.csv", "result.json", "last.pt", "best.pt"}
    assert promised <= {p.name for p in folder.iterdir()} <= promised | {"curves.png"}
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["der"] is True and config["epochs"] == 2 and config["eps"] == pytest.approx(20 / 255)
    )
    assert [r["epoch"] for r in read_history(folder)] == ["1", "2"]
    with open(folder / "history.csv") as file:
        assert file.readline().strip() == ",".join(ebm_at.HISTORY)
    result = json.loads((folder / "result.json").read_text())
    assert result["attack"]["n"] == 20 and result["attack"]["eps"] == pytest.approx(20 / 255)
    model, _ = ebm_at.load_model(folder / "last.pt")
    data = ebm_at.load_data("shapes")
    again = ebm_at.evaluate(model, data.x_test[:20], data.y_test[:20], 20 / 255)
    assert result["last"]["pgd_acc"] == pytest.approx(again["pgd_acc"])
    assert "epoch   1/2" in out and "epoch   2/2" in out and "verdict" in out
    assert "\x1b" not in out, "no colours or cursor movements in a pipe"
    call(monkeypatch, capsys, "train", "--der", *QUICK)
    assert (tmp_path / "runs" / "shapes-fgsm-der-2").is_dir()


def test_quiet_prints_the_result_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(monkeypatch, capsys, "train", "--quiet", "--out", "r", *QUICK)
    assert code == 0 and "verdict" in out and "epoch   1/2" not in out


def test_npz_through_the_command_line(tmp_path, monkeypatch, capsys):
    """Grey 28x28 images of three classes, the MedMNIST way, with a validation split of their own."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 90), ("val", 30), ("test", 30)):
        arrays[f"{split}_images"] = random.integers(0, 256, (n, 28, 28), np.uint8)
        arrays[f"{split}_labels"] = random.integers(0, 3, (n, 1)).astype(np.uint8)
    np.savez(tmp_path / "mine.npz", **arrays)
    monkeypatch.chdir(tmp_path)
    quick = [a for a in QUICK]
    quick[1] = "0"
    code, _, err = call(
        monkeypatch, capsys, "train", "--dataset", "mine.npz", "--model", "small", "--method", "pgd",
        "--attack-steps", "2", "--out", "r", *quick,
    )  # fmt: skip
    assert (code, err) == (0, "")
    spec = ebm_at.load_checkpoint(tmp_path / "r" / "last.pt")["spec"]
    assert (spec["num_classes"], spec["in_channels"]) == (3, 1)


def test_sparkline():
    assert cli.sparkline([0, 0.5, 1, 9], 0, 1) == "▁▅██"


# -------------------------------------------------------------------------------------------- bad input


class Evil:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def prepare(tmp_path):
    """Files that the bad calls below stumble over."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not touch")
    (tmp_path / "plain.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name in ("damaged", "foreign", "hostile", "finished", "modelonly"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "last.pt").write_bytes(b"PK\x03\x04 half a file")
    torch.save({"state_dict": {}}, tmp_path / "foreign" / "last.pt")
    (tmp_path / "hostile" / "last.pt").write_bytes(pickle.dumps(Evil(tmp_path / "hacked")))
    (tmp_path / "finished" / "result.json").write_text("{}")
    torch.save({"format": "ebm-at 1"}, tmp_path / "modelonly" / "last.pt")
    np.savez(tmp_path / "keys.npz", images=np.zeros((4, 8, 8), np.uint8))
    good = dict(train_images=np.full((20, 8, 8), 99, np.uint8), train_labels=np.arange(20) % 2)
    test = dict(test_images=np.full((4, 8, 8), 99, np.uint8), test_labels=np.arange(4) % 2)
    np.savez(tmp_path / "float.npz", **good | test | dict(train_images=np.zeros((20, 8, 8))))
    np.savez(tmp_path / "range.npz", **good | test | dict(test_labels=np.full(4, 7)))
    np.savez(
        tmp_path / "shape.npz", **good | test | dict(train_images=np.zeros((20, 8, 9), np.uint8))
    )
    np.savez(tmp_path / "pickled.npz", **good | test | dict(train_labels=np.array([{}] * 20)))


BAD = [
    ("--dataset cifer10", 2, "did you mean 'cifar10'"),
    ("--dataset no/such/folder", 1, "no/such/folder"),
    ("--dataset nowhere.npz", 1, "nowhere.npz"),
    ("--dataset plain.txt", 1, "plain.txt"),
    ("--dataset empty/", 1, "one train/"),
    ("--dataset keys.npz", 2, "train_images"),
    ("--dataset float.npz", 2, "uint8"),
    ("--dataset range.npz", 2, "0..1"),
    ("--dataset shape.npz", 2, "(20, 8, 9"),
    ("--dataset pickled.npz", 1, "pickled.npz"),
    ("--method fsgm", 2, "did you mean 'fgsm'"),
    ("--model resnet18", 2, "did you mean 'preactresnet18'"),
    ("--preset or", 2, "ro"),
    ("--eps 8", 2, "8/255"),
    ("--eps -1", 2, "above 0"),
    ("--eps abc", 2, "'abc' is not a number"),
    ("--eps 0/0", 2, "'0/0' is not a number"),
    ("--eps 0", 2, "above 0"),
    ("--batch-size 100000", 2, "exceeds"),
    ("--batch-size 1", 2, "batch_size must be at least 2"),
    ("--epochs 0", 2, "epochs must be at least 1"),
    ("--epochs -5", 2, "epochs must be at least 1"),
    ("--epochs many", 2, "--epochs"),
    ("--limit 3", 2, "limit 3"),
    ("--val-fraction 1.5", 2, "val_fraction"),
    ("--lr nan", 2, "lr must be positive"),
    ("--no-such-option", 2, "--no-such-option"),
    ("--device cuda:9", 1, "cuda:9"),
    ("--device gpu", 1, "gpu"),
    ("--device meta", 1, "meta"),
    ("--width 1000000", 2, "at most 512"),
    ("--epochs 99999999999999999999", 2, "too large"),
    ("--out=", 2, "empty value"),
    ("--precision fp8", 2, "precision"),
    ("--out full", 1, "nothing was touched"),
    ("--out plain.txt", 1, "plain.txt"),
    ("--out plain.txt/run", 1, "cannot write"),
    ("--resume nowhere", 1, "no run folder"),
    ("--resume empty", 1, "no checkpoint"),
    ("--resume damaged", 1, "damaged"),
    ("--resume foreign", 1, "not a checkpoint of this project"),
    ("--resume hostile", 1, "not loaded"),
    ("--resume finished", 1, "finished"),
    ("--resume modelonly", 1, "model only"),
    ("--resume damaged --epochs 30", 2, "--resume takes every setting"),
]


@pytest.mark.parametrize("arguments, code, words", BAD, ids=[b[0] for b in BAD])
def test_bad_input_gets_one_clear_line(arguments, code, words, tmp_path, monkeypatch, capsys):
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    got, out, err = call(monkeypatch, capsys, "train", "--quiet", *arguments.split())
    assert got == code
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert "Traceback" not in out + err
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert before == after, "bad input creates, changes and runs nothing"


def test_unknown_command_is_one_line(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "tarin")
    assert code == 2 and err.count("\n") == 1 and "tarin" in err


def test_full_disk_keeps_the_older_checkpoint(tmp_path, monkeypatch, capsys):
    """From the second epoch on, writing a checkpoint fails half-way."""
    monkeypatch.chdir(tmp_path)
    real, calls = torch.save, []

    def full(checkpoint, path):
        calls.append(path)
        if len(calls) > 4:  # two files at the start, two after epoch 1
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(checkpoint, path)

    monkeypatch.setattr(torch, "save", full)
    code, _, err = call(monkeypatch, capsys, "train", "--out", "r", *QUICK)
    assert code == 1 and "disk full" in err and err.count("\n") == 1
    assert ebm_at.load_checkpoint(tmp_path / "r" / "last.pt")["epoch"] == 1
    assert not list((tmp_path / "r").glob("*.partial"))


def test_diverging_run_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = [*QUICK, "--lr", "1e30", "--schedule", "constant"]
    code, _, err = call(monkeypatch, capsys, "train", "--out", "r", *options)
    assert code == 1 and re.search(r"at step \d+ of epoch 1", err) and "lower lr" in err
    assert ebm_at.load_checkpoint(tmp_path / "r" / "last.pt")["epoch"] == 0


# --------------------------------------------------------------------------- interrupted and continued


def start(*arguments, cwd):
    command = [sys.executable, str(ROOT / "cli.py"), "train", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number, code, tmp_path):
    options = [*QUICK, "--epochs", "500", "--out", "r"]
    process = start(*options, cwd=tmp_path)
    while "epoch   2/" not in process.stdout.readline():
        pass
    process.send_signal(number)
    process.send_signal(number)  # a second one must not cost what the first is saving
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and err.startswith("stopped") and err.count("\n") == 1
    assert "python cli.py train --resume r" in err
    assert ebm_at.load_checkpoint(tmp_path / "r" / "last.pt")["epoch"] >= 2


def killed_and_resumed(tmp_path, kills, epochs, seed):
    """Kills a run with SIGKILL at random moments and resumes it each time; compares histories."""
    options = [*QUICK, "--epochs", epochs, "--method", "pgd", "--attack-steps", "2", "--ema", "0.9"]
    assert run(*options, "--out", "whole", cwd=tmp_path).returncode == 0
    random, folder = np.random.default_rng(seed), tmp_path / "cut"
    process, done = start(*options, "--out", "cut", cwd=tmp_path), 0
    while done < kills:
        while not (folder / "last.pt").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 6))
        if process.poll() is not None:
            break  # it was faster than the dice
        process.kill()
        process.communicate()
        done += 1
        process = start("--resume", "cut", cwd=tmp_path)
    process.communicate()
    if not (folder / "result.json").exists():
        assert run("--resume", "cut", cwd=tmp_path).returncode == 0
    assert read_history(folder) == read_history(tmp_path / "whole")
    whole, cut = (ebm_at.load_checkpoint(tmp_path / d / "last.pt") for d in ("whole", "cut"))
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, cut["model"][name]), name
    return done


@pytest.mark.slow
def test_kill_and_resume_gives_the_same_history(tmp_path):
    kills = int(os.environ.get("EBM_AT_KILLS", 3))
    assert killed_and_resumed(tmp_path, kills, 12 * kills, seed=0) == kills


@pytest.mark.slow
def test_two_processes_give_the_history_of_one(tmp_path):
    """torchrun, gloo on the CPU, fp32: the same global batches, so the same numbers to 1e-3.

    An epoch is one step here, DER's mean over abnormal images is one over both processes', and the
    attack is the smooth one (l_2): the sign in FGSM turns rounding errors of 1e-7 into other
    gradients, so that longer runs part ways, as two runs with different numbers of threads do.
    """
    options = "train --limit 40 --batch-size 40 --epochs 3 --width 8 --probe-size 100".split()
    options += "--test-size 100 --device cpu --precision fp32 --augment crop-flip".split()
    options += "--schedule constant --lr 0.02 --method rs-fgsm --norm l2 --eps 0.5".split()
    options += "--der --beta 1 --der-ramp 0 --der-on abnormal".split()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in (("one", [sys.executable]), ("two", torchrun)):
        command = [*launcher, str(ROOT / "cli.py"), *options, "--out", name]
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    one, two = (read_history(tmp_path / d) for d in ("one", "two"))
    assert len(one) == len(two) == 3
    for a, b in zip(one, two):
        for key in set(a) - {"verdict"}:
            assert float(a[key]) == pytest.approx(float(b[key]), abs=1e-3), key


# ---------------------------------------------------------------------- folders, locks, terminals


def test_a_run_that_another_process_works_on_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r").mkdir()
    cli.hold(tmp_path / "r" / ".lock", "r")
    for option in ("--resume", "--out"):
        code, _, err = call(monkeypatch, capsys, "train", option, "r")
        assert code == 1 and "another process works on 'r'" in err and err.count("\n") == 1
        cli.hold(tmp_path / "r" / ".lock", "r")  # main() has let all go


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cli.make_run_folder(ebm_at.recipe(limit=60, batch_size=20, epochs=1, width=8, probe_size=20,
                                      test_size=20, device="cpu"), "r")  # fmt: skip
    cli.HELD.pop_all()
    assert {p.name for p in (tmp_path / "r").iterdir()} == {".lock", "config.json"}
    code, _, err = call(monkeypatch, capsys, "train", "--resume", "r", "--quiet")
    assert (code, err) == (0, "") and (tmp_path / "r" / "result.json").exists()


def test_a_run_whose_output_fails_at_once_leaves_nothing(tmp_path, monkeypatch, capsys):
    def broken(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.Terminal, "say", broken)
    code, _, err = call(monkeypatch, capsys, "train", *QUICK)
    assert code == 1 and err == "error: the output has ended: Broken pipe\n"
    assert not list(tmp_path.iterdir())


def test_a_dangling_link_named_runs_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to("nowhere")
    code, _, err = call(monkeypatch, capsys, "train", *QUICK)
    assert code == 1 and "runs/shapes-fgsm-1" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error, line, code",
    [
        (KeyboardInterrupt(15), "stopped", 143),
        (cli.Stopped(KeyboardInterrupt(), "r is saved"), "stopped: r is saved", 130),
        (PermissionError(13, "Permission denied", "x.pt"), "'x.pt': Permission denied", 1),
        (OSError(28, "No space left on device"), "the output has ended", 1),
        (MemoryError(), "out of memory", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory", 1),
        (SystemExit(0), "ended the program", 1),
        (OverflowError("int too large"), "too large", 2),
    ],
)
def test_whatever_ends_the_program_is_one_line_and_a_code(error, line, code):
    said, found = cli.explain(error)
    assert line in said and found == code


def test_names_cannot_command_the_terminal():
    assert cli.printable("\x1b]0;a\x07 é\udcff\n") == "\\x1b]0;a\\x07 é\\udcff\n"


class Run:
    """What Display reads of a Trainer: 300 training, 100 validation and 200 test images."""

    class data:
        y_train, y_val, y_test = range(300), range(100), range(200)

    config, dtype = ebm_at.Config(probe_size=40, test_size=0, epochs=10), torch.float32
    history = [dict.fromkeys(ebm_at.HISTORY, 1.0) | {"epoch": 100, "verdict": "healthy"}]
    history[0] |= {"train_loss": 123.456, "delta_energy_fgsm": -123.45, "delta_energy_pgd": 123.45}


def test_time_left_counts_the_measuring_at_the_end():
    Run.history[0] |= {"seconds": 6.0, "probe_seconds": 1.4}  # 40 + 20 + 10 images: .02 s each
    display = cli.Display(Run, quiet=True)
    assert display.total == pytest.approx(10 + 2 * 200 * 0.02 / 7.4)
    assert display.share == pytest.approx(6 / 7.4)


def test_the_table_of_a_run_fits_into_80_columns():
    with open(os.devnull, "w") as nowhere:
        console = cli.Terminal(width=80, record=True, file=nowhere)
        console.print(cli.Display(Run, quiet=True).picture())
    shown = console.export_text()
    assert all(name in shown for name in cli.Display.COLUMNS) and "…" not in shown


# ------------------------------------------------------------------------- the demonstrations themselves


@pytest.mark.slow
def test_fgsm_collapses_on_shapes_and_der_prevents_it(tmp_path):
    """The two commands the README opens with, seed 0, with the bounds it promises."""
    results = {}
    for name, extra in (("plain", []), ("der", ["--der"])):
        done = run("--quiet", "--out", name, *extra, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results[name] = json.loads((tmp_path / name / "result.json").read_text())
    assert results["plain"]["verdict"] == "CO" and results["plain"]["last"]["pgd_acc"] <= 0.1
    assert results["plain"]["best"]["pgd_acc"] >= 0.18, "it was robust before"
    assert results["der"]["verdict"] == "healthy" and results["der"]["last"]["pgd_acc"] >= 0.28
    assert results["der"]["last"]["clean_acc"] >= 0.5


@pytest.mark.slow
@pytest.mark.skipif("EBM_AT_CIFAR10" not in os.environ, reason="EBM_AT_CIFAR10 names no npz")
def test_real_cifar10_learns(tmp_path):
    """Two epochs of standard training on real images: far above the 10% of guessing."""
    options = f"--dataset {os.environ['EBM_AT_CIFAR10']} --model small --method none --eps 8/255 --limit 10000"
    options += " --epochs 2 --schedule triangular --lr 0.2 --probe-size 200 --test-size 2000 --quiet --out r"
    done = run(*options.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r" / "result.json").read_text())["last"]["clean_acc"] > 0.3


def test_a_preset_never_lends_its_l_inf_eps_to_l2():
    eps = cli.config_from({"norm": "l2"}, "ro").eps
    assert eps == pytest.approx(128 / 255)
    assert cli.config_from({"norm": "l2", "eps": "1.0"}, "ro").eps == 1.0
    assert cli.config_from({}, "ro").eps == pytest.approx(12 / 255)


@pytest.mark.parametrize(
    "settings, verdict, tries",
    [
        (dict(), "CO", "--der"),
        (dict(der=True), "healthy", "--method pgd"),
        (dict(der=True), "CO", "--der --beta 3.0"),
        (dict(der=True), "at chance", "--der --beta 0.75"),
        (dict(data_dir="/my data"), "CO", "--data-dir '/my data' --der"),
        (dict(norm="l2", eps=0.7), "CO", "--eps 0.7 --norm l2 --der"),
    ],
)
def test_next_command_is_one_step_further_and_can_be_pasted(settings, verdict, tries):
    command = cli.next_command(ebm_at.recipe(**settings), verdict)
    assert command == f"python cli.py train {tries}"


def test_a_network_too_narrow_for_some_processors_is_refused(tmp_path):
    """In a process of its own: on AVX2 torch's kernel for it writes outside its memory."""
    done = run("--width", 4, "--precision", "fp32", "--limit", 60, cwd=tmp_path)
    assert done.returncode == 2 and "width must be at least 8" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------- compare


def test_compare_gives_runs_that_differ_by_their_seed_one_row(monkeypatch, capsys):
    logs = sorted((ROOT / "tutorials/results/train").glob("shapes-fgsm-seed*.json"))
    code, out, err = call(monkeypatch, capsys, "compare", *logs)
    last = [json.loads(log.read_text())["last"]["pgd_acc"] for log in logs]
    assert code == 0 and " / ".join(f"{100 * v:.1f}" for v in last) in out, err


def test_compare_names_what_is_no_run(monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, "compare", tmp_path / "nothing")
    assert code == 1 and "nothing" in err and len(err.splitlines()) == 1


def test_compare_refuses_two_runs_of_one_seed(monkeypatch, capsys):
    log = ROOT / "tutorials/results/train/shapes-fgsm-seed0.json"
    code, _, err = call(monkeypatch, capsys, "compare", log, log)
    assert code == 2 and "two runs of 'plain' with seed 0" in err


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(norm="l2", eps=20 / 255), "--eps"),
        (dict(dataset="cifar10", grad_align=0.2, lr=0.2), "--lr"),
        (dict(dataset="cifar10", method="trades", awp=0.005, awp_warmup=0), "--awp-warmup"),
        (dict(dataset="cifar10", method="mart", model="wrn-34-10", lr=0.01), "--lr"),
    ],
)
def test_options_tell_what_the_recipe_would_choose_otherwise(settings, word):
    words = cli.options_of(ebm_at.recipe(**settings))
    assert any(text.startswith(f"{word} ") for text in words), words
