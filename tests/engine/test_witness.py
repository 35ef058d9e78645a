"""The witness: what counts as a difference, and which programs are found out."""

import struct

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest

from aqt_engine import witness
from aqt_engine.bundle import Witness

FLOATS = {
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
INTEGERS = {
    "bool": np.bool_,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
    "uint32": np.uint32,
    "int64": np.int64,
    "uint64": np.uint64,
}


def difference(found, expected):
    (only,) = witness.compare(
        {"y": np.atleast_1d(found)}, {"y": np.atleast_1d(expected)}
    ).differences
    return only


@st.composite
def patterns(draw, dtypes, count=6):
    """An array of any bit patterns that the dtype has."""
    dtype = np.dtype(dtypes[draw(st.sampled_from(sorted(dtypes)))])
    nbytes = dtype.itemsize * count
    data = draw(st.binary(min_size=nbytes, max_size=nbytes))
    if dtype == np.bool_:
        data = bytes(b & 1 for b in data)
    return np.frombuffer(data, dtype)


def place(value):
    """Where the value's pattern stands among those of its dtype, by sign and magnitude."""
    width = 8 * value.dtype.itemsize
    pattern = int.from_bytes(value.tobytes(), "little")
    sign, magnitude = pattern >> (width - 1), pattern & ~(1 << (width - 1))
    return -1 - magnitude if sign else magnitude


@hypothesis.given(patterns(FLOATS), st.data())
def test_floats_are_compared_by_pattern(found, data):
    width = found.dtype.itemsize
    raw = data.draw(st.binary(min_size=found.nbytes, max_size=found.nbytes))
    kept = data.draw(st.lists(st.booleans(), min_size=6, max_size=6))
    expected = np.frombuffer(
        b"".join(
            (found if keep else np.frombuffer(raw, found.dtype))[i : i + 1].tobytes()
            for i, keep in enumerate(kept)
        ),
        found.dtype,
    )
    assert len(expected.tobytes()) == 6 * width
    distances = [abs(place(a) - place(b)) for a, b in zip(found, expected, strict=True)]
    result = difference(found, expected)
    assert result.values == result.rows == sum(d > 0 for d in distances)
    assert result.max_ulps == max(distances)
    assert result.total == 6


@hypothesis.given(patterns({**FLOATS, **INTEGERS}))
def test_whatever_has_the_same_bits_is_equal(array):
    verdict = witness.compare({"y": array}, {"y": array.copy()})
    assert verdict.exact
    assert str(verdict) == "exact: 6 values, 0 differ in any bit"


@hypothesis.given(patterns(INTEGERS), st.data())
def test_integers_differ_by_their_difference(found, data):
    raw = data.draw(st.binary(min_size=found.nbytes, max_size=found.nbytes))
    if found.dtype == np.bool_:
        raw = bytes(b & 1 for b in raw)
    expected = np.frombuffer(raw, found.dtype)
    pairs = list(zip(found.tolist(), expected.tolist(), strict=True))
    result = difference(found, expected)
    assert result.values == sum(a != b for a, b in pairs)
    assert result.max_ulps == max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_ulps_across_zero(dtype):
    zero, tiny = np.zeros(1, dtype), ml_dtypes.finfo(dtype).smallest_subnormal
    tiny = np.asarray([tiny], dtype)
    assert difference(zero, -zero).max_ulps == 1
    assert difference(zero, tiny).max_ulps == 1
    assert difference(-zero, -tiny).max_ulps == 1
    assert difference(-tiny, tiny).max_ulps == 3
    assert difference(np.ones(1, dtype), np.nextafter(np.ones(1, dtype), dtype(2))).max_ulps == 1


def test_zeros_of_both_signs_differ_and_a_nan_equals_itself():
    assert difference(np.float32(0.0), np.float32(-0.0)).values == 1
    assert difference(np.float32(np.nan), np.float32(np.nan)).values == 0
    quiet, other = (
        np.frombuffer(struct.pack("<I", bits), np.float32) for bits in (0x7FC00000, 0x7FC00001)
    )
    assert difference(quiet, other) == witness.Difference(
        output="y", values=1, total=1, rows=1, max_ulps=1
    )


def test_the_largest_distance_of_64_bits_is_counted_in_full():
    least, most = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    assert difference(np.int64(least), np.int64(most)).max_ulps == 2**64 - 1
    ends = np.frombuffer(struct.pack("<2Q", 2**64 - 1, 2**63 - 1), np.float64)
    assert difference(ends[:1], ends[1:]).max_ulps == 2**64 - 1


def test_values_and_rows_are_counted_apart():
    expected = np.zeros((4, 3), np.float32)
    found = expected.copy()
    found[1] = 1e-45
    found[3, 2] = 3e-45
    result = difference(found, expected)
    assert result == witness.Difference(output="y", values=4, total=12, rows=2, max_ulps=2)
    same = {"z": np.arange(4)}
    verdict = witness.compare({"y": found, **same}, {"y": expected, **same})
    assert not verdict.exact
    assert str(verdict) == (
        "not exact: output 'y': 4 of 12 values in 2 rows differ, by up to 2 ulp"
    )


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.bool_, np.int32])
def test_nothing_to_compare_is_exact(shape, dtype):
    empty = np.zeros(shape, dtype)
    assert difference(empty, empty) == witness.Difference(
        output="y", values=0, total=0, rows=0, max_ulps=0
    )


@hypothesis.given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, max_side=4)), st.data()
)
def test_layout_does_not_matter(array, data):
    axis = data.draw(st.integers(0, array.ndim - 1))
    turned = np.moveaxis(np.ascontiguousarray(np.moveaxis(array, axis, 0)), 0, axis)
    assert difference(turned, array).values == 0
    assert difference(np.broadcast_to(array[:1], array.shape), array).total == array.size


Y = np.zeros((4, 3), np.float32)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"y": Y[:3]}, "float32[3, 3]"),
        ({"y": Y[:, :1]}, "float32[4, 1]"),
        ({"y": Y.astype(np.float64)}, "float64[4, 3]"),
        ({"z": Y}, "'z'"),
        ({"y": Y, "z": Y}, "'z'"),
        ({}, "{}"),
    ],
)
def test_what_cannot_be_compared_is_named(found, said):
    with pytest.raises(ValueError, match="cannot be compared") as caught:
        witness.compare(found, {"y": Y})
    assert said in str(caught.value)
    assert "{'y': 'float32[4, 3]'}" in str(caught.value)


def rowwise(inputs):
    x = inputs["x"].astype(np.float32)
    return {"y": x * 2 + inputs["i"][:, None], "flag": inputs["flag"] ^ (inputs["i"] > 3)}


def made(program=rowwise, rows=8, dtype=np.float32):
    rng = np.random.default_rng(0)
    inputs = {
        "x": rng.normal(size=(rows, 3)).astype(dtype),
        "i": rng.integers(0, 9, rows).astype(np.int32),
        "flag": rng.integers(0, 2, rows).astype(bool),
    }
    return Witness(inputs=inputs, outputs=program(inputs))


def convicted(program, w=None):
    w = made() if w is None else w
    verdicts = witness.prove(program, w)
    return {trial for trial, verdict in verdicts.items() if not verdict.exact}


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_a_program_of_single_rows_is_proved(rows, dtype):
    w = made(rows=rows, dtype=dtype)
    assert witness.check(rowwise, w).exact
    assert convicted(rowwise, w) == set()


def test_every_manner_of_presenting_rows_is_tried():
    seen = []

    def recording(inputs):
        seen.append({k: v.copy() for k, v in inputs.items()})
        return rowwise(inputs)

    w = made()
    with np.errstate(all="ignore"):
        assert len(witness.prove(recording, w)) == len(seen)
    assert {len(s["i"]) for s in seen} == {1, 2, 4, 8}
    x = w.inputs["x"]
    assert any(np.array_equal(s["x"], x[::-1]) for s in seen)
    assert any(np.array_equal(s["x"], np.roll(x, 1, 0)) for s in seen)
    infinities = [s for s in seen if np.isinf(s["x"]).any()]
    nans = [s for s in seen if np.isnan(s["x"]).any()]
    most = [s for s in seen if (s["x"] == np.finfo(np.float32).max).any()]
    least = [s for s in seen if (s["x"] == np.finfo(np.float32).min).any()]
    for trial in (infinities, nans, most, least):
        assert len(trial) == 2
        kept = [np.flatnonzero((s["x"] == x).all(axis=1)).tolist() for s in trial]
        assert kept == [[0, 2, 4, 6], [1, 3, 5, 7]]
    for trial, integer, flag in (
        (infinities, np.iinfo(np.int32).max, True),
        (most, np.iinfo(np.int32).max, True),
        (least, np.iinfo(np.int32).min, False),
        (nans, np.iinfo(np.int32).min, True),
    ):
        assert (trial[0]["i"][1], trial[0]["flag"][1]) == (integer, flag)


def test_the_trials_have_names():
    neighbors = ("zeros", "largest values", "smallest values", "infinities", "NaNs")
    with np.errstate(all="ignore"):
        assert set(witness.prove(rowwise, made(rows=13))) == {
            *(f"with the first {rows} rows" for rows in (1, 2, 4, 8)),
            *("with all rows", "with the rows reversed", "with the rows shifted by one"),
            *(f"with {n} beside the {p} rows" for n in neighbors for p in ("even", "odd")),
        }


def add(inputs, y):
    answer = rowwise(inputs)
    return {**answer, "y": answer["y"] + np.float32(y)}


def test_a_program_that_mixes_rows_is_found():
    def centered(inputs):
        return add(inputs, -inputs["x"].mean(axis=0))

    w = Witness(inputs=made().inputs, outputs=centered(made().inputs))
    assert witness.check(centered, w).exact
    with np.errstate(all="ignore"):
        found = convicted(centered, w)
    assert "with all rows" not in found
    assert {"with the first 1 rows", "with the first 4 rows"} <= found
    assert {"with zeros beside the even rows", "with NaNs beside the odd rows"} <= found


def test_a_program_that_depends_on_the_position_is_found():
    def positional(inputs):
        x = inputs["x"]
        return add(inputs, (np.arange(len(x)) % 4)[:, None])

    w = Witness(inputs=made().inputs, outputs=positional(made().inputs))
    with np.errstate(all="ignore"):
        assert convicted(positional, w) == {
            "with the rows reversed",
            "with the rows shifted by one",
        }


def test_a_program_that_depends_on_the_number_of_rows_is_found():
    def counting(inputs):
        return add(inputs, len(inputs["x"]) == 2)

    with np.errstate(all="ignore"):
        assert convicted(counting) == {"with the first 2 rows"}


@pytest.mark.parametrize(
    ("poison", "trial"),
    [
        (np.isnan, "NaNs"),
        (np.isinf, "infinities"),
        (lambda x: x == np.finfo(np.float32).max, "largest values"),
        (lambda x: x == np.finfo(np.float32).min, "smallest values"),
        (lambda x: x == 0, "zeros"),
    ],
)
def test_a_program_that_only_one_kind_of_neighbor_breaks_is_found(poison, trial):
    def poisoned(inputs):
        return add(inputs, poison(inputs["x"]).any())

    with np.errstate(all="ignore"):
        assert convicted(poisoned) == {f"with {trial} beside the {p} rows" for p in ("even", "odd")}


def test_a_program_that_one_side_of_the_neighborhood_breaks_is_found():
    def leaking_down(inputs):
        leaked = np.isnan(np.roll(inputs["x"], 1, axis=0)[:, :1])
        leaked[::2] = False
        return add(inputs, leaked)

    with np.errstate(all="ignore"):
        assert convicted(leaking_down) == {"with NaNs beside the odd rows"}


def test_one_bit_of_one_row_is_enough():
    w = made()
    y = w.outputs["y"].copy()
    y[5, 1] = np.nextafter(y[5, 1], np.float32(np.inf))
    verdict = witness.check(rowwise, Witness(inputs=w.inputs, outputs={**w.outputs, "y": y}))
    assert not verdict.exact
    assert [(d.output, d.values, d.max_ulps) for d in verdict.differences if d.values] == [
        ("y", 1, 1)
    ]


@pytest.mark.parametrize(("rows", "found"), [(1, 8), (8, 8), (9, 16), (40, 40)])
def test_at_least_repeats_whole_witnesses(rows, found):
    w = made()
    repeated = witness.at_least(w, rows)
    for side in ("inputs", "outputs"):
        for name, array in getattr(w, side).items():
            longer = getattr(repeated, side)[name]
            assert longer.dtype == array.dtype
            assert len(longer) == found
            np.testing.assert_array_equal(longer, np.resize(array, longer.shape))
    assert witness.check(rowwise, repeated).exact
