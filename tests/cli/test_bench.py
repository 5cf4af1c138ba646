"""spqr bench: its options reach the measurement, its rows become a table."""

from __future__ import annotations

import pytest

from .conftest import Run


@pytest.mark.parametrize("what", ["matmul", "quantize"])
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--shape 4096", 2, "'4096' must look like 4096x4096"),
        ("--shape 0x8", 2, "'0x8' must look like 4096x4096"),
        ("--device tpu", 2, "'tpu' is not one of 'cpu', 'cuda'"),
        ("--device cuda", 1, "cannot measure on cuda"),
    ],
)
def test_bad_input(run: Run, what: str, options: str, code: int, message: str) -> None:
    result = run(f"bench {what} {options}")
    assert result.exit_code == code
    assert message in result.stderr
