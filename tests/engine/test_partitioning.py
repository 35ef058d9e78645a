"""Partition metadata and shards survive conversion, and a sharded SERVE gives the same bits."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aqt_engine import QuantMode, config
from aqt_engine.flax import AqtDotGeneral
from aqt_engine.flax.partitioning import partitioned


class Mlp(nn.Module):
    mode: QuantMode

    @nn.compact
    def __call__(self, x):
        for features, names in ((16, (None, "model")), (8, ("model", None))):
            dot_general = AqtDotGeneral(config.fully_quantized(), rhs_quant_mode=self.mode)
            kernel_init = nn.with_partitioning(nn.initializers.normal(), names)
            layer = nn.Dense(features, kernel_init=kernel_init, dot_general=dot_general)
            x = nn.relu(layer(x))
        return x


assert jax.device_count() == 8
x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)), jnp.float32)
variables = jax.jit(Mlp(QuantMode.TRAIN).init)(jax.random.key(0), x)
alone = jax.jit(Mlp(QuantMode.TRAIN).apply)(variables, x)
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def placed(tree):
    specs = nn.get_partition_spec(tree)
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
                        nn.unbox(tree), specs)


def sharded(box, value):
    return nn.meta.replace_boxed(box, value)


whole = sharded(variables, placed(variables))
rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
with mesh:
    convert = jax.jit(lambda v, x: Mlp(QuantMode.CONVERT).apply(v, x, mutable=["aqt"])[1])
    stored = convert(whole, rows)
    boxed = partitioned(Mlp, whole, stored["aqt"], {"x": rows})
    specs = nn.get_partition_spec({"aqt": boxed, "params": whole["params"]})
    first, second = (specs["aqt"][f"AqtDotGeneral_{i}"]["qrhs"] for i in range(2))
    assert first.qvalue == PartitionSpec(None, "model"), first
    assert first.scale == PartitionSpec(None, "model"), first
    assert second.qvalue == PartitionSpec("model", None), second
    assert second.scale == PartitionSpec(None, None), second
    for i in range(2):
        found, kernel = stored["aqt"][f"AqtDotGeneral_{i}"]["qrhs"], whole["params"][f"Dense_{i}"]
        of = kernel["kernel"].value.sharding
        assert found.qvalue.sharding.is_equivalent_to(of, 2), (found.qvalue.sharding, of)
    serving = {"params": whole["params"], "aqt": boxed}
    serving = sharded(serving, placed(serving))
    served = jax.jit(Mlp(QuantMode.SERVE).apply)(serving, rows)
values = serving["aqt"]["AqtDotGeneral_0"]["qrhs"].qvalue.value
assert values.addressable_shards[0].data.shape == (12, 4)
np.testing.assert_array_equal(np.asarray(served).view(np.uint32), np.asarray(alone).view(np.uint32))
print("served")
"""


def test_a_sharded_model_stays_sharded_and_serves_the_bits_of_one_device():
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": ":".join(sys.path),
            "PATH": str(Path(sys.executable).parent),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout == "served\n"
