"""Programs on several devices answer as on one, in every bit."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import numpy as np
import pytest

from aqt_engine import QuantMode, bundle, config, convert, flax
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


def chained(mode=QuantMode.TRAIN):
    """Kernels beside which all else is small."""
    int8 = flax.AqtDotGeneral(config.fully_quantized(), rhs_quant_mode=mode)
    return nn.Sequential([nn.Dense(512, use_bias=False, dot_general=int8) for _ in range(6)])


WIDE = np.random.default_rng(1).normal(size=(8, 512)).astype(np.float32)


def run(script, *arguments, devices):
    """A process that is started in Python, with so many devices."""
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, Path(__file__).with_name(script), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def answers(*processes):
    """What each printed last, as JSON."""
    try:
        done = [process.communicate(timeout=BOUND_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _ in done]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Where a bundle of `chained` lies."""
    import jax

    path = tmp_path_factory.mktemp("bundle") / "chain" / "1"
    variables = jax.jit(chained().init)(jax.random.key(0), WIDE)
    convert.convert(chained, variables, {"inputs": WIDE}, path, tile=8)
    return path


@pytest.fixture(scope="module")
def told(tmp_path_factory, chain):
    import jax

    path = tmp_path_factory.mktemp("bundle") / "normalized" / "1"
    x = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    variables = jax.jit(normalized().init)(jax.random.key(0), x)
    convert.convert(normalized, variables, {"inputs": x}, path, tile=8)
    (told,) = answers(run("eight_devices.py", path, chain, devices=8))
    return told


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
def test_each_part_of_a_weight_is_read_once_and_by_itself(found):
    for (_, shards), result in found.items():
        parts = {
            w // shards if of else w for w, of in zip(result["weights"], cut(result), strict=True)
        }
        assert result["read_at_once"] == sorted(parts)
        assert len(parts) > 1
        # Also those that several copies hold. What lies between short runs is read each time.
        assert result["read"] >= sum(result["weights"])
        assert (result["read"] == sum(result["weights"])) == (shards == 1)
        assert result["here"] == result["weights"], "all devices of a CPU share its memory"


def cut(result):
    return [axis is not None for axis in result["axes"].values()]


@pytest.mark.slow
def test_what_a_proof_compares_shards_with_splits_no_sum_and_reads_nothing(told, found):
    for (_, shards), result in found.items():
        assert result["differing_gathered"] == 0
        assert result["read_to_gather"] == 0
        assert result["gathers"] == (sum(cut(result)) if shards > 1 else 0)
        assert result["other_sums"] == 0
    # As whatever the partitioner does, it is told nothing but that weights are whole.
    assert told["left_gathered"] == 0


@pytest.mark.slow
def test_each_host_reads_only_what_its_devices_hold(chain):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = (run("one_of_two_hosts.py", chain, address, index, devices=4) for index in (0, 1))
    weights = bundle.read_manifest(chain).weights
    kernels = sum(w.nbytes for w in weights if w.role == "qvalue")
    others = sum(w.nbytes for w in weights if w.role != "qvalue")
    for host in answers(*hosts):
        assert host["read"] == host["here"] == kernels // 2 + others
        assert host["read_at_once"] == 512 * 512 // 8
        assert host["differing"] == host["differing_gathered"] == 0


@pytest.mark.slow
def test_what_gathers_weights_holds_few_of_them_at_once(told):
    assert 1 <= told["most_gathered"] < 2


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
