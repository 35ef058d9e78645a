"""The benchmark of GPUs runs where there is none, and what it times can be compiled for one."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax import export

from benchmarks import gpu

pytestmark = pytest.mark.slow


@pytest.mark.in_haste
def test_it_runs_on_any_device(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    tables = ["--tables", "contractions", "models"]
    gpu.main(["--quick", "--markdown", "--json", str(path), *tables])
    assert "| int8 layer |" in capsys.readouterr().out
    document = json.loads(path.read_text())
    for what in ("bf16", "int8", "fp8", "int8 layer"):
        assert all(row["ms"] > 0 for row in document["contractions"] if row["what"] == what)
    assert {row["what"] for row in document["models"]} == {
        *("float32", "bfloat16", "int8, exact", "int8, fast")
    }


@pytest.mark.parametrize("what", [*gpu.CONTRACTIONS, "int8 layer"])
def test_contractions_are_lowered_for_gpu_and_tpu(what):
    rows, k, n, count = 16, 64, 32, 2
    if what == "int8 layer":
        run, dtype, other = gpu.layer, jnp.bfloat16, [((count, 1, n), jnp.bfloat16)]
    else:
        dtype, out = gpu.CONTRACTIONS[what]
        run, other = lambda x, w: gpu.contract(x, w, out), []
    weights = jnp.int8 if what == "int8 layer" else dtype
    shapes = [((rows, k), dtype), ((count, k, n), weights), *other]
    structs = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    exported = export.export(jax.jit(gpu.through(run)), platforms=["cuda", "tpu"])(*structs)
    assert "dot_general" in exported.mlir_module()
