"""What every command does with results, errors and interrupts."""

from __future__ import annotations

import errno
import json
import os

import click
import pytest
from click.testing import CliRunner

from spqr_cli._command import Command, Interrupted, echo_table, emit, format_bytes
from spqr_numba.errors import DataError


def command_that_raises(error: BaseException) -> click.Command:
    @click.command(cls=Command)
    def command(as_json: bool) -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("too little text"), 1, "Error: too little text\n"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/model.safetensors"),
            1,
            "Error: out/model.safetensors: No space left on device\n",
        ),
        (KeyboardInterrupt(), 130, "Error: interrupted; nothing was written\n"),
        (Interrupted("interrupted; half is kept"), 130, "Error: interrupted; half is kept\n"),
    ],
    ids=["ours", "disk", "Ctrl-C", "Ctrl-C in a long command"],
)
def test_errors_are_one_line_and_a_code(error: BaseException, code: int, message: str) -> None:
    result = CliRunner().invoke(command_that_raises(error), [])
    assert result.exit_code == code
    assert result.stderr == message
    assert result.stdout == ""


def test_debug_lets_the_error_through() -> None:
    error = DataError("too little text")
    assert CliRunner().invoke(command_that_raises(error), ["--debug"]).exception is error


def test_a_bug_is_not_hidden() -> None:
    error = RuntimeError("a bug")
    assert CliRunner().invoke(command_that_raises(error), []).exception is error


def test_results_for_people_or_as_json() -> None:
    rows = [
        {"layer": "q", "bits": 3.94567, "loss": None},
        {"layer": "down", "bits": 12.0, "loss": 0.5},
    ]

    @click.command(cls=Command)
    def command(as_json: bool) -> None:
        emit(rows, as_json, lambda: echo_table(rows))

    assert CliRunner().invoke(command, []).stdout.splitlines() == [
        "layer   bits  loss",
        "q      3.946     -",
        "down      12   0.5",
    ]
    assert json.loads(CliRunner().invoke(command, ["--json"]).stdout) == rows


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1234567, "1.23 MB"), (13.5e9, "13.50 GB")],
)
def test_format_bytes(count: float, text: str) -> None:
    assert format_bytes(count) == text
