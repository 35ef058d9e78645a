"""The configuration that weights were quantized by: recorded, checked, and the only one allowed."""

import dataclasses
import hashlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aqt_engine import QuantMode, bundle, config
from aqt_engine.calibration import AbsMaxCalibration
from aqt_engine.config.serialization import fingerprint
from aqt_engine.convert import ConversionError, calibrate, convert
from aqt_engine.flax import AqtDotGeneral, AqtEinsum
from aqt_engine.numerics import IntNumerics
from aqt_engine.statistics import MeanOfAbsMaxCalibration

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

STATIC = config.update(
    config.config_v4(),
    "fwd.lhs",
    calibration=MeanOfAbsMaxCalibration(),
    calib_shared_axes="per_tensor",
)
LEFT = config.fully_quantized(fwd_bits=4)
X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Factory:
    dense: config.DotGeneral = STATIC

    def __call__(self, mode):
        return Model(mode, self.dense)


class Model(nn.Module):
    mode: QuantMode
    dense: config.DotGeneral

    @nn.compact
    def __call__(self, x):
        dot_general = AqtDotGeneral(self.dense, lhs_quant_mode=self.mode, rhs_quant_mode=self.mode)
        x = nn.Dense(5, dot_general=dot_general)(x)
        w = self.param("w", nn.initializers.normal(), (3, 5))
        return AqtEinsum(LEFT, lhs_quant_mode=self.mode)("of,nf->no", w, x)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("repository") / "m" / "1"
    params = {
        "params": jax.jit(Model(QuantMode.TRAIN, STATIC).init)(jax.random.key(0), X)["params"]
    }
    variables = calibrate(Factory(), params, [{"x": X}])
    convert(Factory(), variables, {"x": X}, path, tile=4)
    return path, variables


def test_the_manifest_says_what_quantized_each_tensor(written):
    provenance = bundle.read_manifest(written[0]).provenance
    einsum = "aqt/AqtEinsum_0/AqtDotGeneral_0/qlhs"
    assert set(provenance.tensors) == {
        "aqt/AqtDotGeneral_0/qlhs",
        "aqt/AqtDotGeneral_0/qrhs",
        einsum,
    }
    static = provenance.quantized("aqt/AqtDotGeneral_0/qlhs")
    assert (static.side, static.config) == ("lhs", STATIC)
    assert provenance.quantized("aqt/AqtDotGeneral_0/qrhs").tensor == STATIC.fwd.rhs
    assert provenance.quantized(einsum).tensor.numerics == LEFT.fwd.lhs.numerics
    assert fingerprint(STATIC) in provenance.configurations
    assert len(provenance.configurations) == 2


def test_the_same_configurations_have_the_same_fingerprint(written, tmp_path):
    path, variables = written
    other = jax.tree.map(lambda x: x * 2 if x.dtype == np.float32 else x, variables)
    again = convert(Factory(), other, {"x": X}, tmp_path / "m" / "2", tile=4)
    assert again.provenance == bundle.read_manifest(path).provenance


def forged(document, **changes):
    """The manifest with changes to its provenance, and a digest that fits."""
    changed = document | {"provenance": document["provenance"] | changes}
    del changed["digest"]
    text = json.dumps(changed, sort_keys=True, separators=(",", ":"))
    return changed | {"digest": hashlib.sha256(text.encode()).hexdigest()}


def test_a_fingerprint_of_something_else_is_refused(written, tmp_path):
    document = json.loads((written[0] / "manifest.json").read_text())
    provenance = document["provenance"]
    one, two = provenance["configurations"]
    swapped = {
        one: provenance["configurations"][two],
        two: provenance["configurations"][one],
    }
    tensors = dict(provenance["tensors"])
    name = sorted(tensors)[0]
    side = {"side": "rhs", "configuration": tensors[name]["configuration"]}
    (tmp_path / "1").mkdir()
    for changes, message in (
        ({"configurations": swapped}, "has the fingerprint"),
        ({"tensors": tensors | {name: side}}, "have the fingerprint"),
        ({"configurations": {one: swapped[two]}}, "not those that the tensors name"),
        ({"fingerprint": "0" * 64}, "000000000000 is stated"),
        ({"configurations": {one: {"version": 9}, two: {}}}, "format version 9"),
    ):
        (tmp_path / "1" / "manifest.json").write_text(json.dumps(forged(document, **changes)))
        with pytest.raises(bundle.BundleError, match=message):
            bundle.read_manifest(tmp_path / "1")


def test_what_was_stored_has_to_be_what_the_model_makes(written, tmp_path):
    _, variables = written
    run = jax.jit(lambda v: Factory()(QuantMode.CONVERT).apply(v, X, mutable=["aqt"])[1])
    stored = {**variables, **run(variables)}
    convert(Factory(), stored, {"x": X}, tmp_path / "m" / "1", tile=4)
    clipped = config.update(STATIC, "fwd.rhs", calibration=AbsMaxCalibration(0.9))
    moved = {**stored, "params": jax.tree.map(lambda p: p + 1, variables["params"])}
    for model, spoiled in ((Factory(clipped), stored), (Factory(), moved)):
        with pytest.raises(ConversionError, match=r"made with another configuration, or of other"):
            convert(model, spoiled, {"x": X}, tmp_path / "m" / "2", tile=4)
    left = config.int_tensor(4)
    fewer = config.DotGeneral(fwd=config.raw(STATIC.fwd.lhs, left))
    with pytest.raises(ValueError, match=r"converted by the configuration.*numerics.bits 8 and 4"):
        Factory(fewer)(QuantMode.SERVE).apply(stored, X)


@dataclasses.dataclass(frozen=True, slots=True)
class OwnNumerics(IntNumerics):
    """A user's class, which has no name in JSON."""


def test_a_configuration_with_classes_of_ones_own_is_left_out(tmp_path):
    numerics = OwnNumerics(
        **{f.name: getattr(config.int_numerics(8), f.name) for f in dataclasses.fields(IntNumerics)}
    )
    own = config.update(STATIC, "fwd.rhs", numerics=numerics)
    params = Factory(own)(QuantMode.TRAIN).init(jax.random.key(0), jnp.asarray(X))["params"]
    variables = calibrate(Factory(own), {"params": params}, [{"x": X}])
    manifest = convert(Factory(own), variables, {"x": X}, tmp_path / "m" / "1", tile=4)
    einsum = {"aqt/AqtEinsum_0/AqtDotGeneral_0/qlhs"}
    assert set(manifest.provenance.tensors) == einsum
