"""The notebooks: their code cells, in order, in a fresh process and a short mode; then their claims.

Each claim below is an expression over the names that the notebook's cells have defined: what its prose
says, looked up in what its code computed.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).resolve().parent.parent / "tutorials"
NOTEBOOKS = sorted(path.name for path in TUTORIALS.glob("*.ipynb"))

CLAIMS = {
    "1_energies.ipynb": [
        "gap.abs().max() < 1e-4",  # the identity on random logits
        "toy[0]['accuracy'] > 0.99 and toy[0]['under PGD'] < 0.6",  # right, and helpless
        "toy[1]['under PGD'] > 0.85 and toy[1]['accuracy'] < toy[0]['accuracy']",
        "toy[0]['slope of E, 2nd'] > 3 * toy[0]['slope of E, 1st']",
        "toy[1]['slope of E, 2nd'] < 0.3 * toy[0]['slope of E, 2nd']",
        "toy[1]['mean |dE|'] < 0.5 * toy[0]['mean |dE|']",
        "all(row['E(edge) - E(data)'] < 0 for row in toy)",
        "max(map(abs, rise)) < 1e-3",  # the identity on attacked images
        "energies['ordinary']['pgd']['delta_energy'] > 0",
        "energies['ordinary']['pgd']['accuracy'] < 0.05",
        "energies['robust']['pgd']['delta_energy'] < 0",
        "all(row['delta_energy_xy'] < 0 for name, row in energies['robust'].items()"
        " if name not in ('natural', 'energy-down'))",
        "all(min(t, key=lambda name: t[name]['energy']) == 'energy-down' for t in energies.values())",
    ],
    "2_catastrophic_overfitting.ipynb": [
        # (ten epochs on 1,000 images are too short for the collapse itself: see STORED)
        "trick[1]['|dE(x)|'] < 1e-5 < trick[0]['|dE(x)|']",  # the shift hides it ...
        "abs(trick[1]['CE(x*)'] - trick[0]['CE(x*)']) < 1e-5",  # ... and changes no prediction
        "all(t['sqrt(dE(x)^2 + dE(x, y)^2)'] >= t['|CE(x*) - CE(x)| / sqrt(2)'] - 1e-6 for t in trick)",
        "(logits.grad - by_hand).abs().max() < 1e-5",
        "(logits_adv.grad - by_hand_adv).abs().max() < 1e-5",
        "abs(final[1]['dE(x, y)']) < abs(final[0]['dE(x, y)'])",
        "all(r['alarm, epoch'] for r in early[:5])",
        "not any(r['alarm, epoch'] for r in early[5:])",
        "any(r['AAEs > 20%, from epoch'] for r in early[5:])",  # describes, does not diagnose
        "sweep[0]['verdict'] == 'CO' and sweep[0]['PGD-10'] < sweep[1]['PGD-10']",
    ],
    "3_robust_overfitting.ipynb": [
        # (sixteen epochs are too short for the decay itself: see the stored runs, and STORED)
        "abs(live[1]['dE train, last']) <= abs(live[0]['dE train, last']) + 0.05",
        "(stored := {row['training']: row for row in compared})",
        "stored['pgd, seed 0']['drop (points)'] > 4",
        "2 * stored['pgd-der, seed 0']['drop (points)'] <= stored['pgd, seed 0']['drop (points)']",
        "stored['pgd-der, seed 0']['best'] >= stored['pgd, seed 0']['best']",
        "stored['pgd, seed 0']['dE train'] < 0 < stored['pgd, seed 0']['dE test']",
    ],
    "4_generation.ipynb": [
        "rows[4]['FD'] > 4 * rows[5]['FD'] and rows[6]['FD'] > 4 * rows[7]['FD']",  # fixed, stopped
        # below real images (DER presses energies together: after so few epochs .15 nats are much)
        "all(fixed['E(x, y)'] < real_energy - 0.15 for fixed in rows[::2])",
        "all(stopped['mean steps'] < 15 for stopped in rows[1::2])",
        "rows[1]['FD'] > 5 * max(rows[5]['FD'], rows[7]['FD'])",  # noise against PCA
        "by_temperature[1]['precision'] > by_temperature[-1]['precision']",
        "by_temperature[0]['recall'] < by_temperature[2]['recall']",
        "by_quantile[-1]['FD'] > 2 * by_quantile[1]['FD']",
        "0 < by_temperature[0]['nearest'] < real_nearest",
    ],
}


# The same for the outputs that are stored, where runs are long enough for every claim: the numbers of
# a table's row, found by its first cell, and what must be true of them (the n-th such row).
STORED = {
    "1_energies.ipynb": [
        # accuracy, E(x), dE(x), dE(x, y), cross-entropy; ordinary network first, robust second
        ("pgd", 0, lambda row, of: row[2] > 0 and of("pgd-t-least", 0)[2] < row[2]),
        ("energy-up", 0, lambda row, of: row[1] > max(of(k, 0)[1] for k in ("natural", "apgd-ce"))),
        ("energy-up", 1, lambda row, of: row[1] > max(of(k, 1)[1] for k in ("natural", "apgd-ce"))),
        ("pgd", 1, lambda row, of: row[2] < 0 and 0.1 < row[0] < of("natural", 1)[0]),
    ],
    "2_catastrophic_overfitting.ipynb": [
        # clean, FGSM, PGD-10, seconds, AAEs, dE(x), dE(x, y)
        ("plain FGSM", 0, lambda row, of: row[2] < 0.1),
        ("FGSM + DER", 0, lambda row, of: row[2] > 0.28 and row[0] > 0.5 and row[4] < 0.02),
    ],
    "3_robust_overfitting.ipynb": [
        # best epoch, best, last, drop, train, clean best, clean last, dE test, dE train, seconds
        ("PGD", 0, lambda row, of: row[4] > row[2] + 0.5 and row[3] > 3 and row[8] < -0.5 < row[7]),
        ("PGD + DER", 0, lambda row, of: row[3] < of("PGD", 0)[3] and abs(row[8]) < 0.1),
    ],
    "4_generation.ipynb": [
        # stop, FD, precision, recall, agreement, mean steps, E(x, y), seconds (the stop is skipped)
        ("local-pca", 1, lambda row, of: 10 * row[0] < of("local-pca", 0)[0] and row[3] > 0.9),
        ("local-pca", 1, lambda row, of: row[0] < of("gaussian", 1)[0] < of("pca", 1)[0]),
        ("local-pca", 0, lambda row, of: row[5] < of("local-pca", 1)[5] - 0.5),  # E(x, y)
    ],
}


def code_of(name):
    """A notebook's code cells as one program."""
    cells = json.loads((TUTORIALS / name).read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_in_a_fresh_process_and_keeps_its_claims(name):
    claims = "".join(
        f"\nif not ({claim}):\n    raise SystemExit('not so: ' + {claim!r})"
        for claim in CLAIMS[name]
    )
    environment = os.environ | {"EBM_AT_SHORT": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-"],
        input=code_of(name) + claims,
        cwd=TUTORIALS,
        env=environment | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_there_are_four_notebooks_each_with_claims():
    assert NOTEBOOKS == sorted(CLAIMS) and all(CLAIMS.values())


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_imports_only_what_the_project_installs(name):
    allowed = {"torch", "numpy", "rich", "ebm_at", "show"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(code_of(name))):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {m.partition(".")[0] for m in modules} <= allowed


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_stored(name):
    cells = json.loads((TUTORIALS / name).read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    assert not any(o["output_type"] == "error" for o in outputs)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_numbers_keep_the_claims(name):
    cells = json.loads((TUTORIALS / name).read_text(encoding="utf-8"))["cells"]
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    lines = "".join("".join(o.get("text", "")) for o in outputs).splitlines()
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]

    def row(first, n):
        found = [cells[1:] for cells in table if cells[0] == first][n]
        return [float(cell) for cell in found if cell.replace(".", "").lstrip("-").isdigit()]

    for first, n, claim in STORED[name]:
        assert claim(row(first, n), row), (first, n, row(first, n))
