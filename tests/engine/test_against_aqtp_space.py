"""Differential tests over the space of configurations: each choice that both libraries have.

Configurations are drawn so that every value of every choice comes up in several company; what
either library refuses is left out. Each is compiled once, and run on many values and keys: forward
and both gradients, bit for bit, both compiled. In 16 bits they are those that sum integers only: a
sum of 16-bit floats has no bits of its own, since XLA rounds it where it ends what it has joined.
"""

import collections
import dataclasses
import functools
import random
import warnings

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
from aqt_engine.config import CalibrationMode, DequantMode, DotGeneral, Tensor
from aqt_engine.numerics import Centered, Fp8Numerics, IntNumerics, NoNumerics, Uniform, aqt_float
from aqt_engine.ops import TileCount, Tiling, tiled_dot_general
from engine.contractions import output_shape
from engine.test_against_aqtp import compare

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle's own, on today's JAX
    import aqt.jax.v2.calibration as aqtp_calibration
    import aqt.jax.v2.config as aqtp_config
    import aqt.jax.v2.numerics.fp8_numerics as aqtp_fp8
    import aqt.jax.v2.numerics.fp_numerics as aqtp_float
    import aqt.jax.v2.numerics.int_numerics as aqtp_int
    import aqt.jax.v2.numerics.no_numerics as aqtp_none
    import aqt.jax.v2.stochastic_rounding as aqtp_noise
    import aqt.jax.v2.tiled_dot_general as aqtp_tiled

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]
WIDE, NARROW = 32, 16  # configurations of float32, and of 16 bits
SHORT_WIDE, SHORT_NARROW = 14, 5  # those of them that are not for the long form alone
CASES = 200  # of each


def integers(bits, preserve_zero=True, preserve_max_val=False, clip_gradient=False, noise=None):
    """The same integers in either library."""
    dtype = None
    if preserve_zero and bits <= 8:
        dtype = jnp.int4 if bits == 4 else jnp.int8
    shared = {
        "bits": bits,
        "preserve_zero": preserve_zero,
        "preserve_max_val": preserve_max_val,
        "clip": True,
        "clip_gradient": clip_gradient,
        "round": True,
        "dtype": dtype,
    }
    ours, theirs = {None: (None, None), **NOISE}[noise]
    return (
        IntNumerics(**shared, noise_fn=ours),
        lambda: aqtp_int.IntSymmetric(**shared, noise_fn=theirs and theirs()),
    )


def fp8(name, exponent, mantissa):
    dtype = getattr(jnp, name)
    return (
        Fp8Numerics(dtype),
        lambda: aqtp_fp8.Fp8Numerics(dtype=dtype, exponent_bits=exponent, mantissa_bits=mantissa),
    )


def emulated(name):
    theirs = functools.partial(
        aqtp_float.FpNumerics, cfg=getattr(aqtp_float, name), stochastic_rounding=False
    )
    return aqt_float(name), functools.partial(theirs, clip_gradient=False)


NOISE = {
    "uniform": (Uniform(), aqtp_noise.JaxUniform),
    "centered": (Centered(), aqtp_noise.RandomCenteredUniform),
}
NOTHING = (NoNumerics(), lambda: aqtp_none.NoNumerics(noise_fn=None, dtype=None))
NUMERICS = {
    "int8": integers(8),
    "int4": integers(4),
    "int2": integers(2),
    "int5": integers(5),
    "int12": integers(12),
    "binary": integers(1, preserve_zero=False),
    "half integers": integers(4, preserve_zero=False),
    "max value": integers(8, preserve_max_val=True),
    "clip gradient": integers(6, clip_gradient=True),
    "e4m3": fp8("float8_e4m3fn", 4, 3),
    "e5m2": fp8("float8_e5m2", 5, 2),
    "e2m1_ocp": emulated("e2m1_ocp"),
    "float": NOTHING,
}
BACKWARD = {
    "float": NOTHING,
    "int8": integers(8),
    "int4": integers(4),
    "uniform": integers(8, noise="uniform"),
    "centered": integers(4, noise="centered"),
}
CALIBRATIONS = {
    "absmax": (AbsMaxCalibration(), aqtp_calibration.AbsMaxCalibration),
    "clipping": (
        AbsMaxCalibration(0.7),
        functools.partial(aqtp_calibration.AbsMaxCalibration, clipping_scale=0.7),
    ),
    "po2": (
        AbsMaxCalibration(),
        functools.partial(aqtp_calibration.AbsMaxCalibration, po2_scale=True),
    ),
    "mean": (
        AbsMeanCalibration(3.0),
        functools.partial(aqtp_calibration.AbsMeanCalibration, clipping_scale=3.0, p=1),
    ),
    "constant": (
        ConstantCalibration(2.7),
        functools.partial(aqtp_calibration.ConstantCalibration, bound=2.7),
    ),
    "search": (
        SnrCalibration((0.9, 0.7, 0.5)),
        functools.partial(
            aqtp_calibration.SnrBasedAutoCalibration, auto_clip_search_config=(0.9, 0.7, 0.5)
        ),
    ),
}
MODES = [
    ("OUTPUT", "CONTRACTING_AXIS"),
    ("THIS_INPUT", "CONTRACTING_AXIS"),
    ("THIS_INPUT", "REMAINING_AXIS"),
    ("OTHER_INPUT", "REMAINING_AXIS"),
]
LOCAL = {
    "whole": (None, None),
    "two": (
        config.LocalAqt(2),
        aqtp_config.LocalAqt(contraction_axis_shard_count=2, contraction_axis_shard_size=None),
    ),
    "largest": (
        config.LocalAqtBySize(2),
        aqtp_config.LocalAqt(
            contraction_axis_shard_count=None,
            contraction_axis_shard_size=2,
            tile_largest_shape=True,
        ),
    ),
}
CONTRACTIONS = {
    "matmul": ((4, 12), (12, 6), (((1,), (0,)), ((), ()))),
    "batch": ((2, 4, 6), (2, 6, 4), (((2,), (1,)), ((0,), (0,)))),
    "two": ((4, 2, 6), (6, 2, 4), (((1, 2), (1, 0)), ((), ()))),
    "several": ((4, 6, 2, 4), (4, 2, 4, 6), (((3, 1), (2, 3)), ((2,), (1,)))),
}
CHOICES = {
    "lhs": list(NUMERICS),
    "rhs": list(NUMERICS),
    "lhs_calibration": list(CALIBRATIONS),
    "rhs_calibration": list(CALIBRATIONS),
    "lhs_mode": MODES,
    "rhs_mode": MODES,
    "gradient": list(BACKWARD),
    "operand": list(BACKWARD),
    "use_fwd_quant": [False, True],
    "dlhs_local": list(LOCAL),
    "drhs_local": list(LOCAL),
    "contraction": list(CONTRACTIONS),
    "dtype": [np.float32],
}
# In 16 bits, a gradient that is stopped is a zero of either sign there, and +0 here; a logarithm
# there may round a scale down to a power of two, which then clips; and what a search compares
# depends on how XLA rounds within what it joins, as does a constant scale times another.
NARROW_NUMERICS = ["int8", "int4", "int2", "int5", "max value"]
NARROW_CALIBRATIONS = ["absmax", "clipping", "mean"]
NARROW_CHOICES = {
    **CHOICES,
    "lhs": NARROW_NUMERICS,
    "rhs": NARROW_NUMERICS,
    "lhs_calibration": NARROW_CALIBRATIONS,
    "rhs_calibration": NARROW_CALIBRATIONS,
    "lhs_mode": MODES[:1],
    "rhs_mode": MODES[:1],
    "gradient": ["int8", "int4", "uniform", "centered"],
    "operand": ["int8", "int4", "uniform", "centered"],
    "dlhs_local": ["whole"],
    "drhs_local": ["whole"],
    "dtype": [ml_dtypes.bfloat16, np.float16],
}


@dataclasses.dataclass(frozen=True)
class Choice:
    lhs: str
    rhs: str
    lhs_calibration: str
    rhs_calibration: str
    lhs_mode: tuple[str, str]
    rhs_mode: tuple[str, str]
    gradient: str
    operand: str
    use_fwd_quant: bool
    dlhs_local: str
    drhs_local: str
    contraction: str
    dtype: type

    def side(self, name):
        mode = getattr(self, f"{name}_mode")
        calibration = getattr(self, f"{name}_calibration")
        numerics = NUMERICS[getattr(self, name)][0]
        if isinstance(numerics, NoNumerics):
            return Tensor()
        return Tensor(
            numerics=numerics,
            calibration=CALIBRATIONS[calibration][0],
            po2_scale=calibration == "po2",
            dequant_mode=DequantMode[mode[0]],
            calibration_mode=CalibrationMode[mode[1]],
        )

    def ours(self):
        gradient = Tensor(numerics=BACKWARD[self.gradient][0])
        operand = Tensor(numerics=BACKWARD[self.operand][0], use_fwd_quant=self.use_fwd_quant)
        backward = config.raw(gradient, operand)
        forward = config.raw(self.side("lhs"), self.side("rhs"))
        return DotGeneral(
            fwd=forward,
            dlhs=dataclasses.replace(backward, local_aqt=LOCAL[self.dlhs_local][0]),
            drhs=dataclasses.replace(backward, local_aqt=LOCAL[self.drhs_local][0]),
        )

    def theirs(self):
        c = aqtp_config.config_v4(fwd_bits=None, dlhs_bits=None, drhs_bits=None)
        for raw, lhs, rhs in (
            (c.fwd, NUMERICS[self.lhs], NUMERICS[self.rhs]),
            (c.dlhs, BACKWARD[self.gradient], BACKWARD[self.operand]),
            (c.drhs, BACKWARD[self.gradient], BACKWARD[self.operand]),
        ):
            aqtp_config.set_numerics(raw, lhs[1](), rhs[1]())
            for side in (raw.dg_quantizer.lhs, raw.dg_quantizer.rhs):
                side.calibration = aqtp_calibration.AbsMaxCalibration
        for name in ("lhs", "rhs"):
            dequant, calibration = getattr(self, f"{name}_mode")
            tensor = getattr(c.fwd, name)
            if NUMERICS[getattr(self, name)] is not NOTHING:
                tensor.dequant_mode = aqtp_config.DequantMode[dequant]
                tensor.calibration_mode = aqtp_config.CalibrationMode[calibration]
            quantizer = getattr(c.fwd.dg_quantizer, name)
            quantizer.calibration = CALIBRATIONS[getattr(self, f"{name}_calibration")][1]
        # Of small floats, and of operands that were dequantized, the defaults differ.
        c.fwd.dg_accumulator_dtype = self.ours().fwd.dg_accumulator_dtype
        c.dlhs.rhs.use_fwd_quant = c.drhs.rhs.use_fwd_quant = self.use_fwd_quant
        c.dlhs.local_aqt = LOCAL[self.dlhs_local][1]
        c.drhs.local_aqt = LOCAL[self.drhs_local][1]
        return c

    def is_defined(self):
        """Whether both libraries define the result."""
        try:
            self.ours()
        except ValueError:
            return False
        unquantized = "float" in (self.lhs, self.rhs)
        # There, the largest contracted axis is found in a matrix product only.
        largest = "largest" in (self.dlhs_local, self.drhs_local) and self.contraction != "matmul"
        return not (self.use_fwd_quant and unquantized) and not largest

    def __str__(self):
        parts = [f"{v}" for v in dataclasses.astuple(self)[:-1]]
        return "-".join([*parts, np.dtype(self.dtype).name]).replace(" ", "_")


def drawn(count, choices):
    """That many configurations; among the candidates for each, the one with the rarest values."""
    rng, chosen, seen = random.Random(0), [], collections.Counter()
    while len(chosen) < count:
        candidates = []
        while len(candidates) < 100:
            choice = Choice(**{name: rng.choice(values) for name, values in choices.items()})
            candidates += [choice] if choice.is_defined() else []
        best = min(
            candidates, key=lambda c: sum(seen[item] * len(choices[item[0]]) for item in _values(c))
        )
        seen.update(_values(best))
        chosen.append(best)
    return chosen


def _values(choice):
    return [(name, getattr(choice, name)) for name in CHOICES]


SPACE = drawn(WIDE, CHOICES), drawn(NARROW, NARROW_CHOICES)
SHORT = SPACE[0][:SHORT_WIDE] + SPACE[1][:SHORT_NARROW]
LONG = SPACE[0][SHORT_WIDE:] + SPACE[1][SHORT_NARROW:]


def test_every_value_of_every_choice_is_drawn():
    seen = {item for choice in SHORT for item in _values(choice)}
    for choices in (CHOICES, NARROW_CHOICES):
        assert seen >= {(name, value) for name, values in choices.items() for value in values}
    assert (len(SHORT) + 2) * CASES >= 2400  # of these, and of two tilings


@pytest.mark.parametrize(
    "choice", [*SHORT, *(pytest.param(choice, marks=pytest.mark.long) for choice in LONG)], ids=str
)
def test_a_configuration(choice):
    lhs, rhs, numbers = CONTRACTIONS[choice.contraction]
    ours, theirs = choice.ours(), choice.theirs()

    def our_contraction(lhs, rhs, key):
        return ours(lhs, rhs, numbers, context=Context(key=key))

    def their_contraction(lhs, rhs, key):
        return aqtp_config.set_context(theirs, key, train_step=None)(lhs, rhs, numbers)

    shapes = (lhs, rhs, output_shape(lhs, rhs, numbers))
    compare(our_contraction, their_contraction, shapes, choice.dtype, CASES)


TILED = {
    "matmul": {1: 3},
    "batch": {2: 3, 1: 2},
    "two": {1: 2, 2: 3, 0: 2},
}


@pytest.mark.parametrize(
    ("contraction", "dtype"),
    [
        pytest.param("matmul", np.float32, marks=pytest.mark.long),
        pytest.param("batch", ml_dtypes.bfloat16),
        pytest.param("two", np.float32),
        pytest.param("matmul", ml_dtypes.bfloat16, marks=pytest.mark.long),
        pytest.param("batch", np.float32, marks=pytest.mark.long),
        pytest.param("two", ml_dtypes.bfloat16, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_tiles(contraction, dtype):
    lhs, rhs, numbers = CONTRACTIONS[contraction]
    (contracted, others), _ = numbers
    counts = TILED[contraction]
    partners = {b: counts[a] for a, b in zip(contracted, others, strict=True) if a in counts}
    ours, theirs = config.fully_quantized(), aqtp_config.fully_quantized()
    tiling = Tiling(tuple(TileCount(axis, count) for axis, count in counts.items()))
    their_tiling = aqtp_tiled.Cfg(
        lhs=aqtp_tiled.TensorTiling(
            [aqtp_tiled.AxisTiling(a, n) for a, n in counts.items() if a in contracted],
            [aqtp_tiled.AxisTiling(a, n) for a, n in counts.items() if a not in contracted],
        ),
        rhs=aqtp_tiled.TensorTiling([aqtp_tiled.AxisTiling(b, n) for b, n in partners.items()], []),
    )

    def our_contraction(lhs, rhs, key):
        context = Context(key=key)
        return tiled_dot_general(lhs, rhs, numbers, config=ours, tiling=tiling, context=context)

    def their_contraction(lhs, rhs, key):
        keyed = aqtp_config.set_context(theirs, key, train_step=None)
        return aqtp_tiled.tiled_dot_general(their_tiling, lhs, rhs, numbers, dot_general=keyed)

    shapes = (lhs, rhs, output_shape(lhs, rhs, numbers))
    compare(our_contraction, their_contraction, shapes, dtype, CASES)
