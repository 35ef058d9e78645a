"""Differential tests of calibrations, and of where scales are multiplied back in, against `aqtp`.

Forward and both gradients, bit for bit, both compiled: for two constant scales, and for a clipping
scale, what `aqtp` gives eager differs from what it gives compiled.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from aqt_engine import Context, config
from aqt_engine.calibration import (
    AbsMaxCalibration,
    AbsMeanCalibration,
    ConstantCalibration,
    SnrCalibration,
)
from aqt_engine.config import CalibrationMode, DequantMode, DotGeneral, DotGeneralRaw, Tensor
from engine.contractions import assert_same_bits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle's own, on today's JAX
    import aqt.jax.v2.calibration as aqtp_calibration
    import aqt.jax.v2.config as aqtp_config

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

CASES = 160  # of each pair
MATMUL = ((5, 12), (12, 7), (((1,), (0,)), ((), ())))
BATCHED = ((3, 4, 5, 6), (4, 5, 3, 2), (((2, 0), (1, 2)), ((1,), (0,))))
OUTPUT = ("OUTPUT", "CONTRACTING_AXIS")
THIS = ("THIS_INPUT", "CONTRACTING_AXIS")
THIS_REMAINING = ("THIS_INPUT", "REMAINING_AXIS")
OTHER_REMAINING = ("OTHER_INPUT", "REMAINING_AXIS")

MODES = [
    ((8, 8), OUTPUT, OUTPUT),
    ((8, 8), THIS, THIS),
    ((4, 8), OUTPUT, THIS),
    ((None, 8), OUTPUT, OUTPUT),
    ((4, None), OUTPUT, OUTPUT),
    ((None, 8), OUTPUT, THIS),
    ((None, 4), OUTPUT, THIS_REMAINING),
    ((8, 8), THIS_REMAINING, THIS_REMAINING),
    ((None, 8), OUTPUT, OTHER_REMAINING),
    ((8, None), OTHER_REMAINING, OUTPUT),
    ((8, 8), OTHER_REMAINING, THIS),
]
CALIBRATIONS = {
    "clipping": (AbsMaxCalibration(0.7), ("AbsMaxCalibration", {"clipping_scale": 0.7})),
    "mean": (AbsMeanCalibration(3.0), ("AbsMeanCalibration", {"clipping_scale": 3.0, "p": 1.0})),
    "norm": (AbsMeanCalibration(2.5, 2), ("AbsMeanCalibration", {"clipping_scale": 2.5, "p": 2})),
    "constant": (ConstantCalibration(2.7), ("ConstantCalibration", {"bound": 2.7})),
    "small": (ConstantCalibration(0.1), ("ConstantCalibration", {"bound": 0.1})),
    "search": (
        SnrCalibration((0.9, 0.7, 0.5)),
        ("SnrBasedAutoCalibration", {"auto_clip_search_config": (0.9, 0.7, 0.5)}),
    ),
}


def compiled(contract, dimension_numbers):
    @jax.jit
    def value_and_gradients(lhs, rhs, g):
        out, vjp = jax.vjp(lambda a, b: contract(a, b, dimension_numbers), lhs, rhs)
        return out, *vjp(g)

    return value_and_gradients


def assert_same(ours, theirs, contraction, dtype):
    lhs_shape, rhs_shape, dimension_numbers = contraction
    run_ours = compiled(functools.partial(ours, context=Context()), dimension_numbers)
    run_theirs = compiled(theirs, dimension_numbers)
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        spread = (0.0, 1.0, 3.0)[seed % 3]

        def values(shape, rng=rng, spread=spread):
            x = rng.normal(size=shape) * np.exp(spread * rng.normal(size=shape))
            return jnp.asarray(np.clip(x, -1e4, 1e4), dtype)

        lhs, rhs = values(lhs_shape), values(rhs_shape)
        out = jax.eval_shape(lambda a, b: jax.lax.dot_general(a, b, dimension_numbers), lhs, rhs)
        g = values(out.shape)
        for found, expected in zip(run_ours(lhs, rhs, g), run_theirs(lhs, rhs, g), strict=True):
            assert_same_bits(found, expected)


def side(bits, mode):
    dequant, calibration = mode
    if bits is None:
        return Tensor()
    return Tensor(
        numerics=config.int_numerics(bits),
        dequant_mode=DequantMode[dequant],
        calibration_mode=CalibrationMode[calibration],
    )


def their_modes(bits, lhs, rhs):
    c = aqtp_config.config_v4()
    aqtp_config.set_bits(c, *bits, None, None, None, None)
    c.fwd.dg_accumulator_dtype = None
    dequant, calibration = aqtp_config.DequantMode, aqtp_config.CalibrationMode
    aqtp_config.set_fwd_dequant_mode(
        c, lhs_dequant_mode=dequant[lhs[0]], rhs_dequant_mode=dequant[rhs[0]]
    )
    aqtp_config.set_fwd_calibration_mode(
        c, lhs_calibration_mode=calibration[lhs[1]], rhs_calibration_mode=calibration[rhs[1]]
    )
    return c


def in_turn(rows, columns):
    """Every row with every column: but for each row's own column, in the long form alone."""
    return [
        pytest.param(row, column, marks=() if j == i % 2 else pytest.mark.long)
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


@pytest.mark.parametrize(
    ("mode", "kind"),
    in_turn(
        MODES,
        [
            (MATMUL, np.float32),
            (BATCHED, ml_dtypes.bfloat16),
            (MATMUL, ml_dtypes.bfloat16),
            (BATCHED, np.float32),
        ],
    ),
)
def test_dequantization_and_calibration_modes(mode, kind):
    (bits, lhs, rhs), (contraction, dtype) = mode, kind
    ours = DotGeneral(fwd=DotGeneralRaw(lhs=side(bits[0], lhs), rhs=side(bits[1], rhs)))
    assert_same(ours, their_modes(bits, lhs, rhs), contraction, dtype)


@pytest.mark.parametrize(
    ("name", "kind"),
    in_turn(
        CALIBRATIONS,
        [(8, np.float32), (4, ml_dtypes.bfloat16), (8, ml_dtypes.bfloat16), (4, np.float32)],
    ),
)
def test_calibrations(name, kind):
    bits, dtype = kind
    calibration, (their_name, arguments) = CALIBRATIONS[name]
    ours = config.update(config.config_v4(bits, None, None), "fwd.*", calibration=calibration)
    theirs = aqtp_config.config_v4(fwd_bits=bits, dlhs_bits=None, drhs_bits=None)
    their_class = getattr(aqtp_calibration, their_name)
    aqtp_config.set_fwd_calibration(theirs, functools.partial(their_class, **arguments))
    assert_same(ours, theirs, MATMUL, dtype)


@pytest.mark.parametrize("bias", [pytest.param(0.5, marks=pytest.mark.long), -1.25])
def test_a_constant_bias_with_fake_quantization(bias):
    tensor = Tensor(
        numerics=config.int_numerics(8),
        use_fake_quant=True,
        calibration=ConstantCalibration(2.0, bias),
    )
    theirs = their_modes((8, 8), THIS, THIS)
    aqtp_config.set_fwd_calibration(
        theirs,
        functools.partial(aqtp_calibration.ConstantCalibration, bound=2.0, bias=bias),
    )
    assert_same(DotGeneral(fwd=DotGeneralRaw(lhs=tensor, rhs=tensor)), theirs, MATMUL, np.float32)


def test_powers_of_two():
    ours = config.update(config.config_v4(8, None, None), "fwd.*", po2_scale=True)
    theirs = aqtp_config.config_v4(fwd_bits=8, dlhs_bits=None, drhs_bits=None)
    aqtp_config.set_fwd_calibration(
        theirs, functools.partial(aqtp_calibration.AbsMaxCalibration, po2_scale=True)
    )
    assert_same(ours, theirs, MATMUL, np.float32)
