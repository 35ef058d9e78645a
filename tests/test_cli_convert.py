"""`aqt convert` takes linen factories, functions and nnx models, and names what else it gets."""

import json

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import save_file
from typer.testing import CliRunner

from aqt_cli.commands import app
from aqt_engine import config, einsum
from aqt_engine.bundle import read_manifest
from aqt_engine.calibration import AbsMaxCalibration
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.flax import nnx as aqt_nnx
from aqt_engine.functions import quantize
from aqt_engine.modes import CalibrationMode, QuantMode
from aqt_engine.pretrained import TensorRule
from aqt_engine.rules import Rule, Rules
from aqt_engine.statistics import MeanOfAbsMaxCalibration

INT8 = config.fully_quantized()
EVERYWHERE = Rules((Rule(modules=".*", config=INT8),))
X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


def linen(mode=QuantMode.TRAIN):
    return nn.Dense(3, dot_general=AqtDotGeneral(INT8, rhs_quant_mode=mode))


def function(variables, inputs):
    return einsum("nf,fo->no", inputs, variables["kernel"], config=INT8) + variables["bias"]


def plain(variables, inputs):
    return inputs @ variables["kernel"] + variables["bias"]


STATIC = config.update(
    INT8,
    "fwd.lhs",
    calibration=MeanOfAbsMaxCalibration(),
    calibration_mode=CalibrationMode.ALL_AXES,
)
static = quantize(plain, Rules((Rule(modules=".*", config=STATIC),)))


class Net(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([nnx.Linear(6, 3, rngs=nnx.Rngs(0))])

    def __call__(self, inputs):
        return self.layers[0](inputs)


def nnx_model():
    return aqt_nnx.quantize(Net(), EVERYWHERE, rngs=nnx.Rngs(1))


def number_model():
    return 3


number = 3
params = {"kernel": jnp.asarray(X[:6, :3]), "bias": jnp.ones(3)}
CHECKPOINTS = {
    "linen": {"params": params},
    "function": params,
    "static": {"params": params, "opt_state": {"count": jnp.zeros(())}},
    "nnx_model": nnx.state(Net()),
}


TENSORS = (
    TensorRule(r"fc\.weight", "params/kernel", axes=(1, 0)),
    TensorRule(r"fc\.bias", "params/bias"),
)
PUBLISHED = {
    "fc.weight": np.ascontiguousarray(X[:6, :3].T),
    "fc.bias": np.ones(3, np.float16),
}


def convert(folder, model, checkpoint, *options):
    np.savez(folder / "example.npz", inputs=X)
    command = ["convert", "--model", f"{__name__}:{model}", "--tile", "8", "--json"]
    paths = {"checkpoint": checkpoint, "example": folder / "example.npz", "output": folder / "m/1"}
    arguments = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    return CliRunner().invoke(app, [*command, *arguments, *options])


@pytest.mark.slow
@pytest.mark.parametrize("model", CHECKPOINTS)
def test_each_kind_of_model_is_converted(tmp_path, model):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", CHECKPOINTS[model])
    options = ["--calibration", str(tmp_path / "example.npz")] if model == "static" else []
    result = convert(tmp_path, model, tmp_path / "checkpoint", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bundle_bytes"] < json.loads(result.stdout)["float_bytes"]


@pytest.mark.slow
def test_published_weights_are_read_by_the_table_of_the_model(tmp_path):
    save_file(PUBLISHED, tmp_path / "model.safetensors")
    result = convert(tmp_path, "linen", tmp_path)
    assert result.exit_code == 0, result.output
    # With the float16 bias widened as it was for conversion.
    command = ["verify", str(tmp_path / "m" / "1"), "--model", f"{__name__}:linen", "--json"]
    result = CliRunner().invoke(app, [*command, "--against", str(tmp_path / "model.safetensors")])
    assert json.loads(result.stdout)["exact"], result.output
    assert json.loads(result.stdout)["reference"] == "training"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**PUBLISHED, "head.weight": np.ones(2)}, "head.weight has no rule"),
        ({"fc.weight": PUBLISHED["fc.weight"]}, r"no tensor is named fc\.bias"),
        (
            {**PUBLISHED, "fc.bias": np.ones(4, np.float32)},
            "params/bias is [3], and its tensor [4]",
        ),
    ],
)
def test_published_weights_of_another_model_are_refused_by_name(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "model.safetensors")
    result = convert(tmp_path, "linen", tmp_path / "model.safetensors")
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def linen_in_float():
    return nn.Dense(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "checkpoint", "modules"),
    [
        ("linen_in_float", "linen", ""),
        ("linen", "linen", ""),
        ("plain", "function", "0"),
        ("Net", "nnx_model", "layers/0"),
    ],
)
def test_rules_quantize_each_kind_of_model(tmp_path, model, checkpoint, modules):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", CHECKPOINTS[checkpoint])
    int4 = config.fully_quantized(4, 8)
    rules = tmp_path / "rules.json"
    rules.write_text(Rules((Rule(modules=modules, config=int4),)).to_json())
    result = convert(tmp_path, model, tmp_path / "checkpoint", "--rules", str(rules))
    assert result.exit_code == 0, result.output
    (stored,) = {w.dtype for w in read_manifest(tmp_path / "m" / "1").weights if w.role == "qvalue"}
    assert stored == "int4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (Rules((Rule(modules="elsewhere", config=INT8),)).to_json(), "matches nothing"),
        ("{}", "the document has no `version`"),
    ],
)
@pytest.mark.parametrize("model", ["linen", "linen_in_float"])
def test_rules_that_cannot_be_are_one_sentence(tmp_path, model, text, message):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", CHECKPOINTS["linen"])
    (tmp_path / "rules.json").write_text(text)
    options = ["--rules", str(tmp_path / "rules.json")]
    result = convert(tmp_path, model, tmp_path / "checkpoint", *options)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("number", "is of type int"),
        ("number_model", "gives an object of type int"),
        ("AbsMaxCalibration", "gives an object of type AbsMaxCalibration"),
        ("nothing", "no attribute"),
    ],
)
def test_what_else_is_given_is_named_with_what_is_expected(tmp_path, model, found):
    assert AbsMaxCalibration is not None
    result = convert(tmp_path, model, tmp_path)
    assert result.exit_code == 2
    said = " ".join(result.output.replace("│", "").split())
    assert found in said
    assert model == "nothing" or "a function without arguments to an nnx model" in said


def test_a_checkpoint_of_another_nnx_model_is_refused(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", {"layers": {"0": {"bias": jnp.ones(4)}}})
    result = convert(tmp_path, "nnx_model", tmp_path / "checkpoint")
    assert result.exit_code == 1
    assert "has 'layers/0/bias' of shape (3,), and the checkpoint (4,)" in result.output
