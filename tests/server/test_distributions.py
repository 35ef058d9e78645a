"""Histograms of weights: every value in its bar, and nothing that a bundle holds breaks them."""

import ml_dtypes
import numpy as np
import pytest

from aqt_server import distributions
from aqt_server.distributions import distribution


def test_integers_have_bars_over_the_whole_range_of_their_type():
    found = distribution(np.array([[-128, -127, 0], [3, 4, 127]], np.int8))
    assert (found.low, found.high, len(found.counts)) == (-128, 128, 64)
    assert {i: c for i, c in enumerate(found.counts) if c} == {0: 2, 32: 2, 33: 1, 63: 1}
    found = distribution(np.array([-8, -8, 7], ml_dtypes.int4))
    assert (found.low, found.high) == (-8, 8)
    assert found.counts == (2, *[0] * 14, 1)
    assert distribution(np.array([0, 255], np.uint8)).high == 256


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float8_e4m3fn", "int32"])
def test_others_from_the_least_to_the_most_however_many_parts(dtype, monkeypatch):
    monkeypatch.setattr(distributions, "_VALUES", 100)
    values = np.random.default_rng(0).normal(size=(17, 31), scale=9).astype(dtype)
    found = distribution(values)
    wide = values.astype(np.float64)
    assert (found.low, found.high) == (wide.min(), wide.max())
    assert found.counts == tuple(np.histogram(wide, 64)[0])


def test_what_is_no_finite_number_is_left_out():
    found = distribution(np.array([np.nan, np.inf, -1, 1, 2], np.float32))
    assert (found.low, found.high, sum(found.counts)) == (-1, 2, 3)
    assert sum(distribution(np.full(5, 3.0, np.float32)).counts) == 5
    widest = np.array([-1, 1]) * np.finfo(np.float64).max
    for array in ([np.nan], [], widest, [True], [1j], ["a"]):
        assert distribution(np.array(array)) is None
