"""Memory is counted before a version is loaded: what does not fit is refused, and nothing dies."""

import asyncio
import gc
import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tritonclient.grpc as stock
from jax import export, lax

from aqt_engine import arrays, bundle
from aqt_engine.arrays import aligned_zeros
from aqt_engine.kernels import packing
from aqt_engine.materialization import materialized_on_cpu
from aqt_server import memory
from aqt_server.directory import Directory
from aqt_server.loader import Loader, Outcome, outcome_of
from aqt_server.memory import Memory, NoMemoryError
from aqt_server.settings import Batching, Models, Serving, Settings
from bundles import TILE, reference, write_linear
from engine.contractions import assert_same_bits
from server.messages import MODEL, raises_status, stock_input, x_of
from server.test_model_control import index
from server.test_statistics import scrape
from server_process import eventually, serving

WEIGHTS, LARGEST = 56, 24
X = x_of(5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    write_linear(root / MODEL / "1")
    return root


def test_what_a_version_takes_is_its_weights_and_its_workspace(root):
    manifest = bundle.read_manifest(root / MODEL / "1")
    assert manifest.nbytes == WEIGHTS
    rows = memory.workspace(manifest, 8)
    assert rows == 8 * (6 + 4) * 4

    def check(*, placed=False, **given):
        Memory(**{"limit": None, "held": 0, "available": lambda: 10**6} | given).check(
            manifest, workspace=rows, placed=placed
        )

    needed = WEIGHTS + LARGEST + rows
    check(limit=WEIGHTS + rows, available=lambda: needed)
    check(placed=True, available=lambda: rows)
    with pytest.raises(NoMemoryError, match=r"376 bytes, other versions 1,.*bytes is 376"):
        check(limit=WEIGHTS + rows, held=1)
    with pytest.raises(NoMemoryError, match=r"takes 400 bytes \(its.* and 399 are available"):
        check(available=lambda: needed - 1)


def test_what_is_free_is_what_the_machine_and_the_container_leave(tmp_path):
    assert memory.of_host(tmp_path) == 2**63 - 1
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8 kB\n")
    assert memory.of_host(tmp_path) == 8192
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("5000\n")
    assert memory.of_host(tmp_path) == 8192
    (cgroup / "memory.max").write_text("6000\n")
    (cgroup / "memory.stat").write_text("anon 1\ninactive_file 700\n")
    assert memory.of_host(tmp_path) == 1700
    assert 0 < memory.available() < 2**63 - 1


def test_the_workspace_is_what_the_compiled_executables_say(root):
    settings = Settings(models=Models(model_repository=str(root), proof_s=0))
    loaded = asyncio.run(Loader(settings, Directory(root)).load((MODEL, 1), held=0))
    assert loaded.executor.workspace_nbytes >= 64 * (6 + 4) * 4
    assert loaded.manifest.tile == TILE


def test_a_version_that_only_its_compilation_shows_too_large_is_refused(root):
    limit = WEIGHTS + 64 * (6 + 4) * 4
    settings = Settings(
        models=Models(model_repository=str(root), proof_s=0),
        serving=Serving(model_memory_bytes=limit),
    )
    with pytest.raises(NoMemoryError, match="its weights and workspace take") as raised:
        asyncio.run(Loader(settings, Directory(root)).load((MODEL, 1), held=0))
    assert outcome_of(raised.value) is Outcome.NO_MEMORY


def write_layers(path, layers):
    """int8 layers, one after the other."""

    def forward(weights, inputs):
        (x,) = inputs
        for weight in weights:
            x = materialized_on_cpu(jnp.clip(x, -127, 127).astype(jnp.int8))
            x = lax.dot(x, weight, preferred_element_type=jnp.int32)
            x = materialized_on_cpu(x).astype(jnp.float32) / 64
        return [x]

    x = np.arange(4 * len(layers[0]), dtype=np.float32).reshape(4, -1) % 7
    bundle.write(
        path,
        graph=export.export(jax.jit(forward))(layers, [x]),
        inputs=(bundle.TensorSpec(name="x", dtype="float32", shape=(bundle.BATCH, x.shape[1])),),
        outputs=(bundle.TensorSpec(name="y", dtype="float32", shape=(bundle.BATCH, x.shape[1])),),
        tile=len(x),
        weights={f"layer_{i}": layer for i, layer in enumerate(layers)},
        roles={f"layer_{i}": "qvalue" for i in range(len(layers))},
        float_nbytes=0,
        tools={},
        witness=bundle.Witness(
            inputs={"x": x}, outputs={"y": np.asarray(jax.jit(forward)(layers, [x])[0])}
        ),
    )


@pytest.mark.slow
def test_no_second_copy_of_the_weights_is_made_to_load_and_prove_a_version(tmp_path, monkeypatch):
    layers = [np.full((64, 64), i, np.int8) for i in range(12)]
    write_layers(tmp_path / MODEL / "1", layers)
    settings = Settings(
        models=Models(model_repository=str(tmp_path), proof_s=60),
        batching=Batching(max_batch_rows=4),
    )
    stored = sum(layer.nbytes for layer in layers)
    held = 0

    def hold(nbytes):
        nonlocal held
        held += nbytes

    def counted(shape, dtype):
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < layers[0].nbytes:
            return aligned_zeros(shape, dtype)

        def has_room():
            # JAX gives back here what its threads have let go of meanwhile.
            gc.collect(0)
            return held + nbytes <= 1.8 * stored

        # Its threads let go of some arrays later than others are read; of a second copy, never.
        eventually(has_room)
        array = aligned_zeros(shape, dtype)
        hold(nbytes)
        # What the view is of, which JAX keeps too.
        weakref.finalize(array.base, hold, -nbytes)
        return array

    for module in (arrays, packing):
        monkeypatch.setattr(module, "aligned_zeros", counted)
    loaded = asyncio.run(Loader(settings, Directory(tmp_path)).load((MODEL, 1), held=0))
    assert loaded.exact
    assert "time was up" not in loaded.verdict

    def has_packed_alone():
        gc.collect(0)
        # Packed, sums lie beside the values.
        return stored <= held <= 1.1 * stored

    eventually(has_packed_alone)


def test_a_version_is_not_read_where_too_little_is_available(root, monkeypatch):
    monkeypatch.setattr(bundle, "load", lambda path: pytest.fail("it was read"))
    loader = Loader(
        Settings(models=Models(model_repository=str(root))), Directory(root), available=lambda: 100
    )
    with pytest.raises(NoMemoryError, match="100 are available"):
        asyncio.run(loader.load((MODEL, 1), held=0))


@pytest.mark.slow
def test_what_does_not_fit_is_refused_until_there_is_room(root, tmp_path):
    root = tmp_path / "repository"
    for name, seed in ((MODEL, 1), ("other", 2)):
        write_linear(root / name / "1", seed=seed)
    # Room for one of them, of some 3200 bytes, and not for two.
    flags = ("--model-control", "explicit", "--model-memory-bytes", "5000")
    with (
        serving(root, *flags, log=tmp_path / "log") as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        client.load_model(MODEL)
        with raises_status("RESOURCE_EXHAUSTED", r"'other' was refused: version 1: its weights"):
            client.load_model("other")
        state, reason = index(client)["other", "1"]
        assert state == "UNAVAILABLE"
        assert "--model-memory-bytes is 5000: unload another" in reason
        with raises_status("FAILED_PRECONDITION", "'other' was refused: its weights"):
            client.infer("other", [stock_input(X)])
        answer = client.infer(MODEL, [stock_input(X)]).as_numpy("y")
        assert_same_bits(answer, reference(root / MODEL / "1", X))
        samples = scrape(server)
        refused = ("aqt_model_loads_total", ("model", "other"), ("outcome", "no_memory"))
        assert samples[refused] == 1
        workspace = samples["aqt_model_workspace_bytes", ("model", MODEL), ("version", "1")]
        assert 64 * 10 * 4 <= workspace < 4500
        client.unload_model(MODEL)
        client.load_model("other")
        answer = client.infer("other", [stock_input(X)]).as_numpy("y")
        assert_same_bits(answer, reference(root / "other" / "1", X))


@pytest.mark.slow
def test_what_did_not_fit_is_loaded_when_another_has_gone(tmp_path):
    root = tmp_path / "repository"
    for name in ("a", "b"):
        write_linear(root / name / "1")
    flags = ("--poll-s", "0.1", "--model-memory-bytes", "5000")
    with (
        serving(root, *flags, log=tmp_path / "log") as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        assert index(client)["b", "1"][0] == "UNAVAILABLE"
        (root / "a").rename(tmp_path / "gone")
        eventually(lambda: client.is_model_ready("b"))
        assert server.log().count("refused b version 1") == 1
