"""The command as a whole: help, version, start-up, packaging."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import spqr_numba

from .conftest import Run

ROOT = Path(__file__).parents[2]
COMMANDS = ("bench", "compress", "demo", "eval", "generate", "inspect", "sweep", "write")


def test_help_names_every_command(run: Run) -> None:
    output = run("--help").stdout
    assert re.findall(r"^  (\w+) ", output.partition("Commands:")[2], re.MULTILINE) == [*COMMANDS]


@pytest.mark.parametrize("command", [*COMMANDS, "bench matmul", "bench quantize"])
def test_every_command_has_help_json_and_debug(run: Run, command: str) -> None:
    output = run(f"{command} --help").stdout
    if command != "bench":
        assert "--json" in output
        assert "--debug" in output


def test_version(run: Run) -> None:
    assert spqr_numba.__version__ in run("--version").stdout


@pytest.mark.parametrize("line", ["squeeze", "compress --sideways", "compress", "inspect"])
def test_usage_errors(run: Run, line: str) -> None:
    result = run(line)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "numba", "numpy"}
    program = (
        "import sys, spqr_cli.main\n"
        "try: spqr_cli.main.main(['--help'])\n"
        f"except SystemExit: sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_package_is_installed() -> None:
    """setuptools is told each package by name, because cli/ is renamed."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "spqr_numba").rglob("__init__.py")
    }
    assert set(settings["packages"]) == found | {"spqr_cli"}
