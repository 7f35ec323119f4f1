"""How early, and how often falsely, would each rule have called catastrophic overfitting?

    python tutorials/results/alarms.py

It reads all stored runs but those of robust overfitting and rescues. Every rule sees a run as it
happens: it may use no later epoch. A run COLLAPSED if PGD-10 accuracy on test images ended below
60% of its best, or below the 10% of one answer for all; the collapse is the first epoch, after the
three in which eps grows, from which on it stayed there. Logs older than the free statistics (no
share of AAEs) count for the rules that need none.
"""

from pathlib import Path

from logs import read

SETS = Path(__file__).resolve().parent / "train"
RULES = {  # name: (column that is needed, does it ring at this row?)
    "accuracies (catastrophic_overfitting)": ("verdict", lambda row: row["verdict"] == "CO"),
    "share of AAEs > 20%": ("train_adv_aae", lambda row: row["train_adv_aae"] > 0.20),
    "share of AAEs > 27%": ("train_adv_aae", lambda row: row["train_adv_aae"] > 0.27),
    "mean dE(x) < -.1, training attack": (
        "train_adv_delta_energy", lambda row: row["train_adv_delta_energy"] < -0.1),
    "mean dE(x) > +.1, training attack": (
        "train_adv_delta_energy", lambda row: row["train_adv_delta_energy"] > 0.1),
    "mean abs dE(x) > 2, PGD": (
        "abs_delta_energy_pgd", lambda row: row["abs_delta_energy_pgd"] > 2),
}  # fmt: skip


def logs():
    """{name: rows} of every stored run of training that an alarm could ring in."""
    runs = {}
    for name in ("cpu", "h100", "tried", "first-version"):
        for run, (_, history) in read(SETS / name).items():
            rows = [{k: v if k == "verdict" else float(v) for k, v in r.items()} for r in history]
            runs[f"{run} ({name})"] = rows
    return {k: v for k, v in runs.items() if not k.startswith("ro-") and "rescue" not in k}


def collapse(rows):
    """The first epoch from which on PGD accuracy stays below 60% of its best so far, or None."""
    best, since = 0.0, None
    for row in rows:
        best = max(best, row["pgd_acc"])
        sound = row["pgd_acc"] >= max(0.6 * best, 0.1) or row["epoch"] <= 3
        since = None if sound else since or row["epoch"]
    return since


def judge(runs, column, rings):
    """How a rule fares: {what: number}, and the names of its false alarms and of what it missed."""
    early, collapsed, healthy, false, missed = [], 0, 0, [], []
    for name, rows in runs.items():
        if column not in rows[0]:
            continue
        at, when = next((r["epoch"] for r in rows if rings(r)), None), collapse(rows)
        if when is None:
            healthy += 1
            false += [name] if at is not None else []
        else:
            collapsed += 1
            missed += [name] if at is None else []
            early += [] if at is None else [when - at]
    median = f"{sorted(early)[len(early) // 2]:g}" if early else ""
    return {"collapsed": collapsed, "missed": len(missed), "epochs early, median": median,
            "healthy": healthy, "false alarms": len(false)}, false, missed  # fmt: skip


if __name__ == "__main__":
    runs = logs()
    print(f"{len(runs)} stored runs")
    for name, (column, rings) in RULES.items():
        row, false, missed = judge(runs, column, rings)
        print(f"\n{name}: " + ", ".join(f"{what} {number}" for what, number in row.items()))
        for what, names in (("false in", false), ("missed", missed)):
            print(f"    {what}: {', '.join(names) or 'none'}")
