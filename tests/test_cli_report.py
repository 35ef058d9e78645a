"""`aqt report`, as someone with a checkpoint, a file of data and a question uses it."""

import json

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from typer.testing import CliRunner

from aqt_cli.commands import app
from aqt_engine import config
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.rules import Rule, Rules

pytestmark = pytest.mark.slow

INT8 = config.fully_quantized()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(70, 6)).astype(np.float32)


class Net(nn.Module):
    hook: AqtDotGeneral | None

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, dot_general=self.hook)(x))
        return nn.Dense(4, dot_general=self.hook)(x)


def quantized(mode):
    return Net(AqtDotGeneral(INT8, rhs_quant_mode=mode))


def in_float():
    return Net(None)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    variables = jax.jit(in_float().init)(jax.random.key(0), X)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", variables)
    labels = np.asarray(in_float().apply(variables, X)).argmax(axis=-1)
    np.savez(folder / "data.npz", x=X, label=labels)
    rules = Rules((Rule(modules="Dense_1", config=INT8),))
    (folder / "rules.json").write_text(rules.to_json())
    return folder


def run(given, model, *options):
    arguments = ["--checkpoint", str(given / "checkpoint"), "--data", str(given / "data.npz")]
    reference = f"{__name__}:{model}"
    command = ["report", "--model", reference, "--labels", "label", *arguments, *options]
    return CliRunner().invoke(app, command)


def test_a_report_is_shown_written_and_searched(given, tmp_path):
    proposed = tmp_path / "proposed.json"
    budget = ["--max-bytes", "250", "--propose", str(proposed), "--out", str(tmp_path / "out")]
    result = run(given, "quantized", *budget)
    assert result.exit_code == 0, result.output
    for shown in ("Contractions", "Dense_0", "Quantized alone", "Mixed precision", str(proposed)):
        assert shown.replace("\n", "") in result.output.replace("\n", "")
    rules = Rules.from_json(proposed.read_text())
    assert [rule.name for rule in rules.rules] == ["Dense_0:dot_general", "Dense_1:dot_general"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    for name in ("histograms.png", "sensitivity.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_json_has_what_the_tables_have(given):
    result = run(given, "quantized", "--bits", "8", "--bits", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [c["path"] for c in found["contractions"]] == ["Dense_0", "Dense_1"]
    assert sum(found["contractions"][0]["operands"]["lhs"]["histogram_before"]) == X.size
    assert {(s["path"], s["bits"]) for s in found["sensitivity"]} == {
        (path, bits) for path in ("Dense_0", "Dense_1") for bits in (8, 2)
    }
    assert found["float"] == {"sqnr_db": None, "score": 1.0}
    assert found["mixture"] is None


def test_a_float_model_is_reported_as_rules_quantize_it(given):
    result = run(given, "in_float", "--rules", str(given / "rules.json"), "--json")
    assert result.exit_code == 0, result.output
    contractions = json.loads(result.stdout)["contractions"]
    assert [(c["path"], c["op"]) for c in contractions] == [("Dense_1", "dot_general")]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("quantized", ["--max-bytes", "9", "--min-score", "1"], "give one budget"),
        pytest.param(
            *("quantized", ["--max-bytes", "9"], "smallest mixture takes"), marks=pytest.mark.long
        ),
        ("quantized", ["--classes", "logits"], "no output 'logits'"),
        ("quantized", ["--labels", "nothing"], "no array 'nothing'"),
    ],
)
def test_a_wrong_wish_is_one_sentence(given, model, options, message):
    result = run(given, model, *options)
    assert result.exit_code != 0
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
