"""Arrows point one way (who may import whom), read from the source; and each public function has a
test of its name.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["model", "sft", "reward", "eval", "rejection_sampling", "gatt", "ppo", "experiments"]
OURS = {*ORDER, "assignments", "data", "play", "report", "runtime"}


def is_main_block(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports(path: Path) -> set[tuple[str, bool]]:
    """(package of ours, whether it is imported at the top level) for all imports in a file."""
    tree, found = ast.parse(path.read_text()), set()
    inside = {
        node
        for outer in ast.walk(tree)
        for node in ast.walk(outer)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or is_main_block(outer)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [path.parent.name if node.level else node.module]
        elif isinstance(node, ast.Call) and getattr(
            node.func, "id", getattr(node.func, "attr", "")
        ) in ("__import__", "import_module"):
            names = (
                [node.args[0].value] if node.args and isinstance(node.args[0], ast.Constant) else []
            )
        found |= {
            (name.split(".")[0], node not in inside) for name in names if name.split(".")[0] in OURS
        }
    return found


def stages() -> list[Path]:
    return [ROOT / f"{name}.py" for name in ORDER if (ROOT / f"{name}.py").exists()]


def allowed(module: str) -> set[str]:
    if module == "data":
        return {"data"}
    if module == "runtime":
        return {"model", "data", "runtime"}
    if module == "report":
        return {"data", "runtime", "report"}  # what it shows is handed to it
    if module == "play":
        return {*ORDER[:-1], "data", "runtime", "report", "play"}
    above = ORDER[: ORDER.index(module)]
    if module == "experiments":
        above = ORDER
    return {*above, "data", "runtime", "report"}


def files(module: str) -> list[Path]:
    path = ROOT / f"{module}.py"
    return [path] if path.exists() else sorted((ROOT / module).rglob("*.py"))


@pytest.mark.parametrize("module", [*ORDER, "data", "runtime", "report", "play"])
def test_arrows_point_one_way(module):
    for path in files(module):
        wrong = {name for name, _ in imports(path)} - allowed(module)
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"
    assert files(module) or module in ("gatt", "ppo", "experiments")


def file_of(name: str) -> Path | None:
    """The file of a module of ours, such as `data.world.words`."""
    path = ROOT / name.replace(".", "/")
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.exists():
            return file
    return None


def files_imported(path: Path) -> set[Path]:
    """The files of ours that a file imports, at the top or late."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                names.append(submodule if file_of(submodule) else node.module)
        imported |= {file_of(name) for name in names if name.split(".")[0] in OURS}
    return imported - {None}


def find_circle(graph: dict, start, walked: tuple = ()) -> tuple:
    """A way through the graph that comes back to where it began; () if there is none."""
    if start in walked:
        return (*walked[walked.index(start) :], start)
    for following in graph.get(start, ()):
        circle = find_circle(graph, following, (*walked, start))
        if circle:
            return circle
    graph[start] = ()  # nothing to be found from here
    return ()


def test_no_file_imports_one_that_imports_it():
    graph = {}
    for module in (*ORDER, "data", "runtime", "report", "play"):
        for path in files(module):
            graph[path] = files_imported(path)
    assert len(graph) > 60
    for path in list(graph):
        circle = find_circle(graph, path)
        assert not circle, " -> ".join(str(file.relative_to(ROOT)) for file in circle)


def test_find_circle():
    assert find_circle({1: [2, 3], 2: [3], 3: []}, 1) == ()
    assert find_circle({1: [2], 2: [3], 3: [2]}, 1) == (2, 3, 2)


def test_model_imports_nothing_of_ours():
    assert not imports(ROOT / "model.py")


def test_the_reading_of_imports(tmp_path):
    """The checks above would see a forbidden import however it is written."""
    path = tmp_path / "data" / "bad.py"
    path.parent.mkdir()
    for line, expected in [
        ("import model", ("model", True)),
        ("import torch, runtime.train as t", ("runtime", True)),
        ("from sft import x", ("sft", True)),
        ("def f():\n  from reward import y", ("reward", False)),
        ("from . import z", ("data", True)),
        ("if __name__ == '__main__':\n  import sft", ("sft", False)),
        ("if True:\n  import ppo", ("ppo", True)),
        ("import importlib\nimportlib.import_module('gatt')", ("gatt", True)),
    ]:
        path.write_text(line)
        assert imports(path) == {expected}, line


def test_no_other_files_at_the_top():
    """The top level is what a reader sees first: the seven files and nothing else."""
    assert {path.stem for path in ROOT.glob("*.py")} <= set(ORDER)


@cache
def names_of_tests() -> set[str]:
    return {
        node.name
        for path in (ROOT / "tests").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def snake(name: str) -> str:
    """RewardModel -> reward_model, RMSNorm -> rms_norm, KVCache -> kv_cache."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


@pytest.mark.parametrize("path", stages(), ids=lambda path: path.stem)
def test_each_public_function_has_a_test_of_its_name(path):
    """So that a teacher can blank it. Settings are tested with the commands, plain records with
    their users.
    """
    assert [snake(name) for name in ("RewardModel", "RMSNorm", "KVCache")] == [
        "reward_model",
        "rms_norm",
        "kv_cache",
    ]
    tree = ast.parse(path.read_text())
    public = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and node.name not in ("main", "Settings")
        and (
            isinstance(node, ast.FunctionDef)
            or any(isinstance(part, ast.FunctionDef) for part in node.body)
        )
    ]
    public += [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id == "MARGINS"
    ]
    missing = [
        name
        for name in public
        if not any(re.match(f"test_{snake(name)}(_|$)", test) for test in names_of_tests())
    ]
    assert public and not missing
