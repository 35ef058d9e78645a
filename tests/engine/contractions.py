"""Generated contractions: shapes, axes and values, for property tests."""

import dataclasses

import hypothesis.strategies as st
import numpy as np


@dataclasses.dataclass(frozen=True)
class Contraction:
    lhs: np.ndarray
    rhs: np.ndarray
    dimension_numbers: tuple
    cotangent: np.ndarray
    seed: int


@st.composite
def contractions(draw, dtype=np.float32, max_size=7):
    """Any `dot_general`: 0-2 batch, 0-3 contracting, 0-2 remaining axes a side, in any order."""
    sizes = st.integers(1, max_size)
    batch = draw(st.lists(sizes, max_size=2))
    contracting = draw(st.lists(sizes, min_size=1, max_size=3))
    sides = []
    for _ in range(2):
        remaining = draw(st.lists(sizes, max_size=2))
        kinds = [("b", i) for i in range(len(batch))]
        kinds += [("c", i) for i in range(len(contracting))]
        kinds += [("r", i) for i in range(len(remaining))]
        order = draw(st.permutations(kinds))
        size = {"b": batch, "c": contracting, "r": remaining}
        sides.append(
            (
                tuple(size[k][i] for k, i in order),
                tuple(order.index(("c", i)) for i in range(len(contracting))),
                tuple(order.index(("b", i)) for i in range(len(batch))),
                tuple(remaining[i] for k, i in order if k == "r"),
            )
        )
    (lhs, lc, lb, lr), (rhs, rc, rb, rr) = sides
    seed = draw(st.integers(0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    spread = draw(st.sampled_from([0.0, 1.0, 4.0]))
    zeros = draw(st.sampled_from([0.0, 0.3]))

    def values(shape):
        x = rng.normal(size=shape) * np.exp(spread * rng.normal(size=shape))
        x = np.clip(x, -1e4, 1e4)  # float16 ends at 65504
        return np.asarray(np.where(rng.uniform(size=shape) < zeros, 0, x), dtype)

    out = (*batch, *lr, *rr)
    return Contraction(values(lhs), values(rhs), ((lc, rc), (lb, rb)), values(out), seed)


def bits(x):
    """The bit patterns of `x`, for comparison."""
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def assert_same_bits(a, b):
    assert np.asarray(a).dtype == np.asarray(b).dtype
    np.testing.assert_array_equal(bits(a), bits(b))
