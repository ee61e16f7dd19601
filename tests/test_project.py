"""The house: one source of pins, imports in one direction, notebooks executed, and what the README promises."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = [path for name in ("dvirl", "kangaroo") for path in (ROOT / name).rglob("*.py")]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_yml_takes_its_pins_from_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert conda == ["python=3.11", "pip"] and pip == ["-e .[dev]"]
    pins = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    pins.remove(
        "triton==3.6.0; platform_system == 'Linux'"
    )  # torch's CUDA build brings the one that it needs
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins)
    assert project["requires-python"] == ">=3.11,<3.12"


@pytest.fixture
def clone(tmp_path):
    """What the working directory is in a clone of the original Kangaroo; run Python there, as it is installed."""
    (tmp_path / "kangaroo").mkdir()
    for name in ("adapter", "earlyexit", "kangaroo_model"):
        (tmp_path / f"kangaroo/{name}.py").write_text("foreign = True\n")
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def python(*words, **environment):
        return subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**plain, **environment},
            capture_output=True,
            text=True,
        )

    return python


DVIRL = Path(sys.executable).parent / "dvirl"
OURS = """from importlib.util import find_spec
from pathlib import Path
assert "DRAFTERS" in Path(find_spec("kangaroo").origin).with_name("adapter.py").read_text()"""
"""Asks which package would be imported, which takes no seconds to import it."""


def test_a_folder_kangaroo_in_the_working_directory_hides_nothing(clone):
    """Holds by the way of installing that pyproject.toml sets: `make setup`, or any `pip install -e`."""
    for words in (["-c", OURS], ["-m", "dvirl.cli", "cost", "--help"]):
        found = clone(*words)
        assert found.returncode == 0, found.stderr


def test_a_package_kangaroo_in_the_working_directory_can_be_left_out(clone, tmp_path):
    """Python looks there first for `-m`, `-c` and notebooks; for a script it looks in the script's own folder."""
    (tmp_path / "kangaroo/__init__.py").touch()
    assert clone("-c", OURS).returncode
    assert clone(DVIRL, "cost", "--help").returncode == 0
    found = clone("-c", OURS, PYTHONSAFEPATH="1")
    assert found.returncode == 0, found.stderr


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_imports_flow_one_way():
    entry_points = {"cli.py", "train_dvi.py", "train_sgp.py", "run_sgp_experiment.py", "study.py",
                    "run_dvi_experiment.py"}  # fmt: skip
    for path in PACKAGES:
        names = set(imported(path))
        if "kangaroo" in path.parts:
            assert not [n for n in names if n.startswith("dvirl")], path
        if path.parent.name == "dvirl" and path.name not in entry_points:
            assert not [n for n in names if n.startswith("dvirl.evaluation")], path
        assert "sys.path" not in path.read_text(), path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_committed_notebooks_are_executed_in_order_and_plain(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("parameters" in cell.metadata.get("tags", []) for cell in cells)
    for cell in cells:
        limit = 24 if "parameters" in cell.metadata.get("tags", []) else 15
        assert len(cell.source.splitlines()) <= limit, cell.source
        assert not re.search(r"^(def|class) ", cell.source, re.M)
        assert not any(
            output.output_type == "error" or output.get("name") == "stderr" for output in cell.outputs
        )
        assert not any("NBVAL_SKIP" in tag for tag in cell.metadata.get("tags", []))


def test_the_licence_is_apache():
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_a_missing_python_is_one_sentence():
    result = subprocess.run(["make", "setup", "PYTHON=/nowhere/python3.11", "VENV=/tmp/dvirl-no-venv"], cwd=ROOT,
                            capture_output=True, text=True)  # fmt: skip
    assert result.returncode == 2
    assert "dvirl needs Python 3.11; /nowhere/python3.11 is another version or is missing" in result.stdout
    result = subprocess.run(
        ["make", "setup", "PYTHON=", "VENV=/tmp/dvirl-no-venv"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2 and "found none" in result.stdout


def test_the_ci_calls_the_readmes_test_command():
    assert (ROOT / ".ci/run").read_text().rstrip().splitlines()[-1] == "make test"
