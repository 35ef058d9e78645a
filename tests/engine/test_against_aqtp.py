"""Differential tests: `aqtp` 0.9.0 beside ours, as a black box, compared bit for bit.

Compiling takes a second, and a comparison a fraction of a millisecond. So there is a pool of
pairs, of a contraction and a configuration; each is compiled once and run on many values and keys.
"""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from aqt_engine import Context, QuantMode, config
from aqt_engine.flax import AqtDotGeneral, AqtEinsum
from engine.contractions import (
    CONTRACTIONS,
    MATMUL,
    assert_same_bits,
    output_shape,
    values,
)

pytestmark = pytest.mark.in_haste

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle's own, on today's JAX
    import aqt.jax.v2.config as aqtp_config
    import aqt.jax.v2.flax.aqt_flax as aqtp_flax
    import aqt.jax.v2.utils as aqtp_utils

CASES = 300  # of each pair that is compiled
# JAX's default generator takes four times as long to compile. Pairs in float32 draw with it, the
# others with the quick one: what they compare is which keys and shapes the noise is drawn with.
DEFAULT, QUICK = "threefry2x32", "rbg"
DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One configuration, made by either library."""

    preset: str
    arguments: tuple[tuple[str, object], ...]

    def ours(self):
        return getattr(config, self.preset)(**dict(self.arguments))

    def theirs(self):
        return getattr(aqtp_config, self.preset)(**dict(self.arguments))

    def __str__(self):
        return "-".join([self.preset, *(f"{value}" for _, value in self.arguments)])


def setting(preset, **arguments):
    return Setting(preset, tuple(arguments.items()))


SETTINGS = [
    setting(
        "fully_quantized",
        fwd_bits=fwd_bits,
        bwd_bits=bwd_bits,
        use_fwd_quant=use_fwd_quant,
        use_stochastic_rounding=stochastic,
    )
    for fwd_bits, bwd_bits in [(8, 8), (8, None), (4, 8), (2, 4), (None, 8), (8, 4)]
    for use_fwd_quant in (True, False)
    for stochastic in (True, False)
] + [
    setting("config_v4", fwd_bits=8, dlhs_bits=8, drhs_bits=None),
    setting("config_v4", fwd_bits=4, dlhs_bits=8, drhs_bits=8),
    setting("config_v4", fwd_bits=5, dlhs_bits=None, drhs_bits=3),
]


@dataclasses.dataclass(frozen=True)
class Pair:
    contraction: tuple
    dtype: type
    setting: Setting

    def __str__(self):
        lhs, rhs, _ = self.contraction
        return f"{lhs}x{rhs}-{np.dtype(self.dtype).name}-{self.setting}".replace(" ", "")


# Of each kind of contraction one; together they have every argument of the settings.
SHORT = {0, 1, 3, 6, 9, 11, 12, 14}


def is_short(i, j):
    """One dtype for each such contraction, so that no setting comes twice."""
    return i in SHORT and j == (i + (2 if i < 9 else 1)) % len(DTYPES)


def pairs(i, contraction):
    for j, dtype in enumerate(DTYPES):
        chosen = SETTINGS[(8 * (i * len(DTYPES) + j)) % len(SETTINGS)]
        marks = () if is_short(i, j) else pytest.mark.long
        yield pytest.param(Pair(contraction, dtype, chosen), marks=marks)


# Each contraction with each dtype, and the settings in turn; 8 and 27 have no factor in common.
PAIRS = [pair for i, contraction in enumerate(CONTRACTIONS) for pair in pairs(i, contraction)]


def value_and_gradients(contract):
    """Compiled: operands, cotangent and key to the output and both gradients."""

    @jax.jit
    def run(lhs, rhs, cotangent, key):
        out, vjp = jax.vjp(lambda lhs, rhs: contract(lhs, rhs, key), lhs, rhs)
        return out, *vjp(cotangent)

    return run


def compare(ours, theirs, shapes, dtype, cases, generator=QUICK):
    """Runs two contractions of (lhs, rhs, key), of operands and cotangent in these shapes."""
    run_ours, run_theirs = value_and_gradients(ours), value_and_gradients(theirs)
    for seed in range(cases):
        rng = np.random.default_rng(seed)
        arguments = [jnp.asarray(values(rng, shape, dtype)) for shape in shapes]
        key = jax.random.key(seed, impl=generator)
        found, expected = run_ours(*arguments, key), run_theirs(*arguments, key)
        for name, mine, other in zip(("value", "dlhs", "drhs"), found, expected, strict=True):
            try:
                assert_same_bits(mine, other)
            except AssertionError as e:
                raise AssertionError(f"{name} of seed {seed} differs: {e}") from e


def compare_pair(pair, cases):
    lhs, rhs, dimension_numbers = pair.contraction
    ours, theirs = pair.setting.ours(), pair.setting.theirs()

    def our_contraction(lhs, rhs, key):
        return ours(lhs, rhs, dimension_numbers, context=Context(key=key))

    def their_contraction(lhs, rhs, key):
        keyed = aqtp_config.set_context(theirs, key, train_step=None)
        return keyed(lhs, rhs, dimension_numbers)

    out = output_shape(lhs, rhs, dimension_numbers)
    shapes = (lhs, rhs, out)
    generator = DEFAULT if pair.dtype is np.float32 else QUICK
    compare(our_contraction, their_contraction, shapes, pair.dtype, cases, generator)


def test_a_few_contractions():
    nearest = setting("fully_quantized", fwd_bits=8, bwd_bits=8, use_stochastic_rounding=False)
    compare_pair(Pair(MATMUL, np.float32, nearest), 20)


def test_there_are_thousands_of_cases_of_every_kind_of_setting():
    short = [pair.values[0].setting for pair in PAIRS if not pair.marks]
    others = 2  # local_aqt, and a dense layer
    assert CASES * (len(short) + len(SHORT_EINSUMS) + others) >= 4000
    assert len(set(short)) == len(short)
    given = {(s.preset, *argument) for s in SETTINGS for argument in s.arguments}
    assert {(s.preset, *argument) for s in short for argument in s.arguments} == given


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_contractions(pair):
    compare_pair(pair, CASES)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """Backward contractions in two pieces."""

    def ours(self):
        local = config.LocalAqt(contraction_axis_shard_count=2)
        return config.config_v4(drhs_bits=8, dlhs_local_aqt=local, drhs_local_aqt=local)

    def theirs(self):
        local = aqtp_config.LocalAqt(
            contraction_axis_shard_count=2, contraction_axis_shard_size=None
        )
        return aqtp_config.config_v4(drhs_bits=8, dlhs_local_aqt=local, drhs_local_aqt=local)


@pytest.mark.slow
def test_local_aqt():
    contraction = ((6, 5, 4), (4, 8), (((2,), (0,)), ((), ())))
    compare_pair(Pair(contraction, np.float32, Sharded()), CASES)


EINSUMS = [
    ("ab,bc->ac", (3, 4), (4, 5), (3, 5)),
    ("ab,bc", (3, 4), (4, 5), (3, 5)),
    ("ab,bc->ca", (3, 4), (4, 5), (5, 3)),
    ("of,nf->no", (3, 4), (5, 4), (5, 3)),
    ("bqhd,bkhd->bhqk", (2, 3, 4, 5), (2, 6, 4, 5), (2, 4, 3, 6)),
    ("bhqk,bkhd->bqhd", (2, 4, 3, 6), (2, 6, 4, 5), (2, 3, 4, 5)),
    ("...a,ab->...b", (2, 3, 4), (4, 5), (2, 3, 5)),
    ("ab,cd->abcd", (2, 3), (4, 5), (2, 3, 4, 5)),
    ("ab,ab->ab", (2, 3), (2, 3), (2, 3)),
]


def uneven():
    """Other bits on each side and in each contraction: whoever confuses two is found out."""
    side = config.int_tensor
    return config.DotGeneral(
        fwd=config.raw(side(4), side(8)),
        dlhs=config.raw(side(8), side(5)),
        drhs=config.raw(side(3), side(4)),
    )


def their_uneven():
    # The default preset rounds gradients stochastically; `set_bits` makes anew what rounds.
    return aqtp_config.set_bits(aqtp_config.config_v4(), 4, 8, 8, 5, 3, 4)


EINSUM_CONFIGS = {
    "uneven": (uneven, their_uneven),
    "fully_quantized": (config.fully_quantized, aqtp_config.fully_quantized),
}


# Some equations with the configurations in turn, and in the long form each with each.
SHORT_EINSUMS = {(2, "fully_quantized"), (3, "uneven"), (4, "fully_quantized"), (6, "uneven")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("einsum", "name"),
    [
        pytest.param(einsum, name, marks=() if (i, name) in SHORT_EINSUMS else pytest.mark.long)
        for i, einsum in enumerate(EINSUMS)
        for name in EINSUM_CONFIGS
    ],
)
def test_flax_einsum(einsum, name):
    equation, *shapes = einsum
    ours, theirs = EINSUM_CONFIGS[name]
    mine, other = AqtEinsum(ours()), aqtp_flax.AqtEinsum(theirs())

    def contraction(module):
        return lambda lhs, rhs, key: module.apply({}, equation, lhs, rhs, rngs={"params": key})

    compare(contraction(mine), contraction(other), shapes, np.float32, CASES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(np.float32, marks=pytest.mark.long),
        ml_dtypes.bfloat16,
        pytest.param(np.float16, marks=pytest.mark.long),
    ],
    ids=lambda d: np.dtype(d).name,
)
def test_flax_dense(dtype):
    mine = nn.Dense(3, False, dtype, dot_general=AqtDotGeneral(config.fully_quantized()))
    theirs = aqtp_flax.AqtDotGeneral(aqtp_config.fully_quantized())
    other = nn.Dense(3, False, dtype, dot_general=theirs)

    def contraction(module):
        return lambda x, kernel, key: module.apply(
            {"params": {"kernel": kernel}}, x, rngs={"params": key}
        )

    compare(contraction(mine), contraction(other), ((5, 7), (7, 3), (5, 3)), dtype, CASES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        pytest.param(bits, dtype, marks=() if (i + j) % 2 else pytest.mark.long)
        for i, bits in enumerate((4, 8))
        for j, dtype in enumerate(DTYPES)
    ],
    ids=lambda value: value if isinstance(value, int) else np.dtype(value).name,
)
def test_converted_weights(bits, dtype):
    mine = AqtDotGeneral(config.fully_quantized(fwd_bits=bits), rhs_quant_mode=QuantMode.CONVERT)
    theirs = aqtp_flax.AqtDotGeneral(
        aqtp_config.fully_quantized(fwd_bits=bits),
        rhs_quant_mode=aqtp_utils.QuantMode.CONVERT,
        rhs_freeze_mode=aqtp_flax.FreezerMode.CALIBRATION_AND_VALUE,
        use_legacy_freezer=False,
    )

    def stored(dot_general, leaf):
        module = nn.Dense(3, False, dtype, dot_general=dot_general)

        @jax.jit
        def run(x, kernel):
            variables = {"params": {"kernel": kernel}}
            rngs = {"params": jax.random.key(0)}
            out, frozen = module.apply(variables, x, rngs=rngs, mutable=["aqt"])
            found = leaf(frozen["aqt"]["dot_general"]["qrhs"])
            return out, found

        return run

    run_mine = stored(mine, lambda q: (q.qvalue, q.scale))
    run_theirs = stored(theirs, lambda q: (q["frozen"].qvalue, q["frozen"].scale[0]))
    for seed in range(CASES):
        rng = np.random.default_rng(seed)
        arguments = [jnp.asarray(values(rng, shape, dtype)) for shape in ((5, 7), (7, 3))]
        found, expected = run_mine(*arguments), run_theirs(*arguments)
        assert found[1][0].dtype == (jnp.int4 if bits == 4 else jnp.int8)
        jax.tree.map(assert_same_bits, found, expected)
