"""Differential tests: `aqtp` 0.9.0 beside ours, as a black box, compared bit for bit."""

import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from aqt_engine import Context, config
from engine.contractions import assert_same_bits, contractions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle's own, on today's JAX
    import aqt.jax.v2.config as aqtp_config

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def both(case, ours, theirs):
    """Value and both gradients, of ours and of aqtp's, each under jit."""
    key = jax.random.PRNGKey(case.seed)
    theirs = aqtp_config.set_context(theirs, key, train_step=None)

    def run(contract):
        def f(lhs, rhs):
            return contract(lhs, rhs)

        @jax.jit
        def value_and_gradients(lhs, rhs, g):
            out, vjp = jax.vjp(f, lhs, rhs)
            return out, *vjp(g)

        return value_and_gradients(
            jnp.asarray(case.lhs), jnp.asarray(case.rhs), jnp.asarray(case.cotangent)
        )

    return (
        run(lambda lhs, rhs: ours(lhs, rhs, case.dimension_numbers, context=Context(key=key))),
        run(lambda lhs, rhs: theirs(lhs, rhs, case.dimension_numbers)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@hypothesis.given(data=st.data())
def test_fully_quantized_forward_and_gradients(dtype, data):
    case = data.draw(contractions(dtype))
    bits = data.draw(st.sampled_from([(8, 8), (8, None), (4, 8), (2, 4), (None, 8), (8, 4)]))
    use_fwd_quant = data.draw(st.booleans())
    stochastic = data.draw(st.booleans())
    settings = dict(
        fwd_bits=bits[0],
        bwd_bits=bits[1],
        use_fwd_quant=use_fwd_quant,
        use_stochastic_rounding=stochastic,
    )
    found, expected = both(
        case, config.fully_quantized(**settings), aqtp_config.fully_quantized(**settings)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_bits(ours, theirs)
