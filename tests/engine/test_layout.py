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

BOUND_S = 240


def normalized(mode=QuantMode.TRAIN):
    """Contractions with float sums between them, over features that shards would split."""
    int8 = flax.AqtDotGeneral(config.fully_quantized(), rhs_quant_mode=mode)

    def dense(features):
        return nn.Dense(features, dot_general=int8)

    return nn.Sequential([dense(128), nn.gelu, nn.LayerNorm(), dense(64), nn.softmax, dense(32)])


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


@pytest.mark.parametrize("of", [{"copies": 3}, {"copies": 0}, {"shards": 0}])
def test_what_cannot_be_laid_out_is_refused(of):
    with pytest.raises(ValueError, match="power of two"):
        Layout(**of)


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(ValueError, match="take 64 devices"):
        Layout(copies=64).mesh()
