"""Bundles as SavedModels in TensorFlow: `make savedmodel-test`, which is no part of `make test`."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
import tensorflow as tf
from typer.testing import CliRunner

from aqt_cli.commands import app
from aqt_engine import QuantMode, bundle, config, saved_model
from aqt_engine.convert import Signature, convert
from aqt_engine.flax import AqtDotGeneral
from engine.contractions import assert_same_bits

X = np.random.default_rng(0).normal(size=(20, 16, 6)).astype(np.float32)
FACTOR = np.linspace(1, 2, 20).astype(np.float32)


class Model(nn.Module):
    """Two layers; between them, where `smooth`, what is computed in float."""

    mode: QuantMode
    config: config.DotGeneral
    smooth: bool

    @nn.compact
    def __call__(self, x, factor):
        def dense(features):
            dot_general = AqtDotGeneral(self.config, rhs_quant_mode=self.mode)
            return nn.Dense(features, use_bias=False, dot_general=dot_general)

        y = dense(64)(x)
        y = nn.LayerNorm()(nn.gelu(y)) if self.smooth else nn.relu(y)
        return {"logits": dense(3)(y), "factor": factor}


def write(path, cfg, smooth, signature=Signature()):  # noqa: B008
    def factory(mode):
        return Model(mode, cfg, smooth)

    inputs = {"x": X, "factor": FACTOR}
    variables = factory(QuantMode.TRAIN).init(jax.random.key(0), **inputs)
    convert(factory, variables, inputs, path, tile=8, signature=signature)
    return bundle.load(path)


def serve(path, name="serving_default", **inputs):
    found = tf.saved_model.load(str(path)).signatures[name](
        **{k: tf.constant(a) for k, a in inputs.items()}
    )
    return {k: np.asarray(a) for k, a in found.items()}


def test_integer_layers_have_the_bits_of_the_bundle(tmp_path):
    written = write(tmp_path / "m" / "1", config.fully_quantized(), smooth=False)
    options = ["--saved-model", str(tmp_path / "saved"), "--json"]
    result = CliRunner().invoke(app, ["export", str(tmp_path / "m" / "1"), *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["signatures"]["serving_default"]["exact"]
    # Any number of rows, of which the last tile is not full.
    whole = written.witness.outputs["logits"]
    for rows in (1, 8, 13, 20):
        found = serve(tmp_path / "saved", x=X[:rows], factor=FACTOR[:rows])
        assert_same_bits(found["logits"], whole[:rows])
        assert_same_bits(found["factor"], FACTOR[:rows])


@pytest.mark.parametrize("cfg", [config.fully_quantized(), config.weight_only(4)], ids=["8", "4"])
def test_float_layers_are_close_and_what_differs_is_said(tmp_path, cfg):
    lengths = Signature(shapes={"x": ("batch", "length", 6)}, lengths={"length": (4, 16)})
    written = write(tmp_path / "m" / "1", cfg, smooth=True, signature=lengths)
    verdicts = saved_model.write(written, tmp_path / "saved")
    assert verdicts.keys() == {"length_4", "length_16"}
    print({name: str(verdict) for name, verdict in verdicts.items()})
    for bucket, kept in written.witnesses.items():
        found = serve(
            tmp_path / "saved", saved_model.signature_name(written, bucket), **kept.inputs
        )
        np.testing.assert_allclose(found["logits"], kept.outputs["logits"], rtol=1e-2, atol=1e-2)


def test_what_exists_is_not_written_over(tmp_path):
    written = write(tmp_path / "m" / "1", config.fully_quantized(), smooth=False)
    with pytest.raises(FileExistsError):
        saved_model.write(written, tmp_path)
