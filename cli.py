"""The command line of ebm_at: options, progress, tables, folders. The science is in ebm_at.py."""
# fmt: off
import contextlib
import csv
import dataclasses
import hashlib
import importlib
import inspect
import io
import itertools
import json
import os
import platform
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Literal, Optional

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def stop(number, _frame=None):
    """Ctrl-C or SIGTERM: raises once, so that what there is gets saved, which takes seconds."""
    [signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)]
    if "main" not in globals():  # the libraries are still loading
        os.write(2, b"stopped\n")
        os._exit(128 + number)
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)

import numpy as np
import rich.box
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

import ebm_at
from ebm_at import BadInput, Config, RunError

LEADER = os.environ.get("RANK", "0") == "0"  # whether we speak for all that torchrun started
HELD = contextlib.ExitStack()  # locks, and new folders if still empty: main() gives them back
app = typer.Typer(add_completion=False, help="Adversarial training, seen through energies.")


# ==== Options =====================================================================================

def parse_eps(text):
    """ "8/255" or "0.031" -> float. Raises: BadInput."""
    try:
        above, _, below = text.partition("/")
        return float(above) / (float(below) if below else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise BadInput(f"'{text}' is not a number or a fraction such as 8/255") from error


def option(kind, note, *names, **more):
    """The annotation of an option, Annotated[kind, ...], with its note in --help."""
    return Annotated[kind, typer.Option(*names, help=note, **more)]


EPS = dict(parser=parse_eps, metavar="8/255")
# What attack and generate have in common:
Checkpoint = Annotated[Optional[str], typer.Argument(help="a .pt file or a run; default: the last")]
Out = option(Optional[str], "a new folder; default: the next free one beside the checkpoint")
Dataset = option(Optional[str], "default: the checkpoint's; see train")
DataDir = option(Optional[str], "where its files lie")
Seed = option(int, "of all that is random: same seed, same result", min=0, max=2**32 - 1)
BatchSize = option(int, "images per call of the model", min=1)
Threads = option(int, "CPU threads; 0: one for the small model, else all cores", min=0, max=1024)
Device = option(str, "auto, cpu, cuda, cuda:1, mps")
Quiet = option(bool, "print nothing but the result", "--quiet")
GUIDES = {"joint": ebm_at.energy_xy, "class": ebm_at.cross_entropy}

PANELS = {  # of train's --help, by the first field of each
    "dataset": "Data", "model": "Model", "method": "Method", "der": "Regularizers",
    "epochs": "Optimisation", "on_overfit": "Overfitting", "seed": "Machine"}


def fields_as_options(command):
    """Gives `command(..., **settings)` an option for every field of Config, None when not given."""
    signature = inspect.signature(command)
    own, panel, p = list(signature.parameters.values())[:-1], None, inspect.Parameter
    for f in dataclasses.fields(Config):
        panel, size = PANELS.get(f.name, panel), EPS if f.name in ("eps", "attack_step") else {}
        value = "20/255" if f.name == "eps" else f.default
        shown = rf" \[default: {value}]" * (f.type is not bool)
        kind = option(Optional[f.type], f.metadata["note"] + shown, rich_help_panel=panel, **size)
        own.append(inspect.Parameter(f.name, p.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = signature.replace(parameters=own)
    command.__annotations__ = {p.name: p.annotation for p in own}
    return command


def use_threads(wanted, model):
    """Sets and returns how many threads the CPU works with: `wanted`, or one for small networks, on
    which two gain little and, since they wait by spinning, lose much beside another process."""
    torch.set_num_threads(wanted or (1 if model == "small" else torch.get_num_threads()))
    return torch.get_num_threads()


def absolute(dataset):
    """The absolute path of a data set that is a file or a folder; a name stays as it is."""
    is_path = dataset not in ebm_at.DATASETS and os.path.exists(dataset)
    return os.path.abspath(dataset) if is_path else dataset


def config_of(saved, where):
    """The Config kept in a file; what earlier versions had beside it is left out."""
    try:
        ebm_at.check_parts({"config": saved}, 0)
        return Config(**{k: v for k, v in saved.items() if k in vars(Config())})
    except (AttributeError, TypeError) as error:
        raise RunError(f"'{where}' was made by another version: train it again") from error


# ==== Files, and what a terminal shows ============================================================

def hold(folder):
    """Holds folder/.lock until main() ends; if we are killed, the system lets it go."""
    lock = folder / ".lock"
    file = HELD.enter_context(open(lock, "w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RunError(f"another process works on '{folder}': wait for its end") from error
    except (OSError, AttributeError):  # a file system, or a system, without locks
        pass
    HELD.callback(lock.unlink, missing_ok=True)


def refuse_existing(*paths):
    """Raises RunError for a file that would be overwritten."""
    for path in paths:
        if path and os.path.lexists(path):
            raise RunError(f"'{path}' exists: nothing was touched; name a new one")


def claim_folder(out, beside, stem):
    """Makes and holds `out`, or the next free <beside>/<stem>-<n>. Raises: RunError."""
    if out and not (os.path.isdir(out) and set(os.listdir(out)) <= {".lock"}):
        refuse_existing(out)
    for folder in [Path(out)] if out else (Path(beside, f"{stem}-{n}") for n in itertools.count(1)):
        try:
            folder.mkdir(parents=True, exist_ok=bool(out))
        except OSError as error:
            if not out and os.path.lexists(folder):  # another run's: try the next number
                continue
            raise RunError(f"cannot write to '{folder}' ({error.strerror}); use --out") from error
        HELD.callback(lambda: any(folder.iterdir()) or folder.rmdir())
        hold(folder)
        return folder


def write_atomically(path, text):
    """Writes a text file under a temporary name and renames it. Raises: OSError, with its name."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, told):
    """Strict JSON, with null for NaN and infinity, which it has no words for. Raises: OSError."""
    told = json.loads(json.dumps(told), parse_constant=lambda _: None)
    write_atomically(path, json.dumps(told, indent=1, allow_nan=False))


def write_csv(path, rows, keys):
    """Writes dicts as CSV, rewritten whole so that it is never half a row. Raises: OSError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    write_atomically(path, text.getvalue())


def printable(text):
    """The text with control characters, which could command a terminal, written out as \\x1b."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))


class Terminal(Console):
    """rich's Console for plain text, of which no sign is a command."""

    def say(self, text, style=None):
        """A line that stays, or a table. Terminals break lines between words, but not commands."""
        plain = isinstance(text, str)
        whole = plain and (not self.is_terminal or "python cli.py" in text)
        self.print(printable(text) if plain else text, style=style, soft_wrap=whole, crop=False,
                   markup=False, highlight=False, emoji=False)

    def on_broken_pipe(self):
        raise  # to main(): rich itself would end the program without a word


say = Terminal().say  # quiet or not


class Bar(Progress):
    """How far a long piece of work is: a bar in a terminal, a line every ten seconds elsewhere."""

    def __init__(self, text, total, quiet=False):
        console, words = Terminal(quiet=quiet), "{task.percentage:>3.0f}% {task.fields[note]}"
        columns = TextColumn(text, markup=False), BarColumn(), TextColumn(words, markup=False)
        super().__init__(*columns, console=console, transient=True,
                         disable=quiet or not console.is_terminal)
        self.text, self.total, self.done, self.note = text, total, 0, ""
        self.began = self.told = time.monotonic()
        self.only = self.add_task(text, total=total, note="")

    def to(self, done, note=None):
        """`done` of the total is done; note: in words, what comes now."""
        self.done, self.note = done, self.note if note is None else note
        self.total, now = max(self.total, 1.01 * done), time.monotonic()  # it was a guess
        left = (now - self.began) * (self.total - done) / max(done, 1e-9)  # as fast as so far
        left = f" (about {left:.0f} s left)" if done else ""
        self.update(self.only, completed=done, total=self.total, note=self.note + left)
        if now - self.told > 10 and not (self.console.is_terminal or self.console.quiet):
            self.told = now
            print(f"{self.text}: {done / self.total:.0%} {self.note}{left}", flush=True)

    def count(self, model):
        """Lets each image that passes through the model count: 1, without a gradient a quarter."""
        return model.register_forward_pre_hook(lambda _, given: self.to(
            self.done + len(given[0]) * (1 if torch.is_grad_enabled() else 0.25)))


@contextlib.contextmanager
def keeping(told, kinds=(KeyboardInterrupt, OSError)):
    """Where work stops or its output fails, `told` keeps what there is and tells main() of it."""
    try:
        yield
    except kinds as error:
        error.kept = told()
        raise


COLUMNS = {  # of tables, where a value is not called and printed as it is
    "train_loss": "loss:.3f", "clean_acc": "clean:.1%", "fgsm_acc": "FGSM:.1%",
    "pgd_acc": "PGD-10:.1%", "train_adv_aae": "AAE:.1%", "train_adv_delta_energy": "dE(x):+.2f",
    "train_adv_delta_energy_xy": "dE(x,y):+.2f", "seconds": "s:.1f",
    "energy": "E(x):+.2f", "delta_energy_pgd": "dE(x) PGD:+.2f", "accuracy": "acc:.1%",
    "worst": "worst:.1%", "delta_energy": "dE(x):+.2f", "delta_energy_xy": "dE(x,y):+.2f",
    "cross_entropy": "CE:.2f", "size": "linf:", "l2": "l2:.2f", "name": "start, stop:",
    "steps": "steps:.1f", "fd": "FD:.2f", "is": "IS:.2f", "precision": "prec:.2f",
    "recall": "rec:.2f", "agreement": "class:.1%", "nearest_pixels": "px:.2f"}


def table(rows, keys, title, **look):
    """A rich table of some keys of dicts; what a row lacks stays empty."""
    shown = Table(title=title, **{"box": rich.box.SIMPLE_HEAD, "padding": 0} | look)
    for key, justify in zip(keys, ["left", *["right"] * len(keys)]):
        shown.add_column(COLUMNS.get(key, key).split(":")[0], justify=justify, no_wrap=True)
    for row in rows:
        shown.add_row(*(cell(row, key) for key in keys))
    return shown


def cell(row, key):
    """The text of a value in a table."""
    return "" if row.get(key) is None else format(row[key], COLUMNS.get(key, ":").split(":")[1])


def eps_text(size, norm, digits=3):
    """A distance the way the field writes it: 8/255 for l_inf, a plain number for l_2."""
    return f"{size * 255:.{digits}g}/255" if norm == "linf" else f"{size:.{digits}g}"


def saved_in(folder):
    """What lies in a folder, in words."""
    return f"Saved in {folder}: {', '.join(sorted({p.name for p in folder.iterdir()} - {'.lock'}))}"


def device_name(device):
    """The device in words: the GPU's name, or the processor's kind and number of cores."""
    processor = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor


def new_figure(*size):
    """A matplotlib Figure; None where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(size, layout="constrained")


CURVES = (  # y label, factor, column of history.csv, and one that is dashed
    ("PGD-10 accuracy, dashed: clean (%)", 100, "pgd_acc", "clean_acc"),
    ("share of AAEs in training (%)", 100, "train_adv_aae"),
    ("ΔE(x), dashed: ΔE(x, y), in training (nats)", 1, "train_adv_delta_energy",
     "train_adv_delta_energy_xy"))


def draw_curves(path, groups):
    """Saves CURVES of {name: histories}, mean and range of each group by epoch; False: cannot."""
    if not (figure := new_figure(12, 3.8)):
        return False
    for axes, (label, factor, *columns) in zip(figure.subplots(1, len(CURVES)), CURVES):
        for (i, (name, runs)), key in itertools.product(enumerate(groups.items()), columns):
            epochs, solid = range(1, 1 + min(map(len, runs))), key == columns[0]
            values = factor * np.array([[row[key] for row in rows[: len(epochs)]] for rows in runs])
            axes.plot(epochs, values.mean(0), f"C{i}{'-' if solid else '--'}", label=name * solid)
            axes.fill_between(epochs, values.min(0), values.max(0), color=f"C{i}", alpha=0.15)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)
    return True


# ==== train =======================================================================================

EPOCH = ["epoch", "train_loss", "clean_acc", "fgsm_acc", "pgd_acc",  # printed; on test images, but
         *ebm_at.TRACKED[1:], "seconds", "verdict"]  # AAEs and dE of the training attack


@app.command(rich_help_panel="Commands")
@fields_as_options
def train(
    preset: option(Optional[Literal[tuple(ebm_at.PRESETS)]], "ro: robust overfitting") = None,
    out: option(Optional[str], "a new folder; default runs/<dataset>-<method>[-der]-<n>") = None,
    resume: option(Optional[str], "a run folder: go on where it stopped, as it began") = None,
    quiet: Quiet = False,
    **settings):
    """Train a classifier, robustly or not, and say in words whether it overfitted.

    Without options: FGSM on the embedded data set shapes, where it overfits
    catastrophically; with --der it does not. The defaults shown are those of
    this demonstration; other data sets and methods have their own (recipe).
    """
    given, checkpoint = {k: v for k, v in settings.items() if v is not None}, None
    if resume is None:
        chosen = dict(ebm_at.PRESETS[preset]) if preset else {}
        if given.get("norm") == "l2":
            chosen.pop("eps", None)  # it is measured in l_inf
        config, folder = ebm_at.recipe(**chosen | given), None
        config.dataset = absolute(config.dataset)  # a resume from elsewhere finds it
        config.data_dir = os.path.abspath(config.data_dir)
    else:
        if preset or out or given.keys() - {"device"}:
            raise BadInput("--resume takes every setting from the run: give only --device with it")
        config, checkpoint, folder = open_run(Path(resume))
        config.device = settings["device"] or config.device
    config.threads = use_threads(config.threads, config.model)
    ebm_at.start_processes(config.device)
    rank, processes = ebm_at.world()
    if rank > 0:  # one process downloads, the others wait and then find the files
        torch.distributed.barrier()
    data = ebm_at.load_data(config.dataset, config.data_dir, config.limit, config.val_fraction)
    if rank == 0 and processes > 1:
        torch.distributed.barrier()
    trainer = ebm_at.Trainer(config, data, resume=checkpoint)
    if rank == 0 and not resume:
        stem = f"{Path(config.dataset).stem}-{config.method}{'-der' * config.der}"
        folder = claim_folder(out, "runs", stem)
    def kept():
        return (f"every finished epoch is in {folder}/last.pt; go on with: python cli.py train"
                f" --resume {shlex.quote(str(folder))}") * (
                    os.path.exists(f"{folder}/last.pt") > os.path.exists(f"{folder}/result.json"))
    # The bar counts gradients of images: those of a step, and 12 for an image that is measured.
    attack = ebm_at.METHODS[config.method].attack
    steps = 0 if attack is None else 1 if attack in ebm_at.SINGLE_STEP else config.attack_steps
    epoch = len(data.y_train) * (steps + 2) + 12 * 1.75 * config.probe_size
    n = min(config.test_size or len(data.y_test), len(data.y_test))
    begun, quiet = trainer.epoch, quiet or rank > 0
    total = lambda: (trainer.config.epochs - begun) * epoch + 2 * 12 * n  # a rescue adds epochs
    with keeping(kept), Bar("training", total(), quiet) as bar:
        bar.console.say(
            f"{config.method}{' + DER' * config.der} on {data.name}: {len(data.x_train)} training"
            f" images{f' ({data.note})' * bool(data.note)}, augment {config.augment},"
            f" eps {eps_text(config.eps, config.norm)} ({config.norm}), {config.model},"
            f" {config.epochs} epochs, {trainer.device} {str(trainer.dtype)[6:]},"
            f" CPU threads {config.threads}, seed {config.seed}")
        if rank == 0 and not resume:
            write_json(folder / "config.json", dataclasses.asdict(config))
        headers = [COLUMNS.get(key, key).split(":")[0].rjust(6) for key in EPOCH]
        bar.console.say(" ".join(headers))
        progress = lambda e, i, of: bar.to((e - begun + i / of) * epoch, f"epoch {e + 1}")
        for record in trainer.run(folder if rank == 0 else None, progress):
            if record["kind"] == "alarm":
                bar.total = total()
                bar.console.say(f"ALARM  {record['reason']}  ->  {record['action']}", "bold red")
                continue
            texts = [cell(record, key).rjust(len(header)) for key, header in zip(EPOCH, headers)]
            bar.console.say(" ".join(texts), "red" if record["verdict"] in ("CO", "RO") else None)
            if rank == 0:
                write_csv(folder / "history.csv", trainer.history, ebm_at.HISTORY)
        if rank == 0:
            report(trainer, folder, n, bar)


def open_run(folder):
    """Config, checkpoint and folder of a run that can go on; held by this process."""
    if not folder.is_dir():
        raise RunError(f"no run folder '{folder}'")
    if LEADER:
        hold(folder)
        for cut_short in folder.glob("*.partial"):  # by the kill that ended the run
            cut_short.unlink()
    if (folder / "result.json").exists():
        raise RunError(f"'{folder}' is finished: see result.json there; start a new run")
    checkpoint = ebm_at.load_checkpoint(folder / "last.pt")
    if "training" not in checkpoint:
        raise RunError(f"'{folder}/last.pt' holds a model only, not the state of a run")
    return config_of(checkpoint.get("config"), folder), checkpoint, folder


def report(trainer, folder, n, bar):
    """Measures the last and the best model; result.json, curves.png and the closing words."""
    config, asked, found = trainer.config, dataclasses.asdict(trainer.config), {}
    with contextlib.suppress(OSError, ValueError):  # what was asked for: a rescue changes config
        asked = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_csv(folder / "history.csv", trainer.history, ebm_at.HISTORY)  # if killed before it was
    for name in ("last", "best"):
        model, checkpoint = ebm_at.load_model(folder / f"{name}.pt", trainer.device)
        x, y, bar.note = trainer.data.x_test[:n], trainer.data.y_test[:n], f"measuring {name}.pt"
        bar.count(model)
        found[name] = ebm_at.evaluate(model, x, y, config.eps, 10, config.norm)
        found[name]["epoch"] = checkpoint["epoch"]
    bar.stop()  # or it would write over what follows
    verdict, reason = trainer.verdict()
    spent, probed = (sum(row[k] for row in trainer.history) for k in ("seconds", "probe_seconds"))
    result = {
        "dataset": config.dataset, "method": config.method, "der": config.der, "seed": config.seed,
        "verdict": verdict, "reason": reason, "alarms": trainer.alarms, **found,
        "attack": {"name": "PGD-10, fp32", "norm": config.norm, "eps": config.eps, "n": n},
        "seconds": {"training": spent, "measuring": probed}, "settings": asked,
        "device": device_name(trainer.device), "precision": str(trainer.dtype)[6:],
        "threads": torch.get_num_threads(), "processes": ebm_at.world()[1],
        "versions": {"python": platform.python_version(), "torch": torch.__version__}}
    try:
        write_json(folder / "result.json", result)
        drawn = draw_curves(folder / "curves.png", {config.method: [trainer.history]})
    finally:  # on a full disk, too
        eps, rows = eps_text(config.eps, config.norm), [{"model": k, **v} for k, v in found.items()]
        keys = "model", "epoch", "clean_acc", "fgsm_acc", "pgd_acc", "energy", "delta_energy_pgd"
        say(table(rows, keys, f"test accuracy, {n} images, eps {eps} ({config.norm})"))
        say(f"verdict: {verdict}", "bold " + ("green" if verdict == "healthy" else "red"))
        say(f"{reason}.\n\nTrained {spent:.0f} s, measured {probed:.0f} s. {saved_in(folder)}")
    say(f"Its curves: {folder}/curves.png" if drawn else "Its curves need: pip install matplotlib")
    words = ["attack", str(folder)]
    if verdict in ("CO", "RO") and not config.der and "--resume" not in " ".join(sys.argv):
        words = [w for before, w in zip(sys.argv, sys.argv[1:])  # the same, in a new folder
                 if before != "--out" and not re.match("--out(=|$)", w)] + ["--der"]
    say(f"Next: python cli.py {shlex.join(words)}")


# ==== compare =====================================================================================

@app.command(rich_help_panel="Commands")
def compare(
    runs: Annotated[list[str], typer.Argument(help="run folders")],
    picture: option(Optional[str], "a new .png: mean and range over seeds by epoch") = None):
    """Put finished runs side by side: one row for all that differ by their seed only."""
    refuse_existing(picture)
    if picture and not picture.endswith(".png"):
        raise BadInput(f"--picture '{picture}' must end in .png")
    found = [read_run(run) for run in runs]
    def options(config):
        """What makes the run again, but for the seed; precision is what auto came to."""
        given = {k: getattr(config, k) for k in ("dataset", "method", "norm", "awp", "grad_align")}
        usual = vars(ebm_at.recipe(**given)) | {k: getattr(Config(), k) for k in given}
        text = lambda k, v: f" {eps_text(v, config.norm) if k == 'eps' else v}" * (v is not True)
        return [f"--{k.replace('_', '-')}{text(k, v)}" for k, v in vars(config).items()
                if v != usual[k] and k not in ("seed", "threads", "device", "data_dir")
                and (config.der or config.on_overfit == "der"
                     or not k.startswith(("beta", "gamma", "der_")))]
    every = [set(options(config)) for config, *_ in found]
    common = set.intersection(*every) if any(e != every[0] for e in every) else set()
    groups, shown = {}, []
    for config, *told in sorted(found, key=lambda run: run[0].seed):
        words = [word for word in options(config) if word not in common - {"--der"}]
        groups.setdefault(" ".join(words) or "plain", []).append((config, *told))
    for name, group in groups.items():
        configs, results, histories = zip(*group)
        listed = lambda form, values: " / ".join(map(form.format, values))
        at = lambda r, kind: [f"{a['verdict']} ({a['epoch']})" for a in r["alarms"]
                              if kind == (a["action"] if a["action"] == "der" else a["verdict"])]
        last, seeds = [100 * r["last"]["pgd_acc"] for r in results], [c.seed for c in configs]
        if len(set(seeds)) < len(seeds):
            raise BadInput(f"two runs of '{name}' with one of the seeds {seeds}: name one of them")
        shown.append({"options": name, "seeds": listed("{}", seeds),
            "clean": listed("{:.1f}", [100 * r["last"]["clean_acc"] for r in results]),
            "PGD-10, last": listed("{:.1f}", last), "mean": f"{np.mean(last):.1f}",
            "best": listed("{:.1f}", [100 * r["best"]["pgd_acc"] for r in results]),
            "verdict (epoch)": listed("{}", [" after ".join((at(r, r["verdict"])[:1]
                or [r["verdict"]]) + at(r, "der")) for r in results]),
            "AAEs, last": listed("{:.0f}", [100 * h[-1]["train_adv_aae"] for h in histories]),
            "training s": f"{np.median([r['seconds']['training'] for r in results]):.0f}"})
    made = table(shown, [*shown[0]], None, box=rich.box.MARKDOWN, padding=(0, 1))
    Terminal(width=1000).say(made)
    curves = {f"{k} (n = {len(v)})": [history for *_, history in v] for k, v in groups.items()}
    if picture and not draw_curves(picture, curves):
        raise RunError("--picture needs matplotlib: pip install matplotlib")


def read_run(run):
    """(Config, result.json, rows of history.csv) of a finished run. Raises: RunError."""
    try:
        found = json.loads(Path(run, "result.json").read_text("utf-8"))
        log = csv.DictReader(Path(run, "history.csv").read_text("utf-8").splitlines())
        rows = [{k: v if k == "verdict" else float(v) for k, v in row.items()} for row in log]
        [row[k] for row in rows for _, _, *keys in CURVES for k in keys]  # all that compare wants
        [float(found[k]["pgd_acc"] + found[k]["clean_acc"]) for k in ("last", "best")]
        float(found["seconds"]["training"]), rows[-1], found["verdict"] + ""
        [(a["epoch"], a["verdict"], a["action"]) for a in found["alarms"]]
        ebm_at.check_config(config := config_of(found["settings"], run))
        config.precision = "bf16" if found["precision"] == "bfloat16" else "fp32"  # what auto was
        return config, found, rows
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"'{run}' is no finished run of this version: {error!r}") from error


# ==== attack ======================================================================================

@app.command(rich_help_panel="Commands")
def attack(
    checkpoint: Checkpoint = None,
    suite: option(Literal[tuple(ebm_at.SUITES)], "standard: AutoAttack but FAB-T") = "standard",
    attacks: option(Optional[str], "instead of a suite, such as fgsm,pgd,square") = None,
    eps: option(Optional[float], "radius; default: the run's", **EPS) = None,
    norm: option(Optional[Literal["linf", "l2"]], "default: the run's") = None,
    steps: option(Optional[int], "of PGD (20) and APGD (100, energy-up 40)", min=1) = None,
    queries: option(int, "of Square", min=1) = 5000,
    restarts: option(int, "PGD-50-10: --attacks pgd --steps 50 --restarts 10", min=1) = 1,
    limit: option(int, "images, taken evenly; 0 = all of the split", min=0) = 1000,
    split: option(Literal["test", "val", "train"], "whose images") = "test",
    model_from: option(Optional[str], "MODULE:FUNCTION: a call returns an nn.Module") = None,
    picture: option(bool, "pictures.png: images, perturbations, energies", "--picture") = False,
    save: option(Optional[str], "a new file for the worst-case images, as float tensors") = None,
    save_png: option(Optional[str], "a new folder for the same as 8-bit PNGs") = None,
    out: Out = None, dataset: Dataset = None, data_dir: DataDir = None, seed: Seed = 0,
    batch_size: BatchSize = 500, threads: Threads = 0, device: Device = "auto",
    quiet: Quiet = False):
    """Attack a classifier: how robust is it really, and where does each attack move its energies?

    Takes data, eps and norm from the run. Suites: standard (AutoAttack but for
    FAB-T, image by image the worst), quick, energy (a dozen attacks) and all.
    """
    names = suite if attacks is None else [name.strip() for name in attacks.split(",")]
    refuse_existing(save, save_png)
    if save and not Path(save).parent.is_dir():
        raise BadInput(f"--save '{save}': there is no folder '{Path(save).parent}'; make it first")
    where = ebm_at.pick_device(device)
    if model_from:
        if checkpoint or not dataset:
            raise BadInput("--model-from needs --dataset, and no checkpoint beside it")
        model, path = import_model(model_from).to(where).eval(), None
        config, known, spec = ebm_at.recipe(dataset), None, {}
    else:
        path = find_checkpoint(checkpoint)
        model, loaded = ebm_at.load_model(path, where)
        config, known = config_of(loaded.get("config", {}), path), loaded.get("classes")
        spec = model.spec
    threads = use_threads(threads, spec.get("name"))
    if norm not in (None, config.norm) and eps is None:
        raise BadInput(f"--norm {norm} needs --eps too: the run's eps is measured in {config.norm}")
    eps, norm = config.eps if eps is None else eps, norm or config.norm
    data = data_of(config, dataset, data_dir, spec, known)
    x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}").to(where)
    rows = ebm_at.evenly(limit or len(y), len(y))
    x, y = ebm_at.as_pixels(x[rows].to(where)), y[rows]
    ebm_at.check_attack(x, y, eps, norm)
    chosen, n = ebm_at.attacks_of(names, norm), len(x)
    k, classes = ebm_at.check_model(model, x, y, chosen).shape[1], known or data.classes
    warnings = [f"The model has {k} logits, '{data.name}' {len(classes)} classes: do they mean the"
                " same by each label?"] * (k != len(classes))
    folder = claim_folder(out, path.parent if path else "runs", "attack")
    if save_png:
        claim_folder(save_png, None, None)
    settings = {"steps": steps, "queries": queries, "restarts": restarts}
    told = {"checkpoint": str(path or model_from), "dataset": data.name, "split": split, "n": n,
        "sha256": path and hashlib.sha256(path.read_bytes()).hexdigest(), "eps": eps, "norm": norm,
        "suite": names, **settings, "seed": seed, "device": device_name(where), "threads": threads,
        "torch": torch.__version__, "warnings": warnings, "complete": False}
    known_costs = {"square": queries / 4, "apgd-t": 4 * (steps or 100)}  # gradients, guessed:
    costs = {name: known_costs.get(name) or steps or ebm_at.ATTACKS[name].keywords.get("steps", 1)
             for name in chosen}  # until an attack has ended it may be early
    seen = []  # the list that robust_accuracy appends its rows to
    def on_progress(rows, name, done, total):
        later, seen[:] = chosen[chosen.index(name) + 1 :], [rows]
        ahead = (n * rows[-1]["worst"] if names == "standard" else n) * sum(costs[k] for k in later)
        bar.total = bar.done + costs[name] * (total - done) + ahead
        bar.note = name if done < total or not later else later[0]
    def kept():
        if seen and not (folder / "attack.json").exists():
            report_attacks(seen[0], told, folder)
        return f"the table above, also in {folder}, is what was done" * bool(seen)
    net = torch.nn.Sequential(model)  # around it, since TorchScript takes no hooks
    with keeping(kept, (KeyboardInterrupt, Exception)):  # a stranger's model may fail at any call
        with Bar("attacking", n * sum(costs.values()), quiet) as bar, bar.count(net):
            bar.console.say(f"{told['checkpoint']} on {n} {split} images of {data.name},"
                f" eps {eps_text(eps, norm)} ({norm}), {told['device']}, CPU threads {threads}")
            found = ebm_at.robust_accuracy(
                net, x, y, eps, names, norm, seed=seed, batch_size=batch_size,
                on_progress=on_progress, **settings)
        told |= {key: found[key] for key in ("clean_acc", "robust_acc")} | {"complete": True}
        report_attacks(found["rows"], told, folder)  # before anything else can fail
        save_adversarial(model, found, y, save, save_png)
        if picture:
            draw_attacked(folder / "pictures.png", model, x, y, found["x_adv"], classes)
        some = min(200, batch_size)
        warnings += ebm_at.masking_signs(model, x, y, eps, norm, found["rows"], some)
        write_json(folder / "attack.json", told)
    for warning in warnings:
        say(f"WARNING  {warning}", "bold red")
    say(f"clean {told['clean_acc']:.1%}, worst case {told['robust_acc']:.1%}; cost: gradients (g)"
        f" or queries (q) per image. {saved_in(folder)}")
    if path:
        say("Next: python cli.py generate " + shlex.quote(str(path).removesuffix("/best.pt")))


def data_of(config, dataset, data_dir, spec, known):
    """The Data a model was trained on, or `dataset`, then noted in `config` and taken whole; they
    must have the channels and classes of its spec, and the names of classes that are `known`."""
    if dataset and absolute(dataset) != config.dataset:
        config.dataset, config.limit = absolute(dataset), 0
    config.data_dir = data_dir or config.data_dir
    data = ebm_at.load_data(config.dataset, config.data_dir, config.limit, config.val_fraction)
    k, c, names = len(data.classes), data.x_train.shape[1], known or data.classes
    numbers = [all(map(str.isdecimal, each)) for each in (names, data.classes)]
    same = names == data.classes or numbers[0] != numbers[1]  # one side has no names
    if not same or (spec.get("num_classes", k), spec.get("in_channels", c)) != (k, c):
        raise BadInput(f"the model was trained on other images than '{data.name}' has:"
                       f" {spec['in_channels']} channels, classes {', '.join(names[:4])} ...")
    return dataclasses.replace(data, classes=names)


def find_checkpoint(checkpoint):
    """The file meant by an argument; without one, best.pt of the newest run. Raises: RunError."""
    runs = [p for p in Path("runs").glob("*/best.pt") if p.is_file()]
    if not (checkpoint or runs):
        raise RunError("no run under runs/: train one first (python cli.py train), or name one")
    path = Path(checkpoint or max(runs, key=lambda p: p.stat().st_mtime))
    return path / "best.pt" if path.is_dir() else path


def import_model(spec):
    """Calls the function named MODULE:FUNCTION. Raises: BadInput, RunError."""
    module, _, function = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:  # whatever a stranger's code raises
        raise RunError(f"--model-from {spec}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, torch.nn.Module):
        raise BadInput(f"--model-from '{spec}' returned {type(model).__name__}, not an nn.Module")
    return model


def report_attacks(rows, told, folder):
    """attack.csv, attack.json, the histograms of E(x) in energies.png, and the table."""
    told["rows"] = plain = [{k: v for k, v in row.items() if k != "energies"} for row in rows]
    try:
        write_csv(folder / "attack.csv", plain, list(plain[0]))
        write_json(folder / "attack.json", told)
        draw_energies(folder / "energies.png", rows)
    finally:  # on a full disk, too
        whom = "what still stands" if told["suite"] == "standard" else "all images"
        shown = [row | {"size": eps_text(row["linf"], "linf"), "cost": f"{row['gradients']:.0f} g"
                        if row["gradients"] else f"{row['queries']:.0f} q"} for row in plain]
        title = f"Each attack gets {whom}; means over them; dE > 0: E fell."
        keys = ("attack", "n", "accuracy", "worst", "energy", "delta_energy", "delta_energy_xy",
                "cross_entropy", "size", "l2", "cost", "seconds")
        say(table(shown, keys, title))


def draw_energies(path, rows):
    """energies.png: how E(x) is distributed, natural images filled. Only where matplotlib is."""
    if not (figure := new_figure(7, 4)):
        return
    axes = figure.subplots()
    low, high = np.quantile(torch.cat([row["energies"] for row in rows]), [0.01, 0.99])
    for i, row in enumerate(row for row in rows if len(row["energies"])):
        line = dict(histtype="step", linestyle="-" if i <= 10 else "--")  # there are ten colours
        axes.hist(row["energies"].numpy(), bins=40, range=(low, high + 1e-3), density=True,
                  label=row["attack"], **line if i else dict(color="0.8"))
    axes.set(xlabel="E(x), nats (left: likely to the model)", ylabel="density")
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=120)


def save_adversarial(model, found, y, save, save_png):
    """--save and --save-png: the worst-case images as float tensors and as 8-bit pictures."""
    x_adv, fallen, rounded = found["x_adv"], found["fallen"], to_uint8(found["x_adv"])
    if save:
        ebm_at.save_checkpoint(save, {"x_adv": x_adv.cpu().contiguous(), "y": y.cpu(),
                                      "fallen": fallen.cpu()})
        say(f"saved {save}: x_adv {tuple(x_adv.shape)}, y, fallen")
    if save_png:
        save_pngs(Path(save_png), rounded, [f"{i:05d}-label-{k}{'-fallen' * fell}" for i, (k, fell)
                                            in enumerate(zip(y.tolist(), fallen.tolist()))])
        before, after = (ebm_at.is_right(ebm_at.exact_logits(model, z), y).float().mean().item()
                         for z in (x_adv, rounded))
        say(f"saved {len(y)} PNGs in {save_png}: accuracy {before:.1%} as float tensors,"
            f" {after:.1%} after rounding to 8 bits")


def draw_attacked(path, model, x, y, x_adv, classes, most=6):
    """pictures.png: images, of each class one that fell, if any; perturbations, x_adv, energies."""
    moved, seen, order = (x_adv != x).flatten(1).any(1).tolist(), [], []
    for i, kind in enumerate(zip(moved, y.tolist())):
        order.append((not moved[i], seen.count(kind), i))
        seen.append(kind)
    rows = [i for *_, i in sorted(order)[:most]]
    x, x_adv, y = x[rows], x_adv[rows], y[rows]
    change, name = x_adv - x, lambda k: classes[k] if k < len(classes) else str(k)
    scale = 0.5 / change.abs().max().item() if change.any() else 1.0
    def words(z):
        logits = ebm_at.exact_logits(model, z)
        told = zip(logits.argmax(1).tolist(), ebm_at.energy_x(logits), ebm_at.energy_xy(logits, y))
        return [f"predicted: {name(k)}\nE(x) = {a:.2f}\nE(x, y) = {b:.2f}" for k, a, b in told]
    under = zip(words(x), [f"perturbation x {scale:.3g}\n(grey: 0)"] * most, words(x_adv))
    shown = to_uint8(torch.stack([x, (0.5 + scale * change).clamp(0, 1), x_adv], 1))
    draw_page(shown, [f"y = {name(k)}" for k in y.tolist()], list(under), 112).save(path)


to_uint8 = lambda x: (x * 255).round().to(torch.uint8)  # images in [0, 1] as they are saved


def as_picture(x8, side=0):
    """A uint8 image (C, H, W) as a Pillow image, grey or RGB, enlarged to about `side` pixels."""
    from PIL import Image
    image = Image.fromarray(x8.permute(1, 2, 0).squeeze(2).contiguous().cpu().numpy())
    scale = max(1, side // x8.shape[-1])
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def draw_page(rows, names, captions=None, side=64):
    """A Pillow image: rows of images, uint8 (n, C, H, W) each, with a name at the left of each row,
    and captions, where given, of up to three lines under every image."""
    from PIL import Image, ImageDraw, ImageFont
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    plain = lambda text: "".join(c if c.isprintable() else " " for c in text)[:24]
    texts = [[[plain(t) for t in text.split("\n")] for text in row] for row in captions or []]
    side = as_picture(rows[0][0], side).width
    needed = [small.getlength(line) for row in texts for text in row for line in text]
    width, height = int(max([side + 2, *(w + 14 for w in needed)])), side + 2 + 64 * bool(texts)
    margin = 12 + int(max(font.getlength(plain(name)) for name in names))
    page = Image.new("RGB", (margin + width * max(map(len, rows)), height * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for i, row in enumerate(rows):
        draw.text((margin - 6, i * height + side // 2), plain(names[i]), "black", font, "rm")
        for j, image in enumerate(row):
            middle = margin + j * width + width // 2
            page.paste(as_picture(image, side), (middle - side // 2, i * height + 1))
            for k, line in enumerate(texts[i][j] if texts else []):
                draw.text((middle, i * height + side + 6 + 18 * k), line, "black", small, "mt")
    return page


def save_pngs(folder, images, names):
    """Images, uint8 (C, H, W) each, as folder/<name>.png."""
    folder.mkdir(exist_ok=True)
    for image, name in zip(images, names):
        as_picture(image).save(folder / f"{name}.png")


# ==== generate ====================================================================================

@app.command(rich_help_panel="Commands")
def generate(
    checkpoint: Checkpoint = None,
    per_class: option(int, "images per class", min=1, max=200_000) = 100,
    classes: option(Optional[str], "names or numbers, such as disc,ring; default: all") = None,
    init: option(Literal[tuple(ebm_at.STARTS)], "where to start") = "local-pca",
    components: option(float, "of PCA: how many, or variance to keep", min=0, max=1e6) = 50,
    neighbours: option(int, "images in a local-pca neighbourhood", min=2) = 10,
    temperature: option(float, "of local-pca: scales its covariance", min=0, max=1e6) = 1.5,
    candidates: option(int, "starts per image; that of a real image's energy is kept", min=1) = 8,
    guide: option(Literal[tuple(GUIDES)], "walk down E(x,y), or E(x,y) - E(x)") = "joint",
    steps: option(int, "at most so many", min=0) = 60,
    step_size: option(float, "length of a step, in [0, 1] pixels", min=1e-6, max=1e6) = 0.3,
    momentum: option(float, "how much of the last step is kept", min=0, max=0.999) = 0.8,
    noise: option(float, "std of the noise added at each step", min=0, max=1e6) = 0.001,
    stop: option(Literal[ebm_at.STOPS], "at such an E(x,y) of real ones; fixed: never") = "sampled",
    quantile: option(float, "for --stop quantile; a low one: more steps", min=0, max=1) = 0.5,
    metrics: option(bool, "measure the images") = True,
    judge: option(str, "classifier (trained once on these data), or a checkpoint") = "classifier",
    reference: option(int, "real images judged per split; 0: all", min=0) = 10_000,
    save_real: option(bool, "as many real test images in real/, for FID", "--save-real") = False,
    compare: option(bool, "every start: fixed, stopped by energy, not at all", "--compare") = False,
    trace: option(bool, "film walks: trace/, trace.gif", "--trace") = False,
    out: Out = None, dataset: Dataset = None, data_dir: DataDir = None, seed: Seed = 0,
    batch_size: BatchSize = 500, threads: Threads = 0, device: Device = "auto",
    quiet: Quiet = False):
    """Make images with a robust classifier, and measure how good and how varied they are.

    Starts near the data (class-wise local PCA), walks down E(x, y) and stops at
    the energy of real images. Writes grid.png, samples/, energies.csv and
    report.json. --compare adds controls: zero steps show the start's doing,
    chosen by the network; with one candidate the network is never asked.
    """
    settings = dict(locals())
    if compare and (save_real or trace):
        raise BadInput("--save-real and --trace go with one way of generating, --compare runs many")
    path, where = find_checkpoint(checkpoint), ebm_at.pick_device(device)
    model, loaded = ebm_at.load_model(path, where)
    threads = use_threads(threads, model.spec["name"])
    config = config_of(loaded.get("config"), path)
    data = data_of(config, dataset, data_dir, model.spec, loaded.get("classes"))
    numbers = {str(k): k for k in range(len(data.classes))}
    numbers |= {name: k for k, name in enumerate(data.classes)}
    wanted = [part.strip() for part in classes.split(",")] if classes else data.classes
    for name in wanted:
        ebm_at.check_choice("class", name, numbers)
    config.device, wanted = str(where), list(dict.fromkeys(numbers[name] for name in wanted))
    if not 1 + metrics <= (n := per_class * len(wanted)) <= 200_000:
        raise BadInput(f"{n} images: at most 200000 fit into memory, and one cannot be measured")
    folder = claim_folder(out, path.parent, "generate")
    Terminal(quiet=quiet).say(f"{path}: {config.method}{' + DER' * config.der} on {data.name},"
        f" epoch {loaded.get('epoch')};"
        f" {n} images of {len(wanted)} classes, {where}, CPU threads {threads}, seed {seed}")
    x, y = data.x_train.to(where), data.y_train.to(where)
    energies = ebm_at.class_energies(model, x, y, len(data.classes))
    pcas = [ebm_at.fit_pca(x[y == k], components) for k in range(len(data.classes))]
    settings |= {"checkpoint": str(path), "out": str(folder), "device": str(where)}
    report = {"settings": settings, "dataset": data.name, "method": config.method,
              "der": config.der, "epoch": loaded.get("epoch"), "device": device_name(where),
              "threads": threads, "torch": torch.__version__}
    judged, real = None, []
    if metrics:
        judged = Judge(judge, config, data, wanted, reference, batch_size, quiet)
        real = [{"name": "real images", **judged.of(judged.x[:n], judged.y[:n], judged.train[:n])}]
        report |= judged.told | {"real": real[0]}
    # Every option that ebm_at.generate or sgld has by the same name goes there.
    taken = {p for f in (ebm_at.generate, ebm_at.sgld) for p in inspect.signature(f).parameters}
    options = {k: v for k, v in settings.items() if k in taken} | {"guide": GUIDES[guide]}
    y = torch.tensor(wanted, device=where).repeat_interleave(per_class)
    names, rows, frames = [data.classes[k] for k in wanted], [], []
    filmed = [k * per_class + i for k in range(len(wanted)) for i in range(min(8, per_class))]
    ways = {f"{init}, {stop}": {}}
    if compare:
        adaptive = "sampled" if stop == "fixed" else stop
        changes = {"fixed": {"stop": "fixed"}, adaptive: {}, "zero steps": {"steps": 0},
                   "zero steps, one candidate": {"steps": 0, "candidates": 1}}
        ways = {f"{start}, {way}": {"init": start, "stop": adaptive} | change
                for start in ebm_at.STARTS for way, change in changes.items()}
        (folder / "grids").mkdir()
    def tell():
        """Saves and shows the ways so far; returns words on them."""
        done = {"compared": rows, "complete": len(rows) == len(ways)}
        write_json(folder / "report.json", report | (done if compare else {"generated": rows[0]}))
        if compare:
            write_csv(folder / "compare.csv", rows + real, list(rows[0]))
        title = ", ".join([f"{n} images", *(f"real: {row['n']}" for row in real)])
        keys = "name", "steps", "fd", "is", "precision", "recall", "agreement", "nearest_pixels"
        say(table(rows + real, keys, title))
        return f"{len(rows)} of {len(ways)} ways are in {folder}/report.json"
    with keeping(lambda: tell() if rows else "", (KeyboardInterrupt, Exception)):
        for name, change in ways.items():
            began = time.perf_counter()
            with Bar(name, n, quiet) as bar:
                def on_progress(step, x, walks):
                    ended = n - len(walks)
                    bar.to(ended + len(walks) * step / max(1, steps), f"{ended}/{n} images")
                    frames.extend([to_uint8(x[filmed]).cpu()] * trace)
                x, record = ebm_at.generate(model, pcas, energies, y, on_progress=on_progress,
                                            **options | change)
            x8, record = to_uint8(x), {k: v.cpu() for k, v in record.items()}
            rows.append({"name": name, "n": n, "seconds": time.perf_counter() - began,
                "steps": record["steps"].float().mean().item(),
                "no_step": int((record["steps"] == 0).sum()),
                "at_target": int((record["energy_end"] <= record["target"]).sum()),
                **{k: record[k].nanmean().item() for k in ("energy_start", "energy_end")},
                **(judged.of(x8, y) if judged else {})})
            file = f"grids/{name.replace(',', '').replace(' ', '-')}.png" if compare else "grid.png"
            draw_page([row[:10] for row in x8.split(per_class)], names).save(folder / file)
    tell()
    if not compare:  # one flat folder of PNGs, as FID tools want it
        files = [f"{i:05d}-class-{file_name(k, data.classes[k])}" for i, k in enumerate(y.tolist())]
        save_pngs(folder / "samples", x8, files)
        walks = [{"file": f"samples/{name}.png", "label": k.item()} | dict(zip(record, walk))
                 for name, k, *walk in zip(files, y, *(v.tolist() for v in record.values()))]
        write_csv(folder / "energies.csv", walks, list(walks[0]))
    if save_real:
        chosen = rows_of(data.y_test, wanted, n)
        save_pngs(folder / "real", data.x_test[chosen], [f"{i:05d}" for i in range(n)])
    if trace:
        save_film(folder, frames, filmed, record["steps"], names)
    still = f"{rows[0]['no_step']} of {n} images took no step: they are their starts.\n"
    say(still * (not compare) + saved_in(folder))


def rows_of(y, classes, most=0):
    """Rows of the images of some classes: all of them, or `most`, each class by its share."""
    rows = torch.isin(y, torch.tensor(classes)).nonzero()[:, 0]
    return rows[ebm_at.stratified(y[rows], min(most or len(rows), len(rows)), 0)]


def ordinary_classifier(config, data, quiet):
    """The path of a judge of these data, trained once."""
    if config.limit:  # the judge may see all of it
        data = ebm_at.load_data(config.dataset, config.data_dir, 0, config.val_fraction)
    folder = Path("runs", "judges", f"{Path(data.name).stem}-{ebm_at.checksum(data):08x}")
    if not (folder / "last.pt").exists():
        settings = ebm_at.recipe(
            config.dataset, "none", model="small", width=32, schedule="triangular", lr=0.2,
            epochs=5 if data.name == "shapes" else 12, batch_size=min(128, len(data.x_train)),
            probe_size=4, seed=1, device=config.device)
        trainer = ebm_at.Trainer(settings, data)
        with Bar("training the judge", settings.epochs, quiet) as bar:
            list(trainer.run(on_progress=lambda e, i, of: bar.to(e + i / of)))
        folder.mkdir(parents=True, exist_ok=True)
        ebm_at.save_run(trainer, folder)  # only now: half a judge must not be found
    return folder / "last.pt"


class Judge:
    """A network that did not make the images, and what it sees in real ones and in made ones."""

    def __init__(self, name, config, data, classes, most, batch_size, quiet):
        device, self.batch_size = torch.device(config.device), batch_size
        path = (ordinary_classifier(config, data, quiet) if name == "classifier"
                else find_checkpoint(name))
        self.network, found = ebm_at.load_model(path, device)
        fits = found["spec"]["in_channels"] == data.x_train.shape[1]
        if name != "classifier" and not (fits and found.get("classes") == data.classes):
            raise BadInput(f"the judge '{name}' was trained on other images than '{data.name}' has")
        train, test = (rows_of(y, classes, most) for y in (data.y_train, data.y_test))
        if min(len(test), len(train)) < 2:
            raise BadInput("fewer than 2 real images of these classes: raise --reference, or use"
                           " --no-metrics")
        self.x, self.y = data.x_test[test].to(device), data.y_test[test].to(device)
        self.near = data.x_train[rows_of(data.y_train, classes)]
        x = data.x_train[train].to(device)
        self.train, _ = ebm_at.judge_images(self.network, x, batch_size)
        self.test, p = ebm_at.judge_images(self.network, self.x, batch_size)
        self.told = {"judge": f"{path}, epoch {found.get('epoch')}",
                     "reference": f"{len(test)} test images",
                     "judge_test_accuracy": (right := ebm_at.class_agreement(p, self.y))}
        if right < (1 + 1 / len(classes)) / 2:  # nearer to guessing than to knowing
            print(f"warning: the judge knows only {right:.1%} of the real test images: FD, IS and"
                  " class say little; name a better one with --judge RUN", file=sys.stderr)

    def of(self, x8, y, against=None):
        """Every metric of images, uint8 as they are saved; for real ones FD and the like are those
        of `against`, features of training images, since the test images are real ones, too."""
        features, p = ebm_at.judge_images(self.network, x8, self.batch_size)
        against = features if against is None else against
        k = min(3, len(against) - 1, len(self.test) - 1)
        precision, recall = ebm_at.precision_recall(self.test, against, k)
        score, spread = ebm_at.inception_score(p, min(10, len(p)))
        made = ebm_at.as_pixels(x8).flatten(1)
        near = [ebm_at.nearest_distance(made, ebm_at.as_pixels(part.to(made.device)).flatten(1))[0]
                for part in self.near.split(5000)]
        pixels = torch.stack(near).amin(0)
        deep, _ = ebm_at.nearest_distance(features, self.train)
        return {"n": len(against), "fd": ebm_at.frechet_distance(against, self.test),
            "precision": precision, "recall": recall, "is": score, "is_std": spread,
            "agreement": ebm_at.class_agreement(p, y), "nearest_pixels": pixels.median().item(),
            "nearest_pixels_min": pixels.min().item(), "nearest_features": deep.median().item()}


def save_film(folder, frames, filmed, steps, names):
    """trace/<class>.png, from start to stop, and trace.gif, all classes at once."""
    rows = torch.tensor(filmed).view(len(names), -1)
    longest = steps[rows].argmax(1)  # of the filmed images of a class, the one that walked farthest
    chosen = torch.arange(len(names)) * rows.shape[1] + longest
    film = torch.stack(frames)[:, chosen]  # (T, classes, C, H, W)
    (folder / "trace").mkdir()
    for i, name in enumerate(names):
        at = sorted({round(int(steps[filmed[chosen[i]]]) * j / 9) for j in range(10)})
        draw_page([film[at, i]], [name]).save(folder / "trace" / f"{file_name(i, name)}.png")
    pages = [draw_page([frame], [f"step {t:03d}"]) for t, frame in enumerate(film)]
    pages[0].save(folder / "trace.gif", save_all=True, append_images=pages[1:], loop=0,
                  duration=[200] * (len(pages) - 1) + [2000])


def file_name(k, name):
    """A class in a file name, distinct by its number: 0, "T-shirt/top" -> "00-T-shirt_top"."""
    safe = (c if c.isascii() and (c.isalnum() or c == "-") else "_" for c in name[:40])
    return f"{k:02d}-{''.join(safe)}"


def main():
    """Runs the command; every foreseeable end becomes one line on stderr and an exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the caller
        stream.reconfigure(errors="backslashreplace")  # a name it cannot show must not stop a run
    arguments, code = sys.argv[1:] or ["--help"], 0
    try:
        if any(not a.strip() or re.fullmatch("--[^=]*=", a) for a in arguments):
            raise BadInput("an option or argument has an empty value: give one, or leave it out")
        command = typer.main.get_command(app)  # called by hand: typer has its own idea of Ctrl-C
        with HELD, command.make_context("cli.py", arguments) as context:
            command.invoke(context)
        print(end="", flush=True)
    except typer.Exit as end:
        code = end.exit_code
    except BaseException as error:
        line, code = explain(error)
        line += f": {kept}" if (kept := getattr(error, "kept", "")) else ""
        # What all processes of torchrun find wrong is said by one; what fails in one, by that one.
        if LEADER or not isinstance(error, (BadInput, RunError, KeyboardInterrupt)):
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
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 128 + (error.args or (signal.SIGINT,))[0]
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a value out of range
        return error.format_message().replace("Value error, ", ""), 2
    full = isinstance(error, RuntimeError) and "allocate memory" in str(error)  # torch on a CPU
    if full or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return "out of memory: lower --batch-size, or take a smaller model or fewer images", 1
    if isinstance(error, OSError):
        name = f"cannot use '{error.filename}'" if error.filename else "the output has ended"
        return f"{name}: {error.strerror or error}", 1
    if isinstance(error, (BadInput, RunError, OverflowError)):
        return str(error), 1 if isinstance(error, RunError) else 2
    if hasattr(error, "kept"):  # whatever a stranger's model raised while it was attacked
        return f"{type(error).__name__}: {error}", 1
    raise error


if __name__ == "__main__":
    main()
