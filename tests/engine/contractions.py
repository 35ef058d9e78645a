"""Generated contractions: shapes, axes and values, for property tests."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import numpy as np

# Left shape, right shape, dimension numbers: every kind of axis, in and out of order.
CONTRACTIONS = [
    ((5, 7), (7, 3), (((1,), (0,)), ((), ()))),
    ((5, 7), (3, 7), (((1,), (1,)), ((), ()))),
    ((7, 5), (3, 7), (((0,), (1,)), ((), ()))),
    ((6, 129), (129, 5), (((1,), (0,)), ((), ()))),
    ((6, 5), (6, 4), (((0,), (0,)), ((), ()))),
    ((6, 3, 5), (4, 3, 6), (((0,), (2,)), ((1,), (1,)))),
    ((7,), (7,), (((0,), (0,)), ((), ()))),
    ((1, 7), (7, 1), (((1,), (0,)), ((), ()))),
    ((5, 1), (1, 3), (((1,), (0,)), ((), ()))),
    ((4, 5, 7), (4, 7, 3), (((2,), (1,)), ((0,), (0,)))),
    ((2, 3, 5, 4), (2, 6, 3, 4), (((3,), (3,)), ((0, 1), (0, 2)))),
    ((5, 3, 4, 2), (4, 2, 6, 3), (((3,), (1,)), ((1, 2), (3, 0)))),
    ((3, 4, 5), (5, 4, 2), (((1, 2), (1, 0)), ((), ()))),
    ((2, 3, 4, 5), (5, 6, 3, 2), (((1, 0, 3), (2, 3, 0)), ((), ()))),
    ((4, 3, 5, 2), (2, 5, 4, 3), (((2, 3), (1, 0)), ((0, 1), (2, 3)))),
]
MATMUL = CONTRACTIONS[0]


def equation(dimension_numbers, lhs_ndim, rhs_ndim):
    """The einsum letters of a `dot_general`: of its left, its right and its output."""
    (lc, rc), (lb, rb) = dimension_numbers
    lhs = dict(zip((*lb, *lc), "abcdefghijk", strict=False))
    rhs = dict(zip((*rb, *rc), "abcdefghijk", strict=False))
    lhs_rest = [a for a in range(lhs_ndim) if a not in lhs]
    rhs_rest = [a for a in range(rhs_ndim) if a not in rhs]
    lhs |= dict(zip(lhs_rest, "lmnop", strict=False))
    rhs |= dict(zip(rhs_rest, "rstuv", strict=False))
    out = [lhs[a] for a in (*lb, *lhs_rest)] + [rhs[a] for a in rhs_rest]
    return (
        "".join(lhs[a] for a in range(lhs_ndim)),
        "".join(rhs[a] for a in range(rhs_ndim)),
        "".join(out),
    )


def output_shape(lhs, rhs, dimension_numbers):
    left, right, out = equation(dimension_numbers, len(lhs), len(rhs))
    sizes = dict(zip(left, lhs, strict=True)) | dict(zip(right, rhs, strict=True))
    return tuple(sizes[c] for c in out)


def values(rng, shape, dtype=np.float32):
    """Normal or long-tailed, with or without zeros; float16 ends at 65504."""
    x = rng.normal(size=shape) * np.exp(rng.choice([0.0, 1.0, 4.0]) * rng.normal(size=shape))
    x = np.where(rng.uniform(size=shape) < rng.choice([0.0, 0.3, 0.9]), 0, x)
    return np.clip(x, -1e4, 1e4).astype(dtype)


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


def compiled(f, *first, **named):
    """`f` with these arguments, as one program; eager, each operation is compiled by itself."""
    return jax.jit(functools.partial(f, *first, **named))


def value_and_gradients(f, lhs, rhs, cotangent):
    out, vjp = jax.vjp(f, lhs, rhs)
    return out, *vjp(cotangent)


def bits(x):
    """The bit patterns of `x`, for comparison."""
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


def assert_same_bits(a, b):
    assert np.asarray(a).dtype == np.asarray(b).dtype
    np.testing.assert_array_equal(bits(a), bits(b))
