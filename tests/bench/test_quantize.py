"""What `spqr bench quantize` measures, and the torch loop that it measures against."""

from __future__ import annotations

import pytest
import torch

from spqr_numba.bench import quantize
from spqr_numba.bench.reference import quantize_by_column
from spqr_numba.config import SpqrConfig
from spqr_numba.errors import InputError
from spqr_numba.quantize.hessian import factorize
from spqr_numba.quantize.solver import quantize_weight, squared_output

from ..problems import make_problem

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def test_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantize.MODEL_SHAPES, "tiny", TINY)
    first, second = quantize.measure(shapes=["tiny"], blocks=2, windows=3, seqlen=16)
    assert first.keys() == second.keys()
    assert {"forward s", "hessian s", "factorise s", "quantize s"} <= first.keys()
    assert first["tokens"] == 48
    assert first["outliers"] == second["outliers"] > 0


def test_an_unknown_shape() -> None:
    with pytest.raises(InputError, match="'llama9' is none of llama2-7b, llama2-70b"):
        quantize.measure(shapes=["llama9"])


def test_weights_and_blocks_are_two_tables() -> None:
    with pytest.raises(InputError, match="one kind at a time"):
        quantize.measure(shapes=["llama2-7b", (32, 64)])


def test_the_reference_does_the_same_work() -> None:
    problem = make_problem(96, 160)
    config = SpqrConfig()
    factor = factorize(problem.hessian, config)
    columns = problem.weight.T[factor.order]
    theirs = quantize_by_column(problem.weight, factor, config)
    ours = quantize_weight(problem.weight, factor, config)
    loss = squared_output(columns - theirs, factor.hessian).item()
    assert ours.report.loss == pytest.approx(loss, rel=1e-3)
    assert torch.isclose(ours.weight.T[factor.order], theirs).float().mean() > 0.999
