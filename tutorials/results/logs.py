"""Many runs in two files: SET.json has their result.json, SET.csv their history.csv, by run.

    python tutorials/results/logs.py pack tutorials/results/train/cpu RUN ...
    python tutorials/results/logs.py unpack tutorials/results/train/cpu FOLDER ['shapes-*']

`pack` adds runs, or replaces them; `unpack` makes run folders again, which `cli.py compare` reads.
"""

import csv
import fnmatch
import json
from pathlib import Path

import typer

app = typer.Typer(add_completion=False)


def read(path):
    """{run: (result, history)} of a set; history is a list of dicts of text, one per epoch."""
    results, histories = json.loads(Path(f"{path}.json").read_text(encoding="utf-8")), {}
    with open(f"{path}.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            row = {k: v for k, v in row.items() if v}  # older runs lack some columns
            histories.setdefault(row.pop("run"), []).append(row)
    return {run: (results[run], history) for run, history in histories.items()}


def write_rows(path, rows):
    """Writes dicts as CSV; the columns are those of any of them."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@app.command()
def pack(path: str, runs: list[Path]):
    """Adds run folders to a set; paths of the machine they were made on are left out."""
    known = read(path) if Path(f"{path}.json").exists() else {}
    for run in runs:
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        result["settings"]["data_dir"] = "data"
        for told in (result, result["settings"]):
            told["dataset"] = Path(told["dataset"]).name
        with open(run / "history.csv", encoding="utf-8", newline="") as file:
            known[run.name] = result, list(csv.DictReader(file))
    known = dict(sorted(known.items()))
    lines = [f"{json.dumps(k)}: {json.dumps(v[0], sort_keys=True)}" for k, v in known.items()]
    Path(f"{path}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    write_rows(f"{path}.csv", [{"run": k} | row for k, v in known.items() for row in v[1]])


@app.command()
def unpack(path: str, folder: Path, pattern: str = typer.Argument("*")):
    """Makes FOLDER/<run>/ with result.json and history.csv of the runs that match a pattern."""
    known = read(path)
    if not (matching := fnmatch.filter(known, pattern)):
        raise SystemExit(f"no run of {path} matches '{pattern}'")
    for run in matching:
        (folder / run).mkdir(parents=True, exist_ok=True)
        (folder / run / "result.json").write_text(json.dumps(known[run][0]), encoding="utf-8")
        write_rows(folder / run / "history.csv", known[run][1])


if __name__ == "__main__":
    app()
