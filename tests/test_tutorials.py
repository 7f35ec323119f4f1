"""The tutorials run, in a short mode; a notebook's claims are `assert`s in its own cells."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SHORT = os.environ | {"EBM_AT_SHORT": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def program(path):
    return "\n".join("".join(cell["source"]) for cell in code_cells(path))


def run(arguments, folder, **options):
    """What a fresh Python process prints, in that folder; it must succeed."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=SHORT, text=True,
                          capture_output=True, **options)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_core_trains_twice_and_paints(tmp_path):
    lines = run([ROOT / "tutorials" / "core.py"], tmp_path).splitlines()
    assert [line.split(" epoch")[0].strip() for line in lines] == ["FGSM"] * 2 + ["FGSM + DER"] * 2
    assert (tmp_path / "core.png").stat().st_size > 10_000  # 80 images of 32 x 32


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_alone_beside_the_library(path, tmp_path):
    (tmp_path / "ebm_at.py").symlink_to(ROOT / "ebm_at.py")
    run(["-"], tmp_path, input=program(path))


def test_four_notebooks_import_only_what_the_project_installs():
    assert len(NOTEBOOKS) == 4
    allowed = {"torch", "numpy", "ebm_at", "matplotlib"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse("\n".join(map(program, NOTEBOOKS)))):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {m.partition(".")[0] for m in modules} <= allowed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored_and_hold_no_error(path):
    cells = code_cells(path)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output["output_type"] != "error" and output.get("name") != "stderr"
               for output in outputs)  # fmt: skip
