"""Linen modules: a mode changes where a weight comes from, and never a bit of the answer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import QuantMode
from aqt_engine.flax import AqtDotGeneral, AqtEinsum
from engine.contractions import assert_same_bits
from engine.linen_modes import (
    BATCHED,
    CONVERT,
    INT8,
    SERVE,
    TRAIN,
    Dense,
    Einsum,
    X,
    assert_modes_agree,
    converted,
    parameters,
    run,
    stored_leaves,
    with_weights,
)

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

RIGHT = [
    Dense,
    functools.partial(Einsum, equation="nf,fo->no"),
    functools.partial(Einsum, equation="nf,of->no", shape=(5, 6)),
    functools.partial(Einsum, equation="nf,fo->on"),
    functools.partial(Einsum, equation="nf,fhd->nhd", shape=(6, 2, 3)),
]
LEFT = [
    functools.partial(Einsum, side="lhs", equation="fo,nf->no"),
    functools.partial(Einsum, side="lhs", equation="of,nf->on", shape=(5, 6)),
    functools.partial(Einsum, side="lhs", equation="fhd,nf->nhd", shape=(6, 2, 3)),
]


@pytest.mark.parametrize("module", [*RIGHT, *LEFT])
def test_every_mode_gives_the_same_bits(module):
    _, aqt, _ = assert_modes_agree(module)
    ((path, stored),) = stored_leaves(aqt).items()
    assert path.endswith("qlhs" if module in LEFT else "qrhs")
    assert stored.qvalue.dtype == jnp.int8
    assert stored.dequant_dtype == jnp.float32


@pytest.mark.parametrize("module", [Dense, LEFT[0]])
def test_four_bits(module):
    _, aqt, _ = assert_modes_agree(functools.partial(module, bits=4))
    (stored,) = stored_leaves(aqt).values()
    assert stored.qvalue.dtype == jnp.int4


@pytest.mark.parametrize("module", [Dense, LEFT[0]])
def test_serving_never_looks_at_the_float_weight(module):
    params, aqt, trained = assert_modes_agree(module)
    serve = jax.jit(module(SERVE).apply)
    for value in (0.0, jnp.inf, 1.0):
        changed = with_weights(params, value)
        assert_same_bits(serve({"params": changed, "aqt": aqt}, X), trained)
    assert not np.array_equal(run(module(TRAIN), {"params": changed}), trained)


def test_eager_and_jitted_agree():
    """On a contraction: a product and the sum of a bias are one operation only when compiled."""
    params, aqt, trained = assert_modes_agree(Einsum)
    for mode in (TRAIN, QuantMode.CALIBRATE):
        assert_same_bits(Einsum(mode).apply({"params": params}, X), trained)
    assert_same_bits(Einsum(SERVE).apply({"params": params, "aqt": aqt}, X), trained)


def test_converting_again_takes_the_weight_of_the_day():
    params, changed = parameters(Dense), parameters(Dense, seed=1)
    variables = {"params": changed, "aqt": converted(Dense, params)[1]}
    convert = jax.jit(functools.partial(Dense(CONVERT).apply, mutable=["aqt"]))
    answer, stored = convert(variables, X)
    fresh_answer, fresh = converted(Dense, changed)
    assert_same_bits(answer, fresh_answer)
    jax.tree.map(assert_same_bits, stored["aqt"], fresh)


@pytest.mark.parametrize("mode", [SERVE, CONVERT])
def test_initializing_in_any_mode_gives_the_form_of_what_is_stored(mode):
    def form(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    params = parameters(Dense)
    fresh = jax.eval_shape(Dense(mode).init, jax.random.key(0), X)
    assert form(fresh["params"]) == form(params)
    assert form(fresh["aqt"]) == form(converted(Dense, params)[1])


def test_both_sides_may_be_stored():
    class Constants(nn.Module):
        mode: QuantMode

        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (6, 5))
            modes = {"lhs_quant_mode": self.mode, "rhs_quant_mode": self.mode}
            return AqtEinsum(INT8, **modes)("nf,fo->on", x, w)

    params, aqt, trained = assert_modes_agree(Constants)
    assert {path.split("/")[-1] for path in stored_leaves(aqt)} == {"qlhs", "qrhs"}
    served = run(Constants(SERVE), {"params": params, "aqt": aqt}, jnp.zeros_like(X))
    assert_same_bits(served, trained)


class Shared(nn.Module):
    """One AqtDotGeneral for two layers whose weights have the same shape, and a tied third."""

    mode: QuantMode

    @nn.compact
    def __call__(self, x):
        dot_general = AqtDotGeneral(INT8, rhs_quant_mode=self.mode, name="shared")
        first = nn.Dense(6, dot_general=dot_general, name="first")
        second = nn.Dense(6, dot_general=dot_general, name="second")
        return first(nn.relu(second(nn.relu(first(x)))))


def test_a_shared_instance_numbers_its_calls():
    params, aqt, _ = assert_modes_agree(Shared)
    leaves = stored_leaves(aqt)
    assert {p.split("/")[-1] for p in leaves} == {"qrhs", "qrhs_1", "qrhs_2"}
    assert len({p.rsplit("/", 1)[0] for p in leaves}) == 1
    by_name = {p.split("/")[-1]: leaf for p, leaf in leaves.items()}
    for name, layer in (("qrhs", "first"), ("qrhs_1", "second"), ("qrhs_2", "first")):
        kernel, stored = params[layer]["kernel"], by_name[name].dequant()
        # Half a bucket, of 255 between the extremes.
        np.testing.assert_allclose(stored, kernel, atol=np.abs(kernel).max() / 250)


def test_every_run_counts_its_calls_from_the_start():
    params, aqt, trained = assert_modes_agree(Shared)

    @jax.jit
    def twice(variables, x):
        bound = Shared(SERVE).bind(variables)
        return bound(x), bound(x)

    for answer in twice({"params": params, "aqt": aqt}, X):
        assert_same_bits(answer, trained)


class Deep(nn.Module):
    mode: QuantMode
    features: int = 5

    @nn.compact
    def __call__(self, x):
        dot_general = AqtDotGeneral(INT8, rhs_quant_mode=self.mode, name="contraction")
        return nn.Dense(self.features, dot_general=dot_general, name="layer")(x)


@pytest.mark.parametrize("aqt", [None, {}, {"elsewhere": 1}])
def test_what_was_not_stored_is_named(aqt):
    variables = {"params": parameters(Deep)}
    if aqt is not None:
        variables = {**variables, "aqt": aqt}
    with pytest.raises(ValueError, match=r"contraction is in QuantMode\.SERVE") as caught:
        Deep(SERVE).apply(variables, X)
    assert "'aqt' holds no 'qrhs'" in str(caught.value)
    assert "run the model once in QuantMode.CONVERT" in str(caught.value)


def test_what_was_stored_for_another_shape_is_named():
    _, aqt = converted(Deep, parameters(Deep))
    wider = parameters(functools.partial(Deep, features=9))
    with pytest.raises(ValueError, match=r"contraction/qrhs was stored with shape \(6, 5\)") as e:
        Deep(SERVE, features=9).apply({"params": wider, "aqt": aqt}, X)
    assert "the model has (6, 9): convert again" in str(e.value)


def test_a_served_weight_has_no_gradient():
    params = parameters(Dense)
    _, aqt = converted(Dense, params)
    with pytest.raises(TypeError, match=r"differentiate the model in QuantMode\.TRAIN"):
        jax.grad(lambda x: Dense(SERVE).apply({"params": params, "aqt": aqt}, x).sum())(X)


def test_a_gradient_without_a_key_says_so():
    for stream in ("params", None):
        module = nn.Dense(5, dot_general=AqtDotGeneral(INT8, prng_name=stream))
        gradient = jax.grad(lambda p, m=module: m.apply({"params": p}, X).sum())
        with pytest.raises(ValueError, match="key"):
            jax.eval_shape(gradient, parameters(Dense)["Dense_0"])


def test_no_configuration_contracts_in_float():
    def plain(mode):
        return nn.Dense(5)

    def unquantized(mode):
        return nn.Dense(5, dot_general=AqtDotGeneral(None, rhs_quant_mode=mode))

    params = parameters(plain)
    expected = plain(TRAIN).apply({"params": params}, X)
    for mode in QuantMode:
        answer, stored = unquantized(mode).apply({"params": params}, X, mutable=["aqt"])
        assert_same_bits(answer, expected)
        assert not stored
    w = params["kernel"]
    answer = AqtEinsum(None, rhs_quant_mode=SERVE).apply({}, "nf,fo->on", X, w)
    assert_same_bits(answer, jnp.einsum("nf,fo->on", X, w))
    half = AqtDotGeneral().apply(
        {}, X, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.bfloat16
    )
    assert half.dtype == jnp.bfloat16


def test_computing_in_bfloat16():
    params, aqt, answer = assert_modes_agree(functools.partial(Dense, dtype=jnp.bfloat16))
    assert params["Dense_0"]["kernel"].dtype == jnp.float32
    (stored,) = stored_leaves(aqt).values()
    assert stored.scale.dtype == stored.dequant_dtype == jnp.bfloat16
    assert answer.dtype == jnp.bfloat16
    single = run(Dense(TRAIN), {"params": params})
    # Scales, products and the bias are each rounded to 8 bits.
    assert np.abs(answer - single).max() < 0.05 * np.abs(single).max()


@pytest.mark.parametrize(
    "module", [Dense, functools.partial(Einsum, side="lhs", equation="fo,bqf->bqo")]
)
def test_a_batch_of_more_dimensions(module):
    assert_modes_agree(module, BATCHED)
