"""The command line of ebm_at: options, progress, tables, run folders. The science is in ebm_at.py.

python cli.py train --help
"""

import contextlib
import csv
import dataclasses
import hashlib
import importlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import zipfile
from pathlib import Path
from typing import Annotated, Optional

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def stop(number, _frame=None):
    """Ctrl-C or SIGTERM: raises once, so that what there is gets saved, which takes seconds."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    if "main" not in globals():  # the libraries are still loading
        os.write(2, b"stopped\n")
        os._exit(128 + number)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

import numpy
import rich.box
import torch
import torch.distributed
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import ebm_at
from ebm_at import BadInput, Config, RunError, checksum


class Stopped(Exception):
    """(cause, words): `cause` ended the work; the words say what of it is kept all the same."""


HELD = contextlib.ExitStack()  # locks, and new folders if still empty: main() gives them back
app = typer.Typer(add_completion=False, rich_markup_mode="rich")


@app.callback()
def about():
    """Adversarial training through energies: train robust classifiers, watch them overfit."""


# --------------------------------------------------------------------------------------------------
# Options: one per field of ebm_at.Config, with the note and the default that stand there
# --------------------------------------------------------------------------------------------------


def parse_eps(text):
    """ "8/255" or "0.031" -> float. Raises: BadInput."""
    try:
        above, _, below = text.partition("/")
        return float(above) / (float(below) if below else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise BadInput(f"--eps '{text}' is not a number or a fraction such as 8/255") from error


def eps_text(size, norm, digits=3):
    """A distance the way the field writes it: 8/255 for l_inf, a plain number for l_2."""
    return f"{size * 255:.{digits}g}/255" if norm == "linf" else f"{size:.{digits}g}"


def fields_as_options(command):
    """Gives `command(..., **settings)` an option for every field of Config, None when not given."""
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for f in dataclasses.fields(Config):
        default = eps_text(f.default, "linf") if f.name == "eps" else f.default
        shown = "" if f.type is bool else rf" \[default: {default}]"
        option = typer.Option(help=f.metadata["note"] + shown, rich_help_panel=f.metadata["panel"])
        value_type = str if f.name == "eps" else f.type
        kind = Annotated[Optional[value_type], option]
        own.append(
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        )
    command.__signature__ = signature.replace(parameters=own)
    command.__annotations__ = {p.name: p.annotation for p in own}
    return command


def use_threads(wanted, model):
    """Sets, and returns, how many threads the CPU works with: `wanted`, or one for small networks.

    Two threads wait for each other by spinning. On a small network they gain little at best, and
    beside another busy process, or on a virtual machine, they lose several times over. The number
    is kept in config.json: it changes rounding, and so what a resumed run would repeat.
    """
    if not 0 <= wanted <= 1024:
        raise BadInput(f"--threads must lie in 0 .. 1024, not {wanted}")
    wanted = wanted or (1 if model == "small" else torch.get_num_threads())
    torch.set_num_threads(wanted)
    return wanted


def thread_text(threads):
    """ "1 CPU thread", "2 CPU threads"."""
    return f"{threads} CPU thread{'s' * (threads > 1)}"


def absolute(dataset):
    """The absolute path of a data set that is a file or a folder; a name stays as it is."""
    is_path = dataset not in ebm_at.DATASETS and os.path.exists(dataset)
    return os.path.abspath(dataset) if is_path else dataset


def use_data(config, dataset, data_dir):
    """Puts the data that were named into `config`; another set than its own is taken whole."""
    if dataset and absolute(dataset) != config.dataset:
        config.dataset, config.limit = absolute(dataset), 0
    config.data_dir = data_dir or config.data_dir


def config_from(settings, preset):
    """The Config of the options that were given, over the preset's, over the recipe's."""
    given = {k: v for k, v in settings.items() if v is not None}
    if "eps" in given:
        given["eps"] = parse_eps(given["eps"])
    if preset is not None:
        ebm_at.check_choice("preset", preset, ebm_at.PRESETS)
        chosen = dict(ebm_at.PRESETS[preset])
        if given.get("norm") == "l2":
            chosen.pop("eps")  # it is measured in l_inf
        given = chosen | given
    if "dataset" in given:
        given["dataset"] = absolute(given["dataset"])  # a resume from elsewhere finds it
    config = ebm_at.recipe(**given)
    config.data_dir = os.path.abspath(config.data_dir)
    return config


# --------------------------------------------------------------------------------------------------
# The run folder
# --------------------------------------------------------------------------------------------------


def hold(lock, what, new=()):
    """Holds the marker file `lock` until main() ends; if we are killed, the system lets it go.

    new: folders to remove then if they are still empty. Raises: RunError when another holds it.
    """
    file = HELD.enter_context(open(lock, "w"))
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"another process works on '{what}': wait for its end") from error
    except OSError:  # a file system without locks
        pass
    HELD.callback(let_go, Path(lock), new)


def let_go(lock, new):
    """Removes a marker, and folders that nothing was written to."""
    lock.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        for folder in new:
            folder.rmdir()


def claim_folder(out, beside, stem):
    """Makes and holds `out`, or the next free <beside>/<stem>-<n>. Raises: RunError."""
    if out and os.path.lexists(out):
        if not os.path.isdir(out) or set(os.listdir(out)) - {".lock"}:
            raise RunError(f"'{out}' exists: nothing was touched; name a new folder with --out")
    for folder in [Path(out)] if out else (Path(beside, f"{stem}-{n}") for n in itertools.count(1)):
        new = [p for p in (folder, *folder.parents) if not os.path.lexists(p)]
        try:
            folder.mkdir(parents=True, exist_ok=bool(out))
        except OSError as error:
            if not out and os.path.lexists(folder):  # another run's: try the next number
                continue
            reason = f"cannot write to '{folder}' ({error.strerror})"
            raise RunError(f"{reason}; name another with --out") from error
        hold(folder / ".lock", folder, new)
        return folder


def make_run_folder(config, out):
    """Creates and returns `out`, or the next free runs/<dataset>-<method>[-der]-<n>.

    Raises: RunError when it is in use or cannot be made.
    """
    name = f"{Path(config.dataset).stem}-{config.method}{'-der' * config.der}"
    folder = claim_folder(out, "runs", name)
    write_json(folder / "config.json", dataclasses.asdict(config))
    # A run that fails before its first checkpoint leaves nothing; a killed one can begin anew.
    HELD.callback(lambda: (folder / "last.pt").exists() or (folder / "config.json").unlink(True))
    return folder


def write_atomically(path, text):
    """Writes a text file under a temporary name and renames it. Raises: OSError, with its name."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, told):
    """Strict JSON, with null for NaN and infinity, which it has no words for. Raises: OSError."""
    told = json.loads(json.dumps(told), parse_constant=lambda _: None)
    write_atomically(path, json.dumps(told, indent=1, allow_nan=False))


def write_csv(path, rows, keys):
    """Writes dicts as CSV, rewritten whole so that it is never half a row. Raises: OSError."""
    lines = [",".join(keys)]
    for row in rows:
        cells = ["" if row.get(k) is None else row[k] for k in keys]
        cells = [f"{v:.6g}" if isinstance(v, float) else str(v).replace(", ", " ") for v in cells]
        lines.append(",".join(cells))
    write_atomically(path, "\n".join(lines) + "\n")


def find_pyplot():
    """matplotlib.pyplot, drawing into files; None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def draw_curves(folder, rows):
    """curves.png: accuracies, AAEs, delta energies by epoch. Only where matplotlib is installed."""
    if not (pyplot := find_pyplot()):
        return
    epochs = [r["epoch"] for r in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for key, label, style in (
        ("clean_acc", "clean", "-"),
        ("fgsm_acc", "FGSM", "--"),
        ("pgd_acc", "PGD-10", "-o"),
        ("train_adv_aae", "share of AAEs, train", ":"),
    ):
        left.plot(epochs, [100 * r[key] for r in rows], style, label=label, markersize=3)
    left.set(xlabel="epoch", ylabel="test accuracy; share of AAEs (%)", ylim=(0, 100))
    for key, label, style in (
        ("train_adv_delta_energy", "E(x), training attack, train", "-o"),
        ("train_adv_delta_energy_xy", "E(x, y), training attack, train", "-s"),
        ("delta_energy_pgd", "E(x), PGD, test", "--"),
        ("train_delta_energy_pgd", "E(x), PGD, train", ":"),
    ):
        right.plot(epochs, [r[key] for r in rows], style, label=label, markersize=3)
    right.axhline(0, color="grey", linewidth=0.5)
    right.set(xlabel="epoch", ylabel="delta energy E(.) - E(.*), nats")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend()
    right.legend()
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------
# What a terminal shows while training
# --------------------------------------------------------------------------------------------------


def printable(text):
    """The text with control characters, which could command a terminal, written out as \\x1b."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


class Terminal(Console):
    """rich's Console for plain lines; everything that is printed but tables goes through say."""

    def __init__(self, **options):
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def say(self, text, style=None, paste=False):
        """A line that stays; a terminal breaks it between words, unless it is there to `paste`."""
        whole = paste or not self.is_terminal
        self.print(printable(text), style=style, soft_wrap=whole, crop=False)

    def on_broken_pipe(self):
        raise  # to main(): rich itself would end the program without a word


def say(text, quiet=False, style=None, paste=False):
    """A line that stays, however long."""
    Terminal(quiet=quiet).say(text, style, paste)


class Bar:
    """How far a long piece of work is: a bar in a terminal, a line every ten seconds elsewhere."""

    def __init__(self, console, text, total, done=0):
        self.console, self.text, self.total, self.done = console, text, max(total, 1), done
        self.before, self.began, self.told = done, time.monotonic(), time.monotonic()
        self.shown = console.is_terminal and not console.quiet
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[note]}"), TimeElapsedColumn(), console=console,
            transient=True, disable=not self.shown,
        )  # fmt: skip
        self.task = self.bar.add_task(text, total=self.total, completed=done, note="")

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def left(self):
        """How much longer, in words, if the rest goes as fast as all so far."""
        spent = time.monotonic() - self.began
        left = spent * (self.total - self.done) / max(self.done - self.before, 1e-9)
        return f"about {left:.0f} s left" if self.done > self.before else ""

    def to(self, done, note="", total=None):
        """`done` of the total is done; note: in words, what comes now."""
        self.total = total or self.total
        self.done = min(done, self.total)
        self.bar.update(self.task, completed=self.done, total=self.total,
                        note=f"{note} {self.left()}")  # fmt: skip
        if not self.shown and not self.console.quiet and time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            note = note or f"{self.done / self.total:.0%}"
            print(f"{self.text}: {note}  ({self.left()})", flush=True)


def sparkline(values, low, high):
    """Values as a row of bars, eight heights between low and high."""
    bars = "▁▂▃▄▅▆▇█"
    return "".join(bars[round(7 * min(max((v - low) / (high - low), 0), 1))] for v in values)


class Display:
    """Progress of a run: a live table and bar in a terminal, one plain line per epoch elsewhere."""

    COLUMNS = (
        "epoch", "loss", "clean", "FGSM", "PGD-10", "AAE", "dE(x)", "dE(x,y)", "verdict", "s",
    )  # fmt: skip

    def __init__(self, trainer, quiet):
        self.trainer, self.rows, self.quiet = trainer, list(trainer.history), quiet
        self.epochs, self.console, self.live = trainer.config.epochs, Terminal(quiet=quiet), None
        self.bar = Bar(self.console, "training", self.epochs, len(self.rows))
        self.estimate()
        if self.bar.shown:
            self.live = Live(self.picture(), console=self.console, refresh_per_second=4)

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        if self.live:
            self.live.update(self.picture())
            self.live.stop()

    def estimate(self):
        """The share of an epoch that trains, and all there is to do, in epochs, `report`'s
        measuring too; counted in gradients until the first epoch tells the seconds."""
        config, data = self.trainer.config, self.trainer.data
        n, test = config.probe_size, len(data.y_test)
        probed = min(n, len(data.y_val)) + min(n / 2, test) + min(n / 4, len(data.y_train))
        steps = config.attack_steps if ebm_at.METHODS[config.method].multi_step else 1
        train, probe = len(data.y_train) * (steps + 2), 12 * probed
        if self.rows:
            train, probe = self.rows[-1]["seconds"], self.rows[-1]["probe_seconds"]
        final = probe / probed * 2 * min(config.test_size or test, test)  # of last and of best
        final *= 1 + (self.trainer.dtype == torch.bfloat16)  # they are measured in fp32
        self.share, self.total = train / (train + probe), self.epochs + final / (train + probe)

    def on_progress(self, epoch, step, steps):
        text = f"epoch {epoch + 1}/{self.epochs}"
        self.bar.to(epoch + self.share * step / steps, text, self.total)

    def add(self, row):
        """A new epoch."""
        self.rows.append(row)
        self.estimate()
        if self.live:
            self.live.update(self.picture())
        elif not self.quiet:
            self.bar.told = time.monotonic()  # the line below is enough
            self.bar.to(row["epoch"], total=self.total)
            cells = zip(self.COLUMNS[1:], self.cells(row)[1:])
            line = "  ".join(f"{n} {v}" for n, v in cells)
            print(f"epoch {row['epoch']:>3}/{self.epochs}  {line}  ({self.bar.left()})", flush=True)

    @staticmethod
    def cells(row):
        """A history row as the texts of COLUMNS."""
        return [
            str(row["epoch"]), f"{row['train_loss']:.3f}", f"{row['clean_acc']:.1%}",
            f"{row['fgsm_acc']:.1%}", f"{row['pgd_acc']:.1%}", f"{row['train_adv_aae']:.1%}",
            f"{row['train_adv_delta_energy']:+.2f}", f"{row['train_adv_delta_energy_xy']:+.2f}",
            row["verdict"], f"{row['seconds']:.1f}",
        ]  # fmt: skip

    def picture(self):
        """The last epochs as a table, PGD accuracy and share of AAEs as sparklines, and the bar.

        AAE, dE(x) and dE(x,y) are of the training attack on training images, the rest is of test.
        """
        table = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1))  # 80 columns are enough
        for name in self.COLUMNS:
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows[-8:]:
            bad = row["verdict"] in ("CO", "RO")
            table.add_row(*self.cells(row), style="bold red" if bad else None)
        pgd = [r["pgd_acc"] for r in self.rows][-60:]
        aae = [r["train_adv_aae"] for r in self.rows][-60:]
        parts = [table]
        if self.console.encoding.startswith("utf") and self.rows:
            parts.append(f" PGD-10 {sparkline(pgd, 0, max(pgd + [0.3]))} {pgd[-1]:.1%}")
            parts.append(f" AAEs   {sparkline(aae, 0, max(aae + [0.3]))} {aae[-1]:.1%}")
        return Group(*parts, self.bar.bar)


# --------------------------------------------------------------------------------------------------
# train
# --------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Commands")
@fields_as_options
def train(
    preset: Annotated[
        Optional[str], typer.Option(help="a ready-made setting: ro (robust overfitting in minutes)")
    ] = None,
    out: Annotated[
        Optional[str],
        typer.Option(help="the run's folder; default runs/<dataset>-<method>[-der]-<n>"),
    ] = None,
    resume: Annotated[
        Optional[str], typer.Option(help="a run folder: go on where it stopped, with its settings")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but the result")] = False,
    **settings,
):
    """Train a classifier, robustly or not, and say in words whether it overfitted.

    Without options: FGSM training on the embedded data set [bold]shapes[/], the
    demonstration of catastrophic overfitting. Add [bold]--der[/] and it stays away.
    The defaults shown are those of the demonstration; other data sets and methods
    have their own (see recipe in ebm_at.py).
    """
    checkpoint, folder = None, None
    if resume is not None:
        given = [k for k, v in settings.items() if v is not None and k != "device"]
        if given or preset or out:
            raise BadInput(
                "--resume takes every setting from the run; give nothing with it but --device"
            )
        config, checkpoint, folder = open_run(resume)
        config.device = settings["device"] or config.device
    else:
        config = config_from(settings, preset)
    config.threads = use_threads(config.threads, config.model)
    ebm_at.start_processes(config.device)
    leader = ebm_at.world()[0] == 0
    if not leader:  # one process downloads, the others wait and then find the files
        torch.distributed.barrier()
    data = ebm_at.load_data(config.dataset, config.data_dir, config.limit, config.val_fraction)
    if leader and ebm_at.world()[1] > 1:
        torch.distributed.barrier()
    model = ebm_at.build_model(config, data)
    trainer = ebm_at.Trainer(config, data, model, checkpoint)
    if leader and not resume:
        folder = make_run_folder(config, out)
    display = Display(trainer, quiet or not leader)
    display.console.say(
        f"{config.method}{' + DER' * config.der} on {data.name}: {len(data.x_train)} training"
        f" images{f' ({data.note})' * bool(data.note)}, augment {config.augment},"
        f" eps {eps_text(config.eps, config.norm)} ({config.norm}), {config.model},"
        f" {config.epochs} epochs, {trainer.device} {str(trainer.dtype).removeprefix('torch.')},"
        f" {thread_text(config.threads)}, seed {config.seed}"
    )
    with resumable(trainer, folder):
        run(trainer, folder if leader else None, display)
        if leader:
            report(trainer, folder, display)


def is_leader():
    """Whether this process speaks for all that torchrun started."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def config_of(saved, where):
    """The Config kept in a checkpoint, or in config.json. Raises: RunError."""
    try:
        ebm_at.check_parts({"config": saved}, 0)
        return Config(**saved)
    except (AttributeError, TypeError) as error:
        raise RunError(f"'{where}' was made by another version: train it again") from error


def open_run(resume):
    """Config, checkpoint and folder of a run that can go on; held by this process.

    One that was killed before its first checkpoint (None) starts anew. Raises: RunError.
    """
    folder = Path(resume)
    if not folder.is_dir():
        raise RunError(f"no run folder '{resume}'")
    if is_leader():
        hold(folder / ".lock", folder)
        for cut_short in folder.glob("*.partial"):  # by the kill that ended the run
            cut_short.unlink()
    if (folder / "result.json").exists():
        raise RunError(
            f"'{resume}' is finished: see result.json there; start a new run to train longer"
        )
    begun = folder / "config.json"
    if not os.path.lexists(folder / "last.pt") and begun.is_file():
        with contextlib.suppress(ValueError):
            return config_of(json.loads(begun.read_text(encoding="utf-8")), begun), None, folder
    checkpoint = ebm_at.load_checkpoint(folder / "last.pt")
    if "training" not in checkpoint:
        raise RunError(f"'{folder / 'last.pt'}' holds a model only, not the state of a run")
    return config_of(checkpoint["config"], resume), checkpoint, folder


@contextlib.contextmanager
def resumable(trainer, folder):
    """Says, when the run is stopped or its output fails, what is saved and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        if not folder or not (folder / "last.pt").exists():
            raise
        done = trainer.saved_epoch
        saved = f"epochs 1 to {done} are" if done else "the start is"
        command = f"python cli.py train --resume {shlex.quote(str(folder))}"
        words = f"{saved} saved in {folder / 'last.pt'}; go on with: {command}"
        raise Stopped(error, words) from None


def run(trainer, folder, display):
    """Trains to the end, showing and saving every epoch."""
    with display:
        for record in trainer.run(folder, display.on_progress):
            if record["kind"] == "alarm":
                display.console.say(f"ALARM  {record['reason']}  ->  {record['action']}")
                continue
            display.add({k: v for k, v in record.items() if k != "kind"})
            if folder:
                write_csv(folder / "history.csv", display.rows, ebm_at.HISTORY)


def measure(trainer, folder, n, console):
    """Test measurements, in fp32, of the last and of the best model: two dicts."""
    data, config = trainer.data, trainer.config
    x, y = data.x_test[:n], data.y_test[:n]
    text, measured = "measuring the last and the best model", []
    with Bar(console, text, 2 * 14 * n) as bar:  # passes of evaluate: clean 1, FGSM 2, PGD-10 11
        for name in ("last.pt", "best.pt"):
            model, checkpoint = ebm_at.load_model(folder / name, trainer.device)
            model.register_forward_pre_hook(lambda _, inputs: bar.to(bar.done + len(inputs[0])))
            found = ebm_at.evaluate(model, x, y, config.eps, 10, config.norm)
            measured.append({"epoch": checkpoint["epoch"], **found})
    return measured


def report(trainer, folder, display):
    """result.json, curves.png and the closing words of a run."""
    config = trainer.config
    settings, begun = dataclasses.asdict(config), folder / "config.json"
    if begun.exists():  # what was asked for: a rescue changes config
        settings = json.loads(begun.read_text(encoding="utf-8"))
    write_csv(folder / "history.csv", display.rows, ebm_at.HISTORY)  # if killed after the last save
    n = min(config.test_size or len(trainer.data.x_test), len(trainer.data.x_test))
    last, best = measure(trainer, folder, n, display.console)
    verdict, reason = trainer.verdict()
    train_seconds = sum(r["seconds"] for r in display.rows)
    probe_seconds = sum(r["probe_seconds"] for r in display.rows)
    attack = {"name": "PGD-10", "norm": config.norm, "eps": config.eps, "step": config.eps / 4}
    attack |= {"restarts": 1, "start": "random", "n": n, "split": "test", "precision": "fp32"}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"numpy": numpy.__version__, "platform": platform.system()}
    result = {
        "dataset": config.dataset, "method": config.method, "der": config.der, "seed": config.seed,
        "verdict": verdict, "reason": reason, "alarms": trainer.alarms,
        "best": best, "last": last, "attack": attack,
        "seconds": {"training": train_seconds, "measuring": probe_seconds},
        "settings": settings, "device": device_name(trainer.device),
        "precision": str(trainer.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "processes": ebm_at.world()[1], "versions": versions,
    }  # fmt: skip
    try:
        draw_curves(folder, display.rows)
        write_json(folder / "result.json", result)
    finally:  # on a full disk, too
        tell_result(result, folder)
    say(f"Next: {next_command(config, verdict)}", paste=True)


def tell_result(result, folder):
    """The closing words of a run: a table of the last and the best model, and the verdict."""
    eps = eps_text(result["attack"]["eps"], result["attack"]["norm"])
    title = f"test accuracy, {result['attack']['n']} images, eps {eps} ({result['attack']['norm']})"
    table = Table(box=rich.box.SIMPLE_HEAD, title=title)
    for name in ("model", "epoch", "clean", "FGSM", "PGD-10", "E(x)", "dE(x) PGD"):
        table.add_column(name, justify="right")
    for name in ("last", "best"):
        found = result[name]
        table.add_row(
            name, str(found["epoch"]), f"{found['clean_acc']:.1%}", f"{found['fgsm_acc']:.1%}",
            f"{found['pgd_acc']:.1%}", f"{found['energy']:+.2f}",
            f"{found['delta_energy_pgd']:+.2f}",
        )  # fmt: skip
    console, seconds = Terminal(), result["seconds"]
    console.print(table)
    words = (f"{result['reason']}.\n\nTrained {seconds['training']:.0f} s, measured"
             f" {seconds['measuring']:.0f} s. {saved_in(folder)}")  # fmt: skip
    if console.is_terminal:
        colour = "green" if result["verdict"] == "healthy" else "red"
        text, title = Text(printable(words)), f"verdict: {result['verdict']}"
        console.print(Panel(text, title=title, border_style=colour))
    else:
        say(f"verdict: {result['verdict']}\n{words}")


def saved_in(folder):
    """What lies in a folder, in words."""
    names = sorted(p.name for p in folder.iterdir() if p.name != ".lock")
    return f"Saved in {folder}: {', '.join(names)}" if names else f"Nothing is saved in {folder}"


def device_name(device):
    """The device in words: the GPU's name, or the processor's kind and number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def next_command(config, verdict):
    """What a reader would like to try after this run, as a command that keeps its settings."""
    change = {"der": True}
    if config.method == "none" or (config.der and verdict == "healthy"):
        change = {"method": "pgd", "der": False}
    elif config.der:  # too much of it teaches nothing, too little does not hold
        change = {"beta": config.beta / 2 if verdict == "at chance" else 2 * config.beta}
    return " ".join(["python cli.py train", *options_of(dataclasses.replace(config, **change))])


def options_of(config):
    """The options of train that give this Config: what differs from the recipe's, as words."""
    asked = {k: getattr(config, k) for k in ("epochs", "norm", "model", "grad_align", "awp")}
    usual = ebm_at.recipe(config.dataset, config.method, **asked)  # others depend on these five
    vars(usual).update({k: getattr(ebm_at.recipe(config.dataset, config.method), k) for k in asked})
    if os.path.abspath(usual.data_dir) == os.path.abspath(config.data_dir):
        usual.data_dir = config.data_dir  # the same folder, however it is written
    idle = ["threads"] if config.threads == 1 and config.model == "small" else []
    idle += [] if config.der else ["beta", "gamma", "der_on", "der_from", "der_ramp"]
    words = []
    for f in dataclasses.fields(Config):
        value = getattr(config, f.name)
        same = value == getattr(Config() if f.name in ("dataset", "method") else usual, f.name)
        if same or f.name in idle:
            continue
        option = "--" + f.name.replace("_", "-")
        text = eps_text(value, config.norm, 6) if f.name == "eps" else shlex.quote(str(value))
        words.append(option if value is True else f"{option} {text}")
    return words


# --------------------------------------------------------------------------------------------------
# compare
# --------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Commands")
def compare(
    runs: Annotated[list[str], typer.Argument(help="run folders, or logs stored as NAME.json")],
    picture: Annotated[
        Optional[str], typer.Option(help="a new .png: mean and range over seeds, by epoch")
    ] = None,
):
    """Put finished runs side by side: one row for all that differ by their seed only."""
    if picture and Path(picture).exists():
        raise RunError(f"'{picture}' exists: nothing was touched; name a new one")
    found = [read_run(run) for run in runs]
    options = [options_of(Config(**result["settings"] | {"seed": 0})) for result, _ in found]
    shared = [word for word in options[0] if all(word in words for words in options)]
    groups = {}  # by what is not shared by all
    for (result, rows), words in zip(found, options):
        name = " ".join(word for word in words if word not in shared) or "plain"
        if result["seed"] in groups.setdefault(name, {}):
            raise BadInput(f"two runs of '{name}' with seed {result['seed']}: name one of them")
        groups[name][result["seed"]] = result, rows
    if shared:
        say(f"all: python cli.py train {' '.join(shared)}")
    table = Table(box=rich.box.MARKDOWN)
    for name in ("options", "seeds", "clean", "PGD-10, last", "mean", "best", "verdict",
                 "AAEs, last", "training s"):  # fmt: skip
        table.add_column(name, no_wrap=True, justify="left" if name == "options" else "right")
    for name, by_seed in groups.items():
        results, rows = zip(*(by_seed[seed] for seed in sorted(by_seed)))
        last = [f"{100 * r['last']['pgd_acc']:.1f}" for r in results]
        mean = sum(r["last"]["pgd_acc"] for r in results) / len(results)
        told = [", ".join([r["verdict"], *(a["when"] for a in r["alarms"]
                                           if a["verdict"] == r["verdict"])][:2])
                for r in results]  # fmt: skip
        seconds = sorted(r["seconds"]["training"] for r in results)
        table.add_row(
            name, ", ".join(map(str, sorted(by_seed))),
            " / ".join(f"{100 * r['last']['clean_acc']:.1f}" for r in results), " / ".join(last),
            f"{100 * mean:.1f}", " / ".join(f"{100 * r['best']['pgd_acc']:.1f}" for r in results),
            told[0] if len(set(told)) == 1 else " / ".join(told),
            " / ".join(f"{100 * r[-1]['train_adv_aae']:.0f}" for r in rows),
            f"{seconds[len(seconds) // 2]:.0f}",
        )  # fmt: skip
    Console(width=1000, highlight=False).print(table)
    if picture:
        draw_comparison(picture, {k: [rows for _, rows in v.values()] for k, v in groups.items()})


def read_run(run):
    """(result.json, history.csv as dicts of numbers) of a finished run. Raises: RunError."""
    result = Path(run) / "result.json" if Path(run).is_dir() else Path(run)
    history = result.with_name("history.csv") if Path(run).is_dir() else result.with_suffix(".csv")
    try:
        found = json.loads(result.read_text())
        with open(history, newline="") as file:
            rows = [{k: v if k == "verdict" else float(v) for k, v in row.items()}
                    for row in csv.DictReader(file)]  # fmt: skip
        Config(**found["settings"]), rows[-1]["train_adv_aae"]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"'{run}' is no finished run of this version: {error!r}") from error
    return found, rows


def draw_comparison(picture, groups):
    """PGD test error and the share of AAEs, and both delta energies, where training attacks."""
    if not (pyplot := find_pyplot()):
        raise RunError("--picture needs matplotlib: pip install matplotlib")
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    curves = (
        ("pgd_acc", 100, "PGD-10 accuracy on test (%)"),
        ("train_adv_aae", 100, "share of AAEs in training (%)"),
        ("train_adv_delta_energy", 1, "ΔE(x), solid, and ΔE(x, y), dashed (nats)"),
        ("train_adv_delta_energy_xy", 1, None),
    )
    for i, (name, runs) in enumerate(groups.items()):
        epochs = range(1, 1 + min(len(rows) for rows in runs))
        for axes, (key, factor, label) in zip((*panels, panels[-1]), curves):
            values = [[factor * row[key] for row in rows[: len(epochs)]] for rows in runs]
            low, high = (list(map(end, *values)) if len(values) > 1 else values[0]
                         for end in (min, max))  # fmt: skip
            mean = [sum(v) / len(v) for v in zip(*values)]
            style = dict(color=f"C{i}", linestyle="-" if label else "--")
            axes.plot(epochs, mean, label=f"{name} (n = {len(runs)})", **style)
            axes.fill_between(epochs, low, high, color=f"C{i}", alpha=0.15)
            if label:
                axes.set(xlabel="epoch", ylabel=label)
    panels[0].legend(fontsize=8)
    figure.savefig(picture, dpi=120)


# --------------------------------------------------------------------------------------------------
# attack
# --------------------------------------------------------------------------------------------------


@app.command(rich_help_panel="Commands")
def attack(
    checkpoint: Annotated[
        Optional[str],
        typer.Argument(help="a .pt file or a run folder; default best.pt of the newest run"),
    ] = None,
    suite: Annotated[
        str, typer.Option(help="quick, standard (AutoAttack but FAB-T), energy (moves E), or all")
    ] = "standard",
    attacks: Annotated[
        Optional[str], typer.Option(help="instead of a suite, such as fgsm,pgd,square")
    ] = None,
    eps: Annotated[Optional[str], typer.Option(help="radius, 8/255; default: the run's")] = None,
    norm: Annotated[Optional[str], typer.Option(help="linf or l2; default: the run's")] = None,
    steps: Annotated[
        Optional[int], typer.Option(help="of PGD (20) and APGD (100, energy-up 40)")
    ] = None,
    queries: Annotated[int, typer.Option(help="of Square")] = 5000,
    restarts: Annotated[
        int, typer.Option(help="of PGD; PGD-50-10: --attacks pgd --steps 50 --restarts 10")
    ] = 1,
    limit: Annotated[int, typer.Option(help="images, taken evenly; 0 = all of the split")] = 1000,
    batch_size: Annotated[int, typer.Option(help="images at a time")] = 500,
    seed: Annotated[int, typer.Option(help="of all that is random in the attacks")] = 0,
    split: Annotated[str, typer.Option(help="test, val, or train")] = "test",
    dataset: Annotated[Optional[str], typer.Option(help="default: the run's; see train")] = None,
    data_dir: Annotated[Optional[str], typer.Option(help="where its files lie")] = None,
    model_from: Annotated[
        Optional[str],
        typer.Option(help="MODULE:FUNCTION that returns an nn.Module: [0, 1] images to logits"),
    ] = None,
    out: Annotated[
        Optional[str], typer.Option(help="new folder; default attack-<n> beside the checkpoint")
    ] = None,
    save: Annotated[
        Optional[str], typer.Option(help="write the worst-case images there, as float tensors")
    ] = None,
    save_png: Annotated[
        Optional[str], typer.Option(help="new folder for the same as 8-bit PNGs")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one for small, else all")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    precision: Annotated[
        str, typer.Option(help="of the search: auto, bf16, or fp32; judged in fp32 always")
    ] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but the result")] = False,
):
    """Attack a classifier: how robust is it really, and where does each attack move its energies?

    Takes data, eps and norm from the run that made the checkpoint. [bold]--suite standard[/] is
    APGD-CE, targeted APGD and Square, image by image the worst; [bold]--suite energy[/] shows a
    dozen attacks on the same images.
    """
    names = suite if attacks is None else [name.strip() for name in attacks.split(",")]
    check_attack_options(names, limit=limit, steps=steps, queries=queries, restarts=restarts,
                         batch_size=batch_size, seed=seed, split=split,
                         precision=precision)  # fmt: skip
    for path in (p for p in (save, save_png) if p and os.path.lexists(p)):
        raise RunError(f"'{path}' exists: nothing was touched; name a new one")
    if save and not Path(save).parent.is_dir():
        raise BadInput(f"--save '{save}': there is no folder '{Path(save).parent}'; make it first")
    where = ebm_at.pick_device(device)
    model, config, path, known = open_model(checkpoint, model_from, dataset, where)
    spec = model.spec if isinstance(model, ebm_at.PreActResNet) else {}
    threads = use_threads(threads, spec.get("name"))
    use_data(config, dataset, data_dir)
    if norm not in (None, config.norm) and eps is None:
        raise BadInput(f"--norm {norm} needs --eps too: the run's eps is measured in {config.norm}")
    eps, norm = config.eps if eps is None else parse_eps(eps), norm or config.norm
    x, y, data = attacked_images(config, split, limit, where, known, channels_last=not model_from)
    n, c = x.shape[:2]
    if c != (takes := spec.get("in_channels", c)):
        raise BadInput(f"images of '{data.name}' have {c} channels, the model takes {takes}")
    ebm_at.check_attack(x, y, eps, norm)
    chosen = ebm_at.attacks_of(names, norm)
    if restarts > 1 and not any(ebm_at.ATTACKS[name].start for name in chosen):
        raise BadInput("--restarts is for PGD's attacks, RS- and N-FGSM: none was asked for")
    k, classes = ebm_at.check_model(model, x, y, chosen).shape[1], len(known or data.classes)
    warnings = [f"The model has {k} logits, '{data.name}' {classes} classes: do they mean the same"
                " by each label?"] * (k != classes)  # fmt: skip
    folder = claim_folder(out, path.parent if path else "runs", "attack")
    if save:
        hold(f"{save}.lock", save)
    if save_png:
        claim_folder(save_png, None, None)
    told = {
        "checkpoint": str(path or model_from), "dataset": data.name, "split": split, "n": n,
        "sha256": path and hashlib.sha256(Path(path).read_bytes()).hexdigest(),
        "eps": eps, "norm": norm, "suite": names, "steps": steps,
        "queries": queries, "restarts": restarts, "seed": seed,
        "precision": precision, "device": device_name(where), "threads": threads,
        "torch": torch.__version__, "warnings": warnings, "complete": False,
    }  # fmt: skip
    say(
        f"{told['checkpoint']} on {n} {split} images of {data.name}, eps {eps_text(eps, norm)}"
        f" ({norm}), {told['device']}, {thread_text(threads)}",
        quiet,
    )
    settings = {"queries": queries, "restarts": restarts} | ({"steps": steps} if steps else {})
    display = AttackDisplay(names == "standard", chosen, settings, n, quiet)
    scripted = isinstance(model, torch.jit.ScriptModule)  # it takes no hooks: its bar moves less
    watch = contextlib.nullcontext() if scripted else model.register_forward_pre_hook(display.count)
    try:
        with display, watch:
            found = ebm_at.robust_accuracy(
                model, x, y, eps, names, norm, seed=seed, batch_size=batch_size,
                precision=precision, on_progress=display.on_progress, **settings,
            )  # fmt: skip
            display.finish(rows := found["rows"])
        warnings += found["notes"]
        told |= {k: found[k] for k in ("clean_acc", "robust_acc")} | {"complete": True}
        report_attacks(rows, told, folder)  # before anything else can fail
        save_adversarial(model, found, y, save, save_png)
        warnings += ebm_at.masking_signs(model, x, y, eps, norm, rows, min(200, batch_size))
        write_json(folder / "attack.json", told)
    except (KeyboardInterrupt, Exception) as error:  # a stranger's model may fail at any call
        if not told["complete"]:
            report_attacks(display.rows, told, folder)
        done = f"the table above, also in {folder}, is what was done"
        if isinstance(error, KeyboardInterrupt):
            raise Stopped(error, done) from None
        if isinstance(error, (RunError, OSError, torch.OutOfMemoryError)):
            raise
        raise RunError(f"{type(error).__name__}: {error}; {done}") from error
    for warning in warnings:
        say(f"WARNING  {warning}", style="bold red")


def check_attack_options(names, *, split, precision, seed, **numbers):
    """Refuses what cannot work before anything is loaded. Raises: BadInput."""
    ebm_at.check_choice("split", split, ("train", "val", "test"))
    ebm_at.check_choice("precision", precision, ("auto", "bf16", "fp32"))
    ebm_at.attacks_of(names)
    if not 0 <= seed < 2**32:
        raise BadInput(f"--seed must lie in 0 .. 2**32 - 1, not {seed}")
    for name, value in numbers.items():
        if value is not None and value < (name != "limit"):
            raise BadInput(f"--{name.replace('_', '-')} is too small: {value}")


def attacked_images(config, split, limit, device, known, channels_last):
    """(x, y, Data): images in [0, 1] of a split, as train made it, and labels, on the device."""
    data = ebm_at.load_data(config.dataset, config.data_dir, config.limit, config.val_fraction)
    x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
    numbered = [all(map(str.isdecimal, names)) for names in (known or [], data.classes)]
    if known and numbered[0] == numbered[1]:  # else one side has no names, and the numbers count
        for name in data.classes:
            ebm_at.check_choice(f"class in '{data.name}', to this model,", name, known)
        y = torch.tensor([known.index(name) for name in data.classes])[y]
    rows = ebm_at.evenly(limit or len(y), len(y))
    x = x[rows].to(device).float() / 255
    if channels_last:  # what our networks like; a stranger's may not
        x = x.contiguous(memory_format=torch.channels_last)
    return x, y[rows].to(device), data


def open_model(checkpoint, model_from, dataset, device):
    """(model in eval mode, its Config or the recipe's, its path or None, its classes or None).

    Raises: BadInput, RunError.
    """
    if model_from:
        if checkpoint:
            raise BadInput("give a checkpoint or --model-from, not both")
        model, path = import_model(model_from).to(device).eval(), None
    else:
        path = find_checkpoint(checkpoint)
        state = read_state_dict(path)
        if state is None:
            model, found = ebm_at.load_model(path, device)
            known = {f.name for f in dataclasses.fields(Config)}
            settings = {k: v for k, v in found.get("config", {}).items() if k in known}
            return model, Config(**settings), path, found.get("classes")
        model = model_of(state, path).to(device).eval()
    if not dataset:
        raise BadInput("this model does not say what it was trained on: give --dataset")
    return model, ebm_at.recipe(dataset), path, None


def find_checkpoint(checkpoint):
    """The file meant by an argument; without one, best.pt of the newest run. Raises: RunError."""
    if checkpoint is None:
        runs = [p for p in Path("runs").glob("*/best.pt") if p.is_file()]
        if not runs:
            raise RunError(
                "no run under runs/: train one first (python cli.py train), or name a checkpoint"
            )
        return max(runs, key=lambda p: p.stat().st_mtime)
    path = Path(checkpoint)
    path = path / "best.pt" if path.is_dir() else path
    if path.exists() and not path.is_file():
        raise RunError(f"no checkpoint '{path}' (not a regular file)")  # a pipe is never read to
    return path


def read_state_dict(path):
    """The tensors of a state_dict, plain or wrapped; None for every other file, damaged or not."""
    if not zipfile.is_zipfile(path):  # load_model says what is wrong with it
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return None
    wrapped = isinstance(state, dict) and "format" not in state  # ours have one
    for found in (state, *(wrapped and state.get(k) for k in ("state_dict", "model", "net"))):
        if isinstance(found, dict) and found and all(map(torch.is_tensor, found.values())):
            return {re.sub(r"^((module|_orig_mod)\.)+", "", str(k)): v for k, v in found.items()}
    return None


def model_of(state, path):
    """One of our networks for a state_dict, its kind told from the shapes. Raises: RunError."""
    try:
        blocks = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        name = {4: "small", 8: "preactresnet18", 12: "wrn-28-10", 15: "wrn-34-10"}[blocks]
        width, channels = state["stem.weight"].shape[:2]
        model = ebm_at.make_model(name, len(state["head.bias"]), channels, width=width)
        model.load_state_dict(state)
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        known = ", ".join(ebm_at.MODELS)
        raise RunError(
            f"'{path}' holds the weights of none of our networks ({known}); for another one write"
            " a function that returns it and use --model-from"
        ) from error
    return model


def import_model(spec):
    """Calls the function named MODULE:FUNCTION. Raises: BadInput, RunError."""
    module, _, function = spec.partition(":")
    if not (module and function):
        raise BadInput(f"--model-from '{spec}' must look like MODULE:FUNCTION")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever a stranger's code raises
        raise RunError(f"--model-from '{spec}': {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, torch.nn.Module):
        raise BadInput(f"--model-from '{spec}' returned {type(model).__name__}, not an nn.Module")
    return model


class AttackDisplay(Bar):
    """Progress of a suite: what runs now, counted in the images that pass through the model."""

    def __init__(self, standing, names, settings, n, quiet):
        self.standing, self.n = standing, n  # standing: only what still stands is attacked
        self.rows, self.quiet, self.listed, self.passes = [], quiet, 1, 0.0
        self.costs = {}  # gradients per image, guessed: until an attack has ended it may be early
        for name in names:
            found = ebm_at.ATTACKS[name]
            options = found.settings | settings
            cost = options["steps"] if "steps" in found.settings else 1
            cost = options["queries"] / 4 if "queries" in found.settings else cost
            self.costs[name] = cost * (4 if found.function is ebm_at.apgd_t else 1)
        self.name, self.goal = names[0], n * sum(self.costs.values())
        super().__init__(Terminal(quiet=quiet), "attacking", self.goal)

    def count(self, _, inputs):
        """The model's forward pre-hook; a pass without a gradient takes a quarter of the time."""
        self.passes += len(inputs[0]) * (1 if torch.is_grad_enabled() else 0.25)
        self.to(self.passes, self.name, max(self.goal, 1.01 * self.passes))

    def on_progress(self, rows, name, done, total):
        self.finish(rows)
        names = list(self.costs)
        later = names[names.index(name) + 1 :]
        n = self.n * rows[-1]["worst"] if self.standing else self.n
        ahead = self.costs[name] * (total - done) + n * sum(self.costs[k] for k in later)
        self.goal = self.passes + ahead
        self.name = name if done < total or not later else later[0]

    def finish(self, rows):
        """Tells of the attacks that have ended since."""
        self.rows = rows
        if not self.console.is_terminal and not self.quiet:
            for row in rows[self.listed :]:
                accuracy, worst = f"{row['accuracy']:.1%}", f"{row['worst']:.1%}"
                print(f"{row['attack']:<13} {row['n']} images, accuracy {accuracy}, worst so far"
                      f" {worst}, {row['seconds']:.1f} s", flush=True)  # fmt: skip
        self.listed = max(self.listed, len(rows))


def report_attacks(rows, told, folder):
    """attack.csv and attack.json, the table, and the histograms of E(x)."""
    told["rows"] = plain = [{k: v for k, v in row.items() if k != "energies"} for row in rows]
    try:
        write_csv(folder / "attack.csv", plain, list(plain[0]) if rows else [])
        write_json(folder / "attack.json", told)
        if rows:
            draw_energies(folder, rows)
    finally:  # on a full disk, too
        tell_attacks(rows, told, folder)


def tell_attacks(rows, told, folder):
    """The table of a suite, and the histograms of E(x)."""
    console = Terminal()
    console = console if console.is_terminal else Terminal(width=110)
    stands = told["suite"] == "standard"
    sees = "gets the n images that still stand" if stands else "gets all images"
    table = Table(
        box=rich.box.SIMPLE_HEAD,
        padding=(0, int(console.width >= 106)),  # 80 columns are enough without
        title=f"eps {eps_text(told['eps'], told['norm'])} ({told['norm']}); each attack {sees};"
        " means over them; dE > 0: E fell",
    )
    for name in ("attack", "n", "accuracy", "worst", "E(x)", "dE(x)", "dE(x,y)", "CE", "linf", "l2",
                 "cost", "s"):  # fmt: skip
        table.add_column(name, justify="left" if name == "attack" else "right", no_wrap=True)
    for row in rows:
        cost = f"{row['gradients']:.0f} g" if row["gradients"] else f"{row['queries']:.0f} q"
        table.add_row(
            row["attack"], str(row["n"]), f"{row['accuracy']:.1%}", f"{row['worst']:.1%}",
            f"{row['energy']:+.2f}", f"{row['delta_energy']:+.2f}",
            f"{row['delta_energy_xy']:+.2f}", f"{row['cross_entropy']:.2f}",
            eps_text(row["linf"], "linf"), f"{row['l2']:.2f}", cost, f"{row['seconds']:.1f}",
        )  # fmt: skip
    console.print(table)
    if rows and console.encoding.startswith("utf"):
        console.print(Text(energy_histograms(rows)))
    if "robust_acc" in told:
        say(f"clean {told['clean_acc']:.1%}, worst case {told['robust_acc']:.1%}; cost: gradients"
            f" (g) or queries (q) per image. {saved_in(folder)}")  # fmt: skip


def energy_range(rows):
    """Where E(x) lies, but for one percent at either end: (low, high)."""
    energies = torch.cat([row["energies"] for row in rows])
    low, high = energies.quantile(torch.tensor([0.01, 0.99])).tolist()
    return low, max(high, low + 1e-3 * max(1, abs(low)))


def energy_histograms(rows, bins=48):
    """How E(x) is distributed, one line of bars per attack, over one axis."""
    low, high = energy_range(rows)
    lines = [" E(x), natural images and each attack's (left: low energy, likely to the model)"]
    for row in rows:
        counts = torch.histc(row["energies"].clamp(low, high), bins, low, high)
        bars = sparkline(counts.tolist(), 0, max(counts.max().item(), 1))
        bars = "".join(bar if count else " " for bar, count in zip(bars, counts))
        lines.append(f" {row['attack']:>13} {bars}")
    return "\n".join(lines) + f"\n {'':>13} {low:<+{bins - 6}.2f}{high:>+6.2f}"


def draw_energies(folder, rows):
    """energies.png: the same histograms, natural images filled. Only where matplotlib is there."""
    if not rows or not (pyplot := find_pyplot()):
        return
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    options = dict(bins=40, range=energy_range(rows), density=True)
    for i, row in enumerate(row for row in rows if len(row["energies"])):
        more = dict(histtype="step", linestyle="-" if i <= 10 else "--")  # there are ten colours
        more = dict(color="0.8") if row["attack"] == "natural" else more
        axes.hist(row["energies"].numpy(), label=row["attack"], **options, **more)
    axes.set(xlabel="E(x), nats (left: likely to the model)", ylabel="density")
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(folder / "energies.png", dpi=120)
    pyplot.close(figure)


def save_adversarial(model, found, y, save, save_png):
    """--save and --save-png: the worst-case images as float tensors and as 8-bit pictures.

    Raises: RunError.
    """
    x_adv = found["x_adv"]
    if save:
        tensors = {"x_adv": x_adv.contiguous(), "y": y, "fallen": found["fallen"]}
        ebm_at.save_checkpoint(save, {k: v.cpu() for k, v in tensors.items()})
        say(f"saved {save}: x_adv {tuple(x_adv.shape)}, y, fallen")
    if save_png:
        from PIL import Image  # torchvision's own requirement

        rounded = (x_adv * 255).round().to(torch.uint8)
        for i, image in enumerate(rounded.permute(0, 2, 3, 1).cpu().numpy()):
            name = f"{i:05d}-label-{y[i].item()}{'-fallen' * found['fallen'][i].item()}.png"
            Image.fromarray(image.squeeze()).save(Path(save_png, name))
        before, after = (
            ebm_at.is_right(ebm_at.exact_logits(model, z), y).float().mean().item()
            for z in (x_adv, rounded.to(x_adv) / 255)
        )
        say(f"saved {len(y)} PNGs in {save_png}: accuracy {before:.1%} as float tensors,"
            f" {after:.1%} after rounding to 8 bits")  # fmt: skip


# --------------------------------------------------------------------------------------------------
# generate
# --------------------------------------------------------------------------------------------------


class Watch(Bar):
    """The on_progress of ebm_at.generate: shows images done, keeps the images, and films some."""

    def __init__(self, console, text, n, steps, filmed=()):
        super().__init__(console, text, n)
        self.steps, self.filmed, self.frames, self.x = max(steps, 1), list(filmed), [], None

    def __call__(self, step, x, moving):
        self.x, stopped = x, self.total - len(moving)
        self.to(stopped + len(moving) * step / (self.steps + 1), f"{stopped}/{self.total} images")
        if step == int(step) and self.filmed:
            self.frames.append(to_uint8(x[self.filmed]).cpu())


def data_of(checkpoint, dataset=None, data_dir=None):
    """The data a checkpoint was trained on, or `dataset`, which must have the same classes.

    Returns: its Config, with those two replaced, and Data. Raises: BadInput, RunError.
    """
    config = config_of(checkpoint.get("config"), "the checkpoint")
    use_data(config, dataset, data_dir)
    data = ebm_at.load_data(config.dataset, config.data_dir, config.limit, config.val_fraction)
    trained_on, channels = checkpoint["classes"], checkpoint["spec"]["in_channels"]
    fits = len(trained_on) == checkpoint["spec"]["num_classes"] and data.classes == trained_on
    if not fits or data.x_train.shape[1] != channels:
        some = ", ".join(trained_on[:4])
        raise BadInput(
            f"the checkpoint was trained on other images than '{data.name}' has ({channels}"
            f" channels, {len(trained_on)} classes: {some} ...): give its own with --dataset"
        )
    return config, data


def pick_classes(text, classes):
    """ "disc,ring" or "0,1" -> class numbers, all of them for "". Raises: BadInput."""
    picked = [] if text else list(range(len(classes)))
    for name in (part.strip() for part in text.split(",") if text):
        if name not in classes and not (name.isdecimal() and int(name) < len(classes)):
            ebm_at.check_choice("class", name, classes)
        k = classes.index(name) if name in classes else int(name)
        picked += [k] if k not in picked else []
    return picked


def fitted_pca(path, data, components, device):
    """The class-wise PCA of the training images: kept at `path`, or fitted and kept there."""
    key = {"components": components, "n": len(data.y_train), "checksum": checksum(data)}
    with contextlib.suppress(RunError, KeyError, TypeError, AttributeError):  # none, or an odd one
        kept = ebm_at.load_checkpoint(path)
        if kept.get("key") == key:
            parts = {k: v.to(device) if torch.is_tensor(v) else v for k, v in kept["pca"].items()}
            return ebm_at.ClassPCA(**parts)
    x, y = data.x_train.to(device), data.y_train.to(device)
    pca = ebm_at.ClassPCA.fit(x, y, len(data.classes), components)
    with contextlib.suppress(RunError):  # not writable: fitted again next time
        ebm_at.save_checkpoint(path, {"format": "ebm-at 1", "key": key, "pca": vars(pca)})
    return pca


def make_judge(name, config, data, device, console):
    """A network that did not make the images, and what it is, in words. See --judge."""
    if name != "classifier":
        if not Path(name).exists():
            kind = "judge, and no checkpoint either,"
            ebm_at.check_choice(kind, name, ["classifier"])
        judge, checkpoint = ebm_at.load_model(find_checkpoint(name), device)
        channels = checkpoint["spec"]["in_channels"]
        if checkpoint["classes"] != data.classes or channels != data.x_train.shape[1]:
            raise BadInput(f"the judge '{name}' was trained on other images than '{data.name}' has")
        return judge, f"{name}, epoch {checkpoint['epoch']}"
    if config.limit:  # the judge may see all of it
        data = ebm_at.load_data(config.dataset, config.data_dir, 0, config.val_fraction)
    path = Path("runs", "judges", f"{Path(data.name).stem}-{checksum(data):08x}.pt")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = ebm_at.recipe(
            config.dataset, "none", model="small", width=32, epochs=5 + 7 * (data.name != "shapes"),
            batch_size=min(128, len(data.x_train)), schedule="triangular", lr=0.2, probe_size=4,
            probe_every=10**9, seed=1, device=str(device),
        )  # fmt: skip
        trainer = ebm_at.Trainer(settings, data, ebm_at.build_model(settings, data))
        with Bar(console, "training the judge", settings.epochs) as bar:
            for _ in trainer.run(on_progress=lambda e, i, n: bar.to(e + i / n, f"epoch {e + 1}")):
                pass
        ebm_at.save_checkpoint(path, {k: v for k, v in trainer.checkpoint().items()
                                      if k != "training"})  # fmt: skip
    return ebm_at.load_model(path, device)[0], f"an ordinary classifier, {path}"


class Reference:
    """A judge and what it says of the real images; `of(...)` compares generated ones with them."""

    def __init__(self, judge, words, data, classes, most, device, console, batch_size):
        self.judge, self.batch_size = judge, batch_size

        # memory: per split `most` images (all of them: 0) as uint8, and their features
        def real(split):  # rows of the wanted classes, and the (images, labels) to be judged
            x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
            rows = torch.isin(y, torch.tensor(classes)).nonzero().squeeze(1)
            judged = rows[ebm_at.stratified(y[rows], min(most or len(rows), len(rows)), 0)]
            return rows, x[judged].to(device), y[judged].to(device)

        self.rows, x, _ = real("train")
        _, self.x, self.y = real("test")
        if len(self.x) < 2:
            raise BadInput("the test split has fewer than 2 images of these classes to compare"
                           " with: use --no-metrics")  # fmt: skip
        self.x_train, n = data.x_train, len(x)
        with Bar(console, "judging real images", n + len(self.x)) as bar:
            self.train, _ = ebm_at.judge_images(judge, x, batch_size, bar.to)
            self.test, self.p = ebm_at.judge_images(
                judge, self.x, batch_size, lambda done: bar.to(n + done)
            )
        right = ebm_at.class_agreement(self.p, self.y)
        self.words = {
            "judge": words, "judge_test_accuracy": right,
            "reference": f"{len(self.x)} test images",
            "neighbours_among_train_images": {"pixels": len(self.rows), "features": n},
        }  # fmt: skip
        chance = data.y_test.bincount().max().item() / len(data.y_test)  # the commonest class
        if right < (1 + chance) / 2:  # nearer to guessing than to knowing
            self.words["warning"] = (f"the judge knows only {right:.1%} of the real test images"
                                     f" (guessing: {chance:.1%}): FD, IS and class say little;"
                                     " name a better one with --judge RUN")  # fmt: skip
            print(f"warning: {self.words['warning']}", file=sys.stderr)

    def spread(self, features):
        """What compares a whole set of images with the test images."""
        k = min(3, len(features) - 1, len(self.test) - 1)
        precision, recall = ebm_at.precision_recall(self.test, features, k)
        fd = ebm_at.frechet_distance(features, self.test)
        return {"n": len(features), "fd": fd, "precision": precision, "recall": recall}

    def each(self, x8, y, features, p):
        """What is said image by image: median and least distance to a training image, and so on."""
        score = ebm_at.inception_score(p, min(10, len(p)))
        made = ebm_at.as_pixels(x8).flatten(1)
        pixels = torch.full_like(made[:, 0], math.inf)
        for rows in self.rows.split(max(1, ebm_at.ClassPCA.AT_ONCE // made.shape[1])):
            part = ebm_at.as_pixels(self.x_train[rows].to(made.device)).flatten(1)
            pixels = pixels.minimum(ebm_at.nearest_distance(made, part)[0])
        deep, _ = ebm_at.nearest_distance(features, self.train)
        agreement = ebm_at.class_agreement(p, y)
        return {"is": score[0], "is_std": score[1], "agreement": agreement,
                "nearest_pixels": pixels.median().item(), "nearest_pixels_min": pixels.min().item(),
                "nearest_features": deep.median().item()}  # fmt: skip

    def of(self, x8, y):
        """Every metric of generated images, uint8 as they are saved."""
        features, p = ebm_at.judge_images(self.judge, x8, self.batch_size)
        return self.spread(features) | self.each(x8, y, features, p)

    def of_real(self, n):
        """The same of n real images: train images against test ones, neighbours of test images."""
        each = self.each(self.x[:n], self.y[:n], self.test[:n], self.p[:n])
        return self.spread(self.train[:n]) | each


def to_uint8(x):
    """Images in [0, 1] as they are saved: rounded to 8 bits."""
    return (x * 255).round().to(torch.uint8)


def picture(x8, scale=None):
    """A uint8 image (C, H, W) as a Pillow image, grey or RGB, enlarged so that one sees it."""
    from PIL import Image  # torchvision's own requirement

    image = Image.fromarray(x8.permute(1, 2, 0).squeeze(2).contiguous().cpu().numpy())
    scale = scale or max(1, 64 // x8.shape[-1])
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def labelled_grid(rows, names):
    """Rows of images, each list of uint8 (n, C, H, W), its name at the left: a Pillow image."""
    from PIL import Image, ImageDraw, ImageFont

    make_grid, width = ebm_at.import_torchvision().utils.make_grid, max(len(r) for r in rows)
    scale = max(1, 64 // rows[0].shape[-1])
    names = ["".join(c for c in name if c.isprintable())[:24] for name in names]
    strips = []
    for row in rows:
        blank = torch.full((width - len(row), *row.shape[1:]), 255, dtype=torch.uint8)
        strips.append(picture(make_grid(torch.cat([row.cpu(), blank]), width, 1, pad_value=255),
                              scale))  # fmt: skip
    font = ImageFont.load_default(16)
    margin = 12 + max(int(font.getlength(name)) for name in names)
    page = Image.new("RGB", (margin + strips[0].width, sum(s.height for s in strips)), "white")
    for i, (strip, name) in enumerate(zip(strips, names)):
        page.paste(strip, (margin, i * strip.height))
        at = (margin - 6, i * strip.height + strip.height // 2)
        ImageDraw.Draw(page).text(at, name, "black", font, anchor="rm")
    return page


def save_film(folder, watch, steps, names):
    """trace/<class>.png, from start to stop, and trace.gif, all classes at once."""
    rows = torch.tensor(watch.filmed).view(len(names), -1)
    longest = steps[rows].argmax(1)  # of the filmed images of a class, the one that walked farthest
    chosen = torch.arange(len(names)) * rows.shape[1] + longest
    frames = torch.stack(watch.frames)[:, chosen]  # (T, classes, C, H, W)
    (folder / "trace").mkdir()
    for i, name in enumerate(names):
        last = int(steps[watch.filmed[int(chosen[i])]])
        at = sorted({round(last * j / 9) for j in range(10)})
        labelled_grid([frames[at, i]], [name]).save(folder / "trace" / f"{file_name(i, name)}.png")
    grids = [labelled_grid([frame], [f"step {t:03d}"]) for t, frame in enumerate(frames)]
    durations = [200] * (len(grids) - 1) + [2000]
    grids[0].save(folder / "trace.gif", save_all=True, append_images=grids[1:], loop=0,
                  duration=durations)  # fmt: skip


def file_name(k, name):
    """A class in a file name, distinct by its number: 0, "T-shirt/top" -> "00-T-shirt_top"."""
    safe = (c if c.isascii() and (c.isalnum() or c == "-") else "_" for c in name[:40])
    return f"{k:02d}-{''.join(safe)}"


def save_samples(folder, x8, y, record, classes):
    """samples/, one flat folder of PNGs as FID tools want it, and energies.csv, a row per PNG."""
    stopped = ("cap", "target", "diverged")
    lines = ["file,label,steps,energy_start,energy_end,target,stopped"]
    values = [record[k].tolist() for k in ("steps", "energy_start", "energy_end", "target")]
    (folder / "samples").mkdir()
    for i, k in enumerate(y.tolist()):
        name = f"samples/{i:05d}-class-{file_name(k, classes[k])}.png"
        picture(x8[i], 1).save(folder / name)
        numbers = ",".join(f"{v[i]:.6g}" for v in values)
        lines.append(f"{name},{k},{numbers},{stopped[int(record['stopped'][i])]}")
    write_atomically(folder / "energies.csv", "\n".join(lines) + "\n")


def save_real(folder, data, classes, n):
    """real/, a flat folder of at most n test images of the classes, for FID tools."""
    rows = torch.isin(data.y_test, torch.tensor(classes)).nonzero().squeeze(1)
    rows = rows[ebm_at.stratified(data.y_test[rows], min(n, len(rows)), 0)]
    (folder / "real").mkdir()
    for i, row in enumerate(rows.tolist()):
        picture(data.x_test[row], 1).save(folder / "real" / f"{i:05d}.png")


METRIC_COLUMNS = {  # key of a row: how the table calls it, how it is printed
    "seconds": ("s", "{:.1f}"), "steps": ("steps", "{:.1f}"), "fd": ("FD", "{:.2f}"),
    "is": ("IS", "{:.2f}"), "precision": ("prec", "{:.2f}"), "recall": ("rec", "{:.2f}"),
    "agreement": ("class", "{:.1%}"), "nearest_pixels": ("near px", "{:.2f}"),
    "diverged": ("div", "{:.0f}"),
}  # fmt: skip


def metric_table(rows, title):
    """One rich table of metric dicts, "name" first; what a row lacks stays empty."""
    table = Table(
        box=rich.box.SIMPLE_HEAD, title=title, padding=(0, 0, 0, 1), collapse_padding=True
    )
    table.add_column("start, stop", no_wrap=True)
    for header, _ in METRIC_COLUMNS.values():
        table.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        cells = [("" if row.get(k) is None else form.format(row[k]))
                 for k, (_, form) in METRIC_COLUMNS.items()]  # fmt: skip
        table.add_row(row["name"], *cells)
    return table


def one_batch(model, pca, energies, y, options, reference, watch):
    """Generates images of classes y and measures them: uint8 images, record, row of numbers."""
    began = time.perf_counter()
    with watch:
        x, record = ebm_at.generate(model, pca, y, energies, on_progress=watch, **options)
    seconds = time.perf_counter() - began
    x8, record = to_uint8(x), {k: v.cpu() for k, v in record.items()}
    counts = {name: int((record["stopped"] == i).sum())
              for i, name in enumerate(("at_cap", "at_target", "diverged"))}  # fmt: skip
    row = {"name": f"{options['init']}, {options['stop']}", "n": len(y), "seconds": seconds}
    row |= {"steps": record["steps"].float().mean().item(), **counts}
    row["no_step"] = int((record["steps"] == 0).sum())
    for key in ("energy_start", "energy_end"):
        row[key] = record[key].nanmean().item()
    return x8, record, row | (reference.of(x8, y) if reference else {})


@app.command(rich_help_panel="Commands")
def generate(
    checkpoint: Annotated[
        Optional[str], typer.Argument(help="a .pt file or a run folder; default: the newest run")
    ] = None,
    per_class: Annotated[int, typer.Option(help="images per class")] = 100,
    classes: Annotated[str, typer.Option(help="names or numbers, such as disc,ring")] = "",
    out: Annotated[Optional[str], typer.Option(help="default: generate-<n> beside it")] = None,
    init: Annotated[
        str, typer.Option(help="where to start: local-pca, gaussian, pca, mean, noise")
    ] = "local-pca",
    components: Annotated[
        float, typer.Option(help="of each class's PCA: their number, or the variance to keep (.99)")
    ] = 50,
    neighbours: Annotated[int, typer.Option(help="images in a local-pca neighbourhood")] = 10,
    temperature: Annotated[float, typer.Option(help="of local-pca: scales its covariance")] = 1.5,
    candidates: Annotated[
        int, typer.Option(help="starts drawn per image; the one with a real image's energy is kept")
    ] = 8,
    steps: Annotated[int, typer.Option(help="at most so many")] = 60,
    step_size: Annotated[float, typer.Option(help="length of a step, in [0, 1] pixels")] = 0.3,
    momentum: Annotated[float, typer.Option(help="how much of the last step is kept")] = 0.8,
    noise: Annotated[float, typer.Option(help="std of the noise added at each step")] = 0.001,
    normalize: Annotated[bool, typer.Option(help="give every gradient length 1")] = True,
    mix: Annotated[float, typer.Option(help="share of E(x) in the energy walked down")] = 0.0,
    stop: Annotated[
        str, typer.Option(help="when E(x,y) is the mean, a quantile, or a draw (sampled) of real"
                          " images' energies; or fixed: after all steps")
    ] = "sampled",
    quantile: Annotated[
        Optional[float],
        typer.Option(help="for --stop quantile: .5, or low for more steps (.05 on CIFAR-10)"),
    ] = None,
    metrics: Annotated[bool, typer.Option(help="measure the images")] = True,
    judge: Annotated[
        str, typer.Option(help="classifier (trained once on these data), or a checkpoint")
    ] = "classifier",
    save_real: Annotated[
        bool, typer.Option("--save-real", help="as many real test images in real/, for FID tools")
    ] = False,
    reference: Annotated[int, typer.Option(help="real images judged per split; 0: all")] = 10_000,
    compare: Annotated[bool, typer.Option("--compare", help="starts, stops, controls")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="film walks: trace/, trace.gif")] = False,
    dataset: Annotated[Optional[str], typer.Option(help="default: the checkpoint's")] = None,
    data_dir: Annotated[Optional[str], typer.Option(help="default: the checkpoint's")] = None,
    seed: Annotated[int, typer.Option(help="same seed, same pictures")] = 0,
    batch_size: Annotated[int, typer.Option(help="images per call of the model")] = 500,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: one for small, else all")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, bf16, or fp32")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="print nothing but the result")] = False,
):  # fmt: skip
    """Make images with a robust classifier, and measure how good and how varied they are.

    Starts near the data (class-wise local PCA), walks down E(x, y) and stops at the
    energy of real images. Writes grid.png, samples/, energies.csv and report.json.
    """
    settings = dict(locals())
    check_generate(settings)
    settings["quantile"] = 0.5 if quantile is None else quantile
    path = find_checkpoint(checkpoint)
    folder = claim_folder(out, path.parent, "generate")
    paint(path, folder, settings, Terminal(quiet=quiet))


def paint(path, folder, settings, console):
    """What generate does once its options are known to fit together: see there."""
    device, n = ebm_at.pick_device(settings["device"]), settings["per_class"]
    model, loaded = ebm_at.load_model(path, device)
    threads = use_threads(settings["threads"], model.spec["name"])
    config, data = data_of(loaded, settings["dataset"], settings["data_dir"])
    wanted = pick_classes(settings["classes"], data.classes)
    if n * len(wanted) > 200_000:  # 2.5 GB for each copy, at 3x32x32
        raise BadInput(f"{n * len(wanted)} images do not fit in memory: at most 200000 at a time")
    if settings["metrics"] and n * len(wanted) < 2:
        raise BadInput("one image cannot be measured: make more (--per-class), or --no-metrics")
    dtype = ebm_at.pick_precision(settings["precision"], device)
    console.say(f"{path}: {config.method}{' + DER' * config.der} on {data.name}, epoch"
                  f" {loaded['epoch']}; {n} images of each of {len(wanted)} classes, {device}"
                  f" {str(dtype).removeprefix('torch.')}, {thread_text(threads)},"
                  f" seed {settings['seed']}")  # fmt: skip
    began, batch_size = time.perf_counter(), settings["batch_size"]
    pca = fitted_pca(path.parent / "pca.pt", data, settings["components"], device)
    call = {"dtype": dtype, "batch_size": batch_size}
    energies = ebm_at.class_energies(model, data.x_train.to(device), data.y_train.to(device),
                                     len(data.classes), **call)  # fmt: skip
    prepared = time.perf_counter() - began
    y = torch.tensor(wanted, device=device).repeat_interleave(n)
    taken = ("init", "neighbours", "temperature", "candidates", "stop", "quantile", "seed", "steps",
             "step_size", "momentum", "noise", "normalize", "mix")  # fmt: skip
    options = {k: settings[k] for k in taken} | call
    settings |= {"checkpoint": str(path), "out": str(folder), "device": str(device)}
    report = {"settings": settings, "dataset": data.name, "method": config.method,
              "der": config.der, "epoch": loaded["epoch"], "prepare_seconds": prepared,
              "device": device_name(device), "precision": str(dtype).removeprefix("torch."),
              "threads": threads, "torch": torch.__version__}  # fmt: skip
    judged = None
    if settings["metrics"]:
        most = settings["reference"]
        judge, words = make_judge(settings["judge"], config, data, device, console)
        judged = Reference(judge, words, data, wanted, most, device, console, batch_size)
        report |= judged.words | {"real": {"name": "real images", **judged.of_real(len(y))}}
    make = compare_starts if settings["compare"] else make_images
    make(folder, (model, pca, energies, y), options, judged, report, data, wanted, console)


def check_generate(settings):
    """Refuses options that cannot work before anything long begins. Raises: BadInput."""
    for name, least, most in (
        ("per_class", 1, math.inf), ("batch_size", 1, math.inf), ("candidates", 1, math.inf),
        ("neighbours", 2, math.inf), ("steps", 0, math.inf), ("reference", 0, math.inf),
        ("noise", 0, 1e6), ("temperature", 0, 1e6), ("step_size", 0, 1e6), ("components", 0, 1e6),
        ("mix", 0, 1), ("quantile", 0, 1), ("momentum", 0, 0.999), ("seed", 0, 2**32 - 1),
    ):  # fmt: skip
        value, name = settings[name], name.replace("_", "-")
        if value is not None and not least <= value <= most:
            raise BadInput(f"--{name} must lie in {least} .. {most:g}, not {value}")
    if not settings["step_size"]:
        raise BadInput("--step-size must be positive, not 0")
    if settings["reference"] == 1:
        raise BadInput("--reference 1: one real image is none to compare with; 0 takes all")
    if settings["quantile"] is not None and settings["stop"] != "quantile":
        raise BadInput("--quantile needs --stop quantile")
    if settings["save_real"] and settings["compare"]:
        raise BadInput("--save-real goes with one way of generating, --compare runs many: drop one")
    if settings["trace"] and settings["compare"]:
        raise BadInput("--trace films one way of generating, --compare runs many: drop one")
    ebm_at.check_choice("init", settings["init"], ebm_at.STARTS)
    ebm_at.check_choice("stop", settings["stop"], ebm_at.STOPS)


def make_images(folder, made_of, options, judged, report, data, wanted, console):
    """One way of generating: grid.png, samples/, energies.csv, report.json, and a table."""
    y, names = made_of[3], [data.classes[k] for k in wanted]
    n = len(y) // len(wanted)
    filmed = [k * n + i for k in range(len(wanted)) for i in range(min(8, n))]
    filmed = filmed if report["settings"]["trace"] else []
    watch = Watch(console, "generating", len(y), options["steps"], filmed)
    try:
        x8, record, row = one_batch(*made_of, options, judged, watch)
    except KeyboardInterrupt as error:
        if watch.x is None:
            raise  # nothing to keep yet
        labelled_grid(list(to_uint8(watch.x).split(n)), names).save(folder / "unfinished.png")
        raise Stopped(error, f"the images so far are in {folder}/unfinished.png") from None
    report["generated"] = row
    write_json(folder / "report.json", report)
    rows = x8.split(n)
    labelled_grid([r[:10] for r in rows], names).save(folder / "grid.png")
    save_samples(folder, x8, y, record, data.classes)
    if report["settings"]["save_real"]:
        save_real(folder, data, wanted, len(y))
    if filmed:
        save_film(folder, watch, record["steps"], names)
    shown = [row] + ([report["real"]] if judged else [])
    console.print(metric_table(shown, f"{len(y)} images{of_real(report, len(y))}"))
    console.say(f"{row['no_step']} of {len(y)} images took no step: they are their starts.")
    console.say(saved_in(folder))


def of_real(report, n):
    """Words for a table whose row of real images has not as many, or ""."""
    real = report.get("real", {}).get("n", n)
    return "" if real == n else f" (real: {real})"


def compare_starts(folder, made_of, options, judged, report, data, wanted, console):
    """Every start, walked for fixed steps, stopped by energy, and not at all: compare.csv, grids/.

    Zero steps are the control: what they show is the start's doing, chosen by the network among the
    candidates; with one candidate the network is never asked.
    """
    y, names = made_of[3], [data.classes[k] for k in wanted]
    n, rows = len(y) // len(wanted), []
    adaptive = "sampled" if options["stop"] == "fixed" else options["stop"]
    ways = {"fixed": {"stop": "fixed"}, adaptive: {"stop": adaptive},
            "zero steps": {"stop": adaptive, "steps": 0},
            "zero steps, one candidate": {"stop": adaptive, "steps": 0,
                                          "candidates": 1}}  # fmt: skip
    stopped = None
    try:
        for init in ebm_at.STARTS:
            for way, change in ways.items():
                watch = Watch(console, f"{init}, {way}", len(y), options["steps"])
                chosen = options | {"init": init} | change
                x8, _, row = one_batch(*made_of, chosen, judged, watch)
                rows.append(row | {"name": f"{init}, {way}"})
                grid = labelled_grid([r[:10] for r in x8.split(n)], names)
                (folder / "grids").mkdir(exist_ok=True)
                file = f"{init}-{way}".replace(",", "").replace(" ", "-")
                grid.save(folder / "grids" / f"{file}.png")
    except KeyboardInterrupt as error:
        stopped = error
    shown = rows + ([report["real"]] if judged else [])
    if stopped and not rows:
        raise stopped
    report |= {"compared": rows, "complete": not stopped}
    write_json(folder / "report.json", report)
    write_csv(folder / "compare.csv", shown, max((list(row) for row in shown), key=len))
    title = f"{len(y)} images each{of_real(report, len(y))}; {options['steps']} steps or adaptive"
    console.print(metric_table(shown, title))
    console.say(f"Saved in {folder}: compare.csv, grids/, report.json")
    if stopped:
        done = f"{len(rows)} of {4 * len(ebm_at.STARTS)} ways are in {folder}/compare.csv"
        raise Stopped(stopped, done)


# --------------------------------------------------------------------------------------------------


def main():
    """Runs the command; every foreseeable end becomes one line on stderr and an exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the caller
        stream.reconfigure(errors="backslashreplace")  # a name it cannot show must not stop a run
    arguments, code = sys.argv[1:] or ["--help"], 0
    try:
        for before, value in zip(["cli.py", *arguments], arguments):
            if not value.strip() or (value.startswith("--") and value.endswith("=")):
                raise BadInput(f"an empty value after '{before}': give one, or leave it out")
            digits = value.rpartition("=")[2].lstrip("+-")
            if digits.isdecimal() and len(digits) > 19:  # no tensor counts so far
                raise BadInput(f"'{value}' is too large a number")
        command = typer.main.get_command(app)  # called by hand: typer has its own idea of Ctrl-C
        with HELD, command.make_context("cli.py", arguments) as context:
            command.invoke(context)
        print(end="", flush=True)
    except typer.Exit as end:
        code = end.exit_code
    except BaseException as error:
        line, code = explain(error)
        # What all processes of torchrun find wrong is said by one; what fails in one, by that one.
        if is_leader() or not isinstance(error, (BadInput, RunError, KeyboardInterrupt, Stopped)):
            line = "error: " * (code < 128) + printable(" ".join(line.split()))
            with contextlib.suppress(OSError):  # where nobody listens
                print(line, file=sys.stderr, flush=True)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        try:
            print(end="", flush=True)
        except OSError:  # said already; without this Python would say it again, its own way
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def explain(error):
    """What ended the program, as one line, and the exit code; raises again what nobody foresaw."""
    if isinstance(error, Stopped):
        line, code = explain(error.args[0])
        return f"{line}: {error.args[1]}", code
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 128 + (error.args or (signal.SIGINT,))[0]
    if isinstance(error, SystemExit):
        return f"code that was called (--model-from?) ended the program with {error.code!r}", 1
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing value
        return error.format_message(), 2
    if isinstance(error, OverflowError):
        return f"a number is too large ({error})", 2
    full = isinstance(error, RuntimeError) and "allocate memory" in str(error)  # torch on a CPU
    if full or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory: lower --batch-size, or take a smaller model or fewer images", 1
    if isinstance(error, OSError):
        name = f"cannot use '{error.filename}'" if error.filename else "the output has ended"
        return f"{name}: {error.strerror or error}", 1
    if isinstance(error, (BadInput, RunError)):
        return str(error), 2 if isinstance(error, BadInput) else 1
    raise error


if __name__ == "__main__":
    main()
