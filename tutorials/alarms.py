"""How early, and how often falsely, would each rule have called catastrophic overfitting? One table.

    python tutorials/alarms.py        # all single-step logs and PGD's in results/train/

Every rule sees a run as it happens: it may use no later epoch. A run COLLAPSED if PGD-10 accuracy on
test images ended below 60% of its best, or below the 10% of one answer for all; the collapse is the
first epoch, after the three in which eps grows, from which on it stayed there. Logs older than the free statistics (no share of AAEs) count for rules that need none.
"""

import show

RULES = {  # name: (column that is needed, does it ring at this row?)
    "accuracies (the monitor)": ("verdict", lambda row: row["verdict"] == "CO"),
    "share of AAEs > 20%": ("train_adv_aae", lambda row: row["train_adv_aae"] > 0.20),
    "share of AAEs > 27%": ("train_adv_aae", lambda row: row["train_adv_aae"] > 0.27),
    "mean dE(x) < -.1, training attack": (
        "train_adv_delta_energy", lambda row: row["train_adv_delta_energy"] < -0.1),
    "mean dE(x) > +.1, training attack": (
        "train_adv_delta_energy", lambda row: row["train_adv_delta_energy"] > 0.1),
    "mean abs dE(x) > 2, PGD": (
        "abs_delta_energy_pgd", lambda row: row["abs_delta_energy_pgd"] > 2),
}  # fmt: skip


def collapse(rows):
    """The first epoch from which on PGD accuracy stays below half of its best so far, or None."""
    best, since = 0.0, None
    for row in rows:
        best = max(best, row["pgd_acc"])
        sound = row["pgd_acc"] >= max(0.6 * best, 0.1) or row["epoch"] <= 3
        since = None if sound else since or row["epoch"]
    return since


def logs():
    """{name: rows} of every stored run of training that an alarm could ring in."""
    results = show.HERE / "results"
    files = sorted((results / "train").rglob("*.csv"))
    found = {f.stem if f.parent.name == "train" else f"{f.stem} (first version)":
             show.log(f.relative_to(results)) for f in files}  # fmt: skip
    return {k: v for k, v in found.items() if not k.startswith("ro-") and "rescue" not in k}


def judge(runs, column, rings):
    """How a rule fares: struck and healthy runs it could see, misses, epochs early, false alarms."""
    struck, early, healthy, false, missed = 0, [], 0, [], []
    for name, rows in runs.items():
        if column not in rows[0]:
            continue
        at, when = next((r["epoch"] for r in rows if rings(r)), None), collapse(rows)
        if when is None:
            healthy += 1
            false += [name] if at is not None else []
        else:
            struck += 1
            missed += [name] if at is None else []
            early += [] if at is None else [when - at]
    early = sorted(early)
    median = early[len(early) // 2] if early else None
    return {"collapsed": struck, "missed": len(missed), "epochs early, median": median,
            "healthy": healthy, "false alarms": len(false)}, false, missed  # fmt: skip


if __name__ == "__main__":
    runs = logs()
    table = []
    for name, (column, rings) in RULES.items():
        row, false, missed = judge(runs, column, rings)
        table.append({"rule": name} | row)
        print(f"{name}: false in {', '.join(false) or 'none'}; missed {', '.join(missed) or 'none'}")
    show.table(table, f"{len(runs)} stored runs")
