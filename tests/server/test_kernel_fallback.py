"""A version whose bits are other ones with the int8 kernel."""

import logging

import pytest

from aqt_engine.execution import Mode
from aqt_engine.kernels import library
from aqt_engine.kernels.packing import Packing
from aqt_server import executor
from aqt_server.memory import Memory
from bundles import write_linear
from compiled_kernel import why_no_kernel


def load(path):
    return executor.load(
        path,
        max_batch_rows=8,
        allow_inexact=False,
        mode=Mode.EXACT,
        proof_s=0,
        memory=Memory(limit=None, held=0, available=lambda: 2**40),
    )


@pytest.mark.slow
@pytest.mark.skipif(bool(why_no_kernel()), reason="there is no kernel to fall back from")
def test_a_version_that_is_not_exact_with_the_kernel_is_computed_without(
    tmp_path, monkeypatch, caplog
):
    path = tmp_path / "linear" / "1"
    write_linear(path)
    found = load(path)
    assert (found.exact, found.executor.kernel) == (True, library.instruction_set())
    right = Packing.__call__
    monkeypatch.setattr(Packing, "__call__", lambda self, weight: right(self, weight + 1))
    found = load(path)
    assert (found.exact, found.executor.kernel) == (True, None)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "is computed without the int8 kernel, with which it is not exact" in said
