"""The experiments of `examples/papers` and the training benchmark run, and count what they say."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import training as training_benchmark
from examples.papers import pareto
from examples.papers.binary import binary

pytestmark = pytest.mark.slow

EXPERIMENTS = ("pareto", "binary", "native_4bit", "int8_backward")


@pytest.mark.in_haste
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "pareto" else pytest.mark.long)
        for name in EXPERIMENTS
    ],
)
def test_experiment_prints_a_table_and_writes_numbers_and_a_plot(name, tmp_path, capsys):
    script = importlib.import_module(f"examples.papers.{name}")
    script.main(["--quick", "--json", str(tmp_path / "found.json")])
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["quick"]
    assert "too short to say anything" in shown
    assert "float32" in shown
    for row in document["rows"]:
        assert len(row["accuracy %"]) == len(document["seeds"])
        assert all(0 <= accuracy <= 100 for accuracy in row["accuracy %"])
        # The table shows the mean of what is written.
        assert f"{np.mean(row['accuracy %']):.4g} ±" in shown
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.in_haste
def test_training_benchmark_gives_ratios_to_the_float_step(tmp_path, capsys, monkeypatch):
    chosen = ("float", "config_v4(): int8, drhs float", "config_fwd_fp8()")
    configurations = {name: training_benchmark.CONFIGURATIONS[name] for name in chosen}
    monkeypatch.setattr(training_benchmark, "CONFIGURATIONS", configurations)
    path = tmp_path / "found.json"
    training_benchmark.main(["--quick", "--markdown", "--models", "MLP", "--json", str(path)])
    document = json.loads(path.read_text())
    assert [row["configuration"] for row in document["rows"]] == [*chosen]
    reference = document["rows"][0]
    assert reference["ratio"] == 1
    for row in document["rows"]:
        ratios = np.median(np.array(row["seconds"]) / reference["seconds"], axis=0)
        assert (row["ratio"], row["processor_ratio"]) == pytest.approx(tuple(ratios))
    assert "| MLP   | float32 |" in capsys.readouterr().out
    assert document["environment"]["cores"] >= 1


def test_size_and_compute_of_a_model_are_those_counted_by_hand():
    # Width 2, one channel of 8x8 in: MACs and values of each kernel in order, the last one dense.
    macs = np.array([64 * 18, 64 * 36, 64 * 36, 16 * 8, 16 * 72, 16 * 144, 40])
    values = np.array([18, 36, 36, 8, 72, 144, 40])
    scales = 2 + 2 + 2 + 4 + 4 + 4 + 10
    other = 10 + 2 * (2 + 2 + 2 + 4 + 4)  # the bias, and five normalizations
    assert pareto.cost(pareto.ResNet(2, None)) == (4 * (values.sum() + other), 1024 * macs.sum())
    half = pareto.ResNet(2, None, jnp.bfloat16)
    assert pareto.cost(half) == (2 * (values.sum() + other), 256 * macs.sum())
    bits = np.array([8, 4, 4, 4, 4, 4, 8])
    size = (bits * values).sum() // 8 + 4 * scales + 4 * other
    assert pareto.cost(pareto.ResNet(2, 4)) == (size, (bits * bits * macs).sum())


def test_front_holds_what_nothing_cheaper_or_better_beats():
    costs, accuracies = [1, 2, 2, 3, 4, 4], [50, 60, 55, 60, 70, 70]
    assert pareto.front(costs, accuracies) == [True, True, False, False, True, True]


def test_bound_stops_gradients_of_activations_beyond_it_and_nothing_else():
    x = jnp.asarray([[-3.0, -2.0, -0.5, 0.0, 1.9, 2.1]])
    w = jnp.asarray([[1.0], [-2.0], [3.0], [0.5], [-1.0], [4.0]])

    def output(x, w):
        return binary(2.0)(x, w, (((1,), (0,)), ((), ())))[0, 0]

    # Activations are +-2, weights +-2: half of the largest of their channel.
    assert output(x, w) == 4 * (-1 + 1 - 1 + 1 - 1 + 1)
    to_x, to_w = jax.grad(output, (0, 1))(x, w)
    np.testing.assert_array_equal(to_x[0], [0, -2, 3, 0.5, -1, 0])
    np.testing.assert_array_equal(to_w[:, 0], x[0])
