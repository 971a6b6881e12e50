"""The tests of the source distribution need nothing that it leaves out."""

import ast
import fnmatch
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXCLUDED = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["sdist"]
EXCLUDED = EXCLUDED["exclude"]
FOLDERS = [name for name in EXCLUDED if "*" not in name and not name.endswith(".py")]
TESTS = [
    path
    for path in sorted((ROOT / "tests").glob("*.py"))
    if not any(fnmatch.fnmatch(f"tests/{path.name}", pattern) for pattern in EXCLUDED)
]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_imports_and_paths(path):
    if path.name in ("conftest.py", Path(__file__).name):
        pytest.skip("names what is left out")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]
        else:
            continue
        for name in names:
            for folder in FOLDERS:
                package = folder.replace("/", ".")
                is_inside = name == package or name.startswith((f"{package}.", f"{folder}/"))
                assert not is_inside, f"{name} is in {folder}, which the sdist leaves out"


def test_a_use_would_be_found():
    assert "benchmarks" in FOLDERS and (ROOT / "tests/test_record.py") not in TESTS
    assert len(TESTS) > 40
