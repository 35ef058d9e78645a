"""What the analysis calls portable has the same bits under another instruction set."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aqt_engine import config, convert, ops
from aqt_engine.calibration import ceil_to_power_of_two, inverse_power_of_two, reciprocal
from aqt_engine.convertible import Leaf, Serving
from aqt_engine.portability import findings
from engine.contractions import assert_same_bits
from engine.portable_models import convnet, digest, transforming

X = jax.ShapeDtypeStruct((4, 8), jnp.float32)
POWERS = np.float32([0.5, 2, 4, 0.25, 1, 8, 0.125, 16])


def found(forward, *values, x=X):
    leaves = [Leaf(name=str(i), value=jnp.asarray(v), role="float") for i, v in enumerate(values)]
    serving = Serving(leaves=leaves, forward=lambda v, inputs: forward(inputs["x"], *v))
    return [(f.op.primitive, f.why) for f in findings(serving, {"x": x})]


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: jnp.maximum(x, 0) * 0.5 + 1.0,
        lambda x: jnp.where(x > 0, x, -x) - jnp.max(x, axis=1, keepdims=True),
        lambda x: (x * 3.0).clip(-1, 1) + x,
        lambda x: ops.ordered_mean(jnp.round(x)),
        lambda x: jnp.argmax(x, axis=1),
        lambda x: x.astype(jnp.bfloat16),
        lambda x: x * (x > 1) + x,
        lambda x: jax.lax.scan(lambda c, v: (c + v, c), x[0], x)[1],
        lambda x: jax.lax.cond(x[0, 0] > 0, lambda: x + 1, lambda: x * 2),
        lambda x: jnp.dot(x.astype(jnp.int8), jnp.ones((8, 2), jnp.int8)).astype(jnp.float32),
    ],
)
def test_what_every_platform_rounds_alike_is_portable(forward):
    assert found(forward) == []


@pytest.mark.parametrize(
    ("forward", "op", "why"),
    [
        (lambda x: x * 3.0 + 1.0, "add", "rounded at once"),
        (lambda x: jnp.exp(x), "exp", "approximated"),
        (lambda x: x / 3.0, "div", "divides"),
        (lambda x: x.sum(axis=1), "reduce_sum", "order"),
        (lambda x: x @ jnp.ones((8, 2)), "dot_general", "int32 accumulator"),
        (lambda x: x * x[:1] * 3.0, "mul", "three factors"),
        (lambda x: x.astype(jnp.bfloat16) > 0, "gt", "narrowed"),
        (lambda x: x.astype(jnp.bfloat16) * jnp.bfloat16(3), "mul", "narrowed"),
        (lambda x: jax.nn.softmax(x), "exp", "approximated"),
        (lambda x: jax.lax.scan(lambda c, v: (c * 3.0 + v, c), x[0], x)[1], "add", "at once"),
        (lambda x: x + jax.random.uniform(jax.random.key(0), (8,)), "random_seed", "random"),
    ],
)
def test_what_platforms_round_otherwise_is_named_with_the_reason(forward, op, why):
    names = found(forward)
    assert op in [name for name, _ in names], names
    assert any(why in reason for name, reason in names if name == op)


def test_a_weight_is_looked_at():
    def forward(x, scale):
        return x * scale + 1.0

    assert found(forward, POWERS) == []
    assert [op for op, _ in found(forward, POWERS * 3)] == ["add"]


def test_a_cause_is_reported_once_and_its_consequences_are_not():
    def forward(x):
        y = jnp.exp(x) + 1.0
        return jnp.tanh(y) * 2.0 + y

    assert [op for op, _ in found(forward)] == ["exp", "tanh"]


@pytest.mark.parametrize("po2", [True, False])
def test_a_quantized_contraction_is_portable_if_its_scales_are_powers_of_two(po2):
    int8 = config.update(config.fully_quantized(), "fwd.*", po2_scale=po2)

    def forward(x, w, b):
        return int8(x, w, (((1,), (0,)), ((), ()))) + b

    names = found(forward, np.ones((8, 3), np.float32), np.ones(3, np.float32))
    assert (names == []) == po2


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([np.float32, np.float16]).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            8,
            elements=st.floats(
                float(np.float16(1e-4)), 1000, width=16, allow_nan=False, allow_infinity=False
            ),
        )
    )
)
def test_the_inverse_of_a_power_of_two_is_its_reciprocal(scales):
    powers = ceil_to_power_of_two(jnp.asarray(scales))
    assert_same_bits(inverse_power_of_two(powers), reciprocal(powers))


def test_too_small_a_power_of_two_has_one_for_its_inverse():
    assert float(inverse_power_of_two(jnp.float32(2.0**-130))) == 1.0


@pytest.mark.parametrize(
    "count", [1, 7, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 3, 8, 13))]
)
def test_an_ordered_sum_adds_halves(count):
    x = np.random.default_rng(count).normal(size=(3, count)).astype(np.float32)

    def halves(values):
        while len(values) > 1:
            half = len(values) // 2
            values = [a + b for a, b in zip(values, values[half:], strict=False)][:half] + (
                values[2 * half :]
            )
        return values[0]

    expected = np.array([halves(list(row)) for row in x])
    assert_same_bits(jax.jit(ops.ordered_sum)(x), expected)
    assert_same_bits(ops.ordered_sum(x.T, axis=0), expected)
    np.testing.assert_allclose(ops.ordered_mean(x), x.mean(axis=1), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_summed_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        ops.ordered_sum(np.zeros((2, 3), np.float32), axis=2)
    with pytest.raises(ValueError, match="no mean"):
        ops.ordered_mean(np.zeros((2, 0), np.float32))
    assert ops.ordered_sum(np.zeros((2, 0), np.float32)).shape == (2,)


@pytest.mark.slow
def test_conversion_refuses_what_is_not_portable_by_name(tmp_path):
    model, variables, inputs = transforming()
    with pytest.raises(convert.ConversionError, match=r"`exp` in .*attention.*approximated"):
        convert.convert(model, variables, inputs, tmp_path / "m" / "1", portable=True)
    assert not (tmp_path / "m" / "1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "portable"),
    [pytest.param(convnet, True, marks=pytest.mark.long), (transforming, False)],
)
def test_portable_bits_are_those_of_an_older_processor(tmp_path, make, portable):
    model, variables, inputs = make()
    path = tmp_path / "m" / "1"
    manifest = convert.convert(model, variables, inputs, path, portable=portable)
    assert manifest.portable is portable
    older = _digest_with(path, "--xla_cpu_max_isa=SSE4_2")
    assert (older == digest(path)) == portable


def _digest_with(path, flags):
    code = f"from engine.portable_models import digest; print(digest({str(path)!r}))"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, timeout=240, check=True
    )
    return run.stdout.decode().split()[-1]
