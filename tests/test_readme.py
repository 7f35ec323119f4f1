"""The README is held to its word: every command and snippet runs, every name and column exists."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_data import write_folder, write_npz

import ebm_at

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GLOSSARY = (ROOT / "tutorials/results/README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.M | re.S)
COMMANDS = [
    line.partition("#")[0].rpartition("&&")[2].strip()
    for language, text in BLOCKS
    for line in text.splitlines()
    if not language and "cli.py" in line
]
SMALL = "--epochs 1 --width 8 --batch-size 20 --probe-size 20 --test-size 20 --model small --quiet"


def finished_run(folder, **more):
    """A run folder with what a command needs to go on from: last.pt, best.pt, config.json."""
    folder.mkdir(parents=True)
    small = dict(epochs=1, width=8, limit=100, batch_size=20, probe_size=20, test_size=20)
    config, data = ebm_at.recipe(**small | more), ebm_at.load_data("shapes", limit=100)
    list(ebm_at.train(config, data, folder=folder))


def test_snippet_runs(capsys, tmp_path, monkeypatch):
    """As a reader would paste it, after the command that it says has been run."""
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "runs/shapes-fgsm-der-1", der=True)
    names = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "README.md", "exec"), names)
    assert 0 <= names["found"]["robust_acc"] <= names["found"]["clean_acc"] <= 1
    assert names["images"].shape == (100, 3, 32, 32)
    assert len(capsys.readouterr().out.splitlines()) >= 1 + 4 + 1


def test_ideas_are_where_the_table_says():
    table = README.partition("| idea of the paper |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", table.partition("\n")[2])
    assert len(named) > 15 and not [name for name in named if not hasattr(ebm_at, name)]


def test_glossary_names_every_column():
    attack = (ROOT / "tutorials/results/energies-pgd.csv").read_text().splitlines()[0].split(",")
    for column in ebm_at.HISTORY + attack:
        assert re.search(rf"^\|[^|]*\b{column}\b[^|]*\|", GLOSSARY, flags=re.M), column


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, tmp_path):
    """As written, made small; where a run is needed first, it is there."""
    write_npz(tmp_path / "mine.npz", 60, 32, 3)
    write_folder(tmp_path / "my/folder", classes="abcdef", side=(32, 32, 3))

    def run(line):
        words = [str(ROOT / "cli.py") if w == "cli.py" else w for w in shlex.split(line)]
        start = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
        return subprocess.run([sys.executable, *start, *words[1:]], cwd=tmp_path,
                              capture_output=True, text=True)  # fmt: skip

    word = re.search(r"cli\.py (\w+)", command)[1]
    small = {"train": SMALL, "attack": "--limit 20 --queries 20 --steps 5 --device cpu",
             "generate": "--per-class 2 --steps 3 --no-metrics --device cpu",
             "compare": ""}[word]  # fmt: skip
    if "--resume" in command:
        finished_run(tmp_path / shlex.split(command)[-1])
        small = ""
    elif word == "compare":
        for folder in shlex.split(command)[3:]:
            options = f"--limit 100 {SMALL} --out {folder}{' --der' * ('-der-' in folder)}"
            assert run(f"python cli.py train {options}").returncode == 0
    elif word != "train":
        finished_run(tmp_path / "runs/shapes-fgsm-1")
    elif "--dataset" not in command:
        small += " --limit 100"
    done = run(f"{command} {small}")
    if "cifar10" in command and done.returncode:  # no network: it says what to put where
        assert done.returncode == 1 and "--data-dir" in done.stderr
        return
    assert done.returncode == 0, done.stderr
