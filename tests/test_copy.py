"""A stranger copies one function out of the file: little else has to come along, and it runs."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

import ebm_at

BODY = ast.parse(Path(ebm_at.__file__).read_text(encoding="utf-8")).body
DEFINED = {node.name: node for node in BODY if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def needs(name, found):
    """`found` and all that `name` needs of the module, itself included."""
    if name in DEFINED and name not in found:
        found.add(name)
        for node in ast.walk(DEFINED[name]):
            needs(getattr(node, "id", None), found)
    return found


def lines_of_code(node):
    """Lines without comments (which the tree has lost), blank lines and docstrings."""
    node = ast.parse(ast.unparse(node))
    for part in ast.walk(node):
        if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
            part.value.value = 0
    return sum(line.strip() not in ("", "0") for line in ast.unparse(node).splitlines())


@pytest.mark.parametrize("name", ["pgd", "fgsm", "der", "energy_x", "sgld"])
def test_a_function_can_be_copied_with_little_else(name, tmp_path, tiny_net):
    names = needs(name, set())
    assert len(names) <= 1 + 8 and sum(lines_of_code(DEFINED[n]) for n in names) <= 70, names
    kept = [node for node in BODY if isinstance(node, (ast.Import, ast.ImportFrom))]
    kept += [node for node in BODY if getattr(node, "name", None) in names]
    (tmp_path / "copied.py").write_text("\n".join(map(ast.unparse, kept)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("copied", tmp_path / "copied.py")
    spec.loader.exec_module(copied := importlib.util.module_from_spec(spec))
    net, x, y = tiny_net(), torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    logits, target = net(x).detach(), torch.full((4,), -9.0)
    given = {"der": (logits, 2 * logits, y), "energy_x": (logits,), "sgld": (net, x, y, target)}
    given = given.get(name, (net, x, y, 0.1))
    found, expected = (torch.manual_seed(0) and getattr(module, name)(*given)
                       for module in (copied, ebm_at))  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
