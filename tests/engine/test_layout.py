"""Programs on several devices answer as on one, in every bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest

from aqt_engine import QuantMode, config, convert, flax
from aqt_engine.layout import Layout
from aqt_engine.manifest import WeightSpec

BOUND_S = 240


def normalized(mode=QuantMode.TRAIN):
    """Contractions with float sums between them, over features that shards would split.

    The first kernel is to be cut along what remains, the second along what is summed over.
    """
    int8 = flax.AqtDotGeneral(config.fully_quantized(), rhs_quant_mode=mode)

    def dense(features, *names):
        kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), names)
        return nn.Dense(features, kernel_init=kernel_init, dot_general=int8)

    norm = nn.LayerNorm(scale_init=nn.with_partitioning(nn.initializers.ones, ("model",)))
    first, second, third = dense(128, None, "model"), dense(64, "model", None), dense(32)
    return nn.Sequential([first, nn.gelu, norm, second, nn.softmax, third])


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    import jax

    path = tmp_path_factory.mktemp("bundle") / "normalized" / "1"
    x = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    variables = jax.jit(normalized().init)(jax.random.key(0), x)
    convert.convert(normalized, variables, {"inputs": x}, path, tile=8)
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, Path(__file__).parent / "eight_devices.py", path]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=BOUND_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def found(told):
    """What each layout gave, by its numbers of copies and shards."""
    return {tuple(result["layout"]): result for result in told["sharded"]}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(8, 1), (1, 8), (2, 4)])
def test_several_devices_answer_in_the_bits_of_one(found, layout):
    assert found[layout]["differing"] == 0


@pytest.mark.slow
def test_the_partitioner_alone_would_change_bits(told):
    """So that the test above could fail: float sums over shards have other bits."""
    assert told["left"] > 0


@pytest.mark.slow
def test_only_integers_are_added_up_across_devices(found):
    for (_, shards), result in found.items():
        assert result["added_across_devices"] == (["s32"] if shards > 1 else [])


@pytest.mark.slow
def test_each_device_holds_its_part_of_the_integer_weights(found):
    for (_, shards), result in found.items():
        for name, part in result["part_of_weights"].items():
            assert part == (1 / shards if name.endswith("qvalue") else 1), name


@pytest.mark.slow
def test_weights_are_cut_along_the_axes_that_their_trainer_named(found):
    for (_, shards), result in found.items():
        first, second, third = (at for name, at in result["axes"].items() if "qvalue" in name)
        assert [first, second, third] == ([1, 0, 0] if shards > 1 else [None] * 3)
        said = [sentence for sentence in result["departures"] if "layers_2/scale" in sentence]
        assert result["departures"] == said
        assert len(said) == (shards > 1)
        assert all("axis 0 (model): it is in float" in sentence for sentence in said)


def weight(shape, *axes, role="qvalue", dtype="int8"):
    return WeightSpec(name="w", dtype=dtype, shape=shape, role=role, axes=axes or None)


@pytest.mark.parametrize(
    ("of", "axis", "said"),
    [
        (weight((8, 12)), 0, None),
        (weight((8, 12), None, "model"), 1, None),
        (weight((8, 12), "embed", "mlp"), 0, None),
        (weight((6, 12), "embed", ("x", "y")), 1, None),
        (weight((8, 6), None, "mlp"), 0, "axis 1 (mlp): 4 shards do not divide 6, so axis 0 is"),
        (weight((3, 6), "a", "b"), None, "4 shards do not divide 3 and 6, so each device holds it"),
        (weight((3, 6)), None, None),
        (weight((8, 12), "a", None, dtype="float8_e4m3fn"), None, "is in float"),
        (weight((8,), "a", dtype="float32", role="float"), None, "is in float"),
        (weight((8,), dtype="float32", role="float"), None, None),
    ],
)
def test_the_axis_that_is_cut_is_the_one_that_is_named_where_it_can_be(of, axis, said):
    assert Layout(shards=4).axis_of(of) == axis
    departures = Layout(shards=4).departures([of])
    assert [said in sentence for sentence in departures] == [True] * (said is not None)
    assert Layout().axis_of(of) is None
    assert Layout().departures([of]) == []


@pytest.mark.parametrize("of", [{"copies": 3}, {"copies": 0}, {"shards": 0}])
def test_what_cannot_be_laid_out_is_refused(of):
    with pytest.raises(ValueError, match="power of two"):
        Layout(**of)


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(ValueError, match="take 64 devices"):
        Layout(copies=64).mesh()
