"""Strategies for configurations: of every class, and of every field in its range."""

import jax.numpy as jnp
from hypothesis import strategies as st

from aqt_engine import calibration, config, numerics, statistics
from aqt_engine.config.contraction import LocalAqtBySize
from aqt_engine.modes import CalibrationMode, DequantMode

POSITIVE = st.floats(2**-10, 2**10)
CANDIDATES = st.lists(POSITIVE, min_size=1, max_size=3).map(tuple)
FREEZE = st.none() | st.integers(1, 100)
FLOAT_DTYPE = st.sampled_from([jnp.float32, jnp.bfloat16, "float16"])

NOISE = st.builds(
    lambda cls, axes: cls(tuple(axes)),
    st.sampled_from([numerics.Uniform, numerics.Centered]),
    st.lists(st.integers(-2, 2), unique=True, max_size=2),
)
INTEGERS = st.builds(config.int_numerics, st.integers(1, 12), noise_fn=st.none() | NOISE)
FLOATS = st.builds(
    numerics.FloatNumerics,
    exponent_bits=st.integers(1, 5),
    mantissa_bits=st.integers(0, 4),
    subnormals=st.booleans(),
    min_exponent=st.none() | st.integers(-8, 0),
    rounding=st.sampled_from(numerics.FloatRounding),
    stochastic_rounding=st.booleans(),
    clip_gradient=st.booleans(),
    dtype=st.none() | st.just(jnp.float32),
)
FP8 = st.builds(
    numerics.Fp8Numerics,
    dtype=st.sampled_from([jnp.float8_e4m3fn, "float8_e5m2"]),
    stochastic_rounding=st.booleans(),
    clip_gradient=st.booleans(),
)
NUMERICS = st.just(numerics.NoNumerics()) | INTEGERS | FLOATS | FP8

CALIBRATION = st.one_of(
    st.builds(calibration.AbsMaxCalibration, st.none() | POSITIVE),
    st.builds(calibration.AbsMeanCalibration, POSITIVE, POSITIVE | st.integers(1, 4)),
    st.builds(calibration.ConstantCalibration, POSITIVE, st.none() | st.floats(-8, 8)),
    st.builds(calibration.PercentileCalibration, st.floats(1, 100)),
    st.builds(calibration.SnrCalibration, CANDIDATES),
    st.builds(calibration.MseCalibration, POSITIVE, CANDIDATES),
    st.just(calibration.MinMaxCalibration()),
    st.builds(statistics.MeanOfAbsMaxCalibration, FREEZE),
    st.builds(
        statistics.WeightedStatsCalibration,
        max_coeff=POSITIVE,
        lp_order=st.integers(1, 4),
        ema_update_count=st.integers(1, 9),
        filter_zeros=st.booleans(),
        freeze_after=FREEZE,
    ),
    st.builds(statistics.DelayedScalingCalibration, st.integers(1, 9), FREEZE),
)


def tensors(*, use_fwd_quant=False):
    return st.builds(
        config.Tensor,
        numerics=NUMERICS,
        calib_shared_axes=st.none() | st.just("per_tensor") | st.integers(-1, 1) | st.just([0, 1]),
        scale_stop_grad=st.booleans(),
        calibration=CALIBRATION,
        po2_scale=st.booleans(),
        use_fake_quant=st.booleans(),
        use_fwd_quant=st.booleans() if use_fwd_quant else st.just(False),
        scale_dtype=st.none() | FLOAT_DTYPE,
        calibration_mode=st.sampled_from(
            [CalibrationMode.CONTRACTING_AXIS, CalibrationMode.ALL_AXES]
        ),
        dequant_mode=st.sampled_from([DequantMode.OUTPUT, DequantMode.THIS_INPUT]),
    )


def contractions(*, use_fwd_quant):
    return st.builds(
        config.DotGeneralRaw,
        lhs=tensors(),
        rhs=tensors(use_fwd_quant=use_fwd_quant),
        dg_in_dtype=st.none() | FLOAT_DTYPE,
        dg_accumulator_dtype=st.none() | FLOAT_DTYPE,
        local_aqt=st.none()
        | st.builds(config.LocalAqt, st.integers(1, 4))
        | st.builds(LocalAqtBySize, st.integers(1, 4)),
    )


CONFIGURATIONS = st.builds(
    config.DotGeneral,
    fwd=contractions(use_fwd_quant=False),
    dlhs=contractions(use_fwd_quant=True),
    drhs=contractions(use_fwd_quant=True),
)
