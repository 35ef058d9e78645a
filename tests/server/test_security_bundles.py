"""A bundle that means harm: its files, its graph, and where its paths lead."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tritonclient.grpc as stock
from jax import export

from aqt_engine import bundle
from aqt_engine.foreign_code import foreign_calls
from aqt_server.directory import Directory, OutsideError
from bundles import write_linear
from server.messages import MODEL, raises_status, stock_input, x_of
from server_process import WAIT_S, serving


def exported(function, *harmful):
    checks = [export.DisabledSafetyCheck.custom_call(name) for name in harmful]
    return export.deserialize(
        export.export(jax.jit(function), disabled_checks=checks)(
            jax.ShapeDtypeStruct((4, 4), np.float32)
        ).serialize()
    )


def calling(*names):
    def function(x):
        for name in names:
            x = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
        return x

    return function


@pytest.mark.parametrize(
    "names",
    [
        ("xla_ffi_python_cpu_callback",),
        ("xla_python_gpu_callback", "tpu_custom_call"),
        ("__gpu$xla.gpu.triton",),
        ('a "quoted" name', "Sharding.not"),
    ],
)
def test_a_graph_that_calls_out_is_found(names):
    found = foreign_calls(exported(calling(*names), *names))
    assert len(found) == len(names)
    if '"' not in names[0]:
        assert {name.strip('"') for name in found} == set(names)


def test_arithmetic_is_not_foreign():
    def function(x):
        top = jax.lax.top_k(x, 2)[0].sum() + jax.lax.approx_max_k(x, 2)[0].sum()
        noise = jax.random.normal(jax.random.key(0), (4,))
        return jax.lax.erf(x) + top + noise + jax.lax.while_loop(lambda c: c < 3, jnp.exp, 0.0)

    assert foreign_calls(exported(function)) == ()


def test_such_a_bundle_is_refused(tmp_path, monkeypatch):
    write_linear(tmp_path / "1")
    assert bundle.load(tmp_path / "1").graphs
    harmful = exported(calling("xla_ffi_python_cpu_callback"), "xla_ffi_python_cpu_callback")
    monkeypatch.setattr(bundle.export, "deserialize", lambda content: harmful)
    with pytest.raises(bundle.BundleError, match=r"calls xla_ffi_python_cpu_callback outside"):
        bundle.load(tmp_path / "1")


WATCHED = """
import sys
from aqt_engine import bundle
import aqt_server.executor
bundle.load(sys.argv[1])  # once, so that what is imported late is there
seen = []
sys.addaudithook(lambda event, args: seen.append(event))
bundle.load(sys.argv[1])
harmful = ("pickle", "marshal", "subprocess", "os.system", "os.exec", "os.spawn", "ctypes.dlopen",
           "socket.connect", "exec", "compile", "import")
print([event for event in seen if event.startswith(harmful)])
print("open" in seen)
"""


@pytest.mark.slow
def test_loading_a_bundle_unpickles_and_runs_nothing(tmp_path):
    write_linear(tmp_path / "1")
    told = subprocess.run(
        [sys.executable, "-c", WATCHED, tmp_path / "1"],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    ).stdout
    assert told.splitlines() == ["[]", "True"]


def test_a_path_that_leads_out_of_the_repository_is_found(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in (root / "m" / "1" / "weights", root / "n", outside / "1"):
        path.mkdir(parents=True)
    (outside / "1" / "file").touch()
    (root / "m" / "1" / "inside").symlink_to("weights")
    assert Directory(root).local(("m", 1)) == root / "m" / "1"
    (root / "link").symlink_to(outside)
    (root / "n" / "1").symlink_to(outside / "1")
    (root / "n" / "2").mkdir()
    (root / "n" / "2" / "file").symlink_to("../../../outside/1/file")
    (root / "n" / "3" / "weights").mkdir(parents=True)
    (root / "n" / "3" / "weights" / "0").symlink_to(outside / "1")
    assert ("link", 1) in Directory(root).versions()
    for name, number in (("link", 1), ("n", 1), ("n", 2), ("n", 3)):
        with pytest.raises(OutsideError, match="leads out of the model repository"):
            Directory(root).local((name, number))
    # The repository itself may be a link.
    (tmp_path / "other").symlink_to(root)
    assert Directory(tmp_path / "other").local(("m", 1)) == tmp_path / "other" / "m" / "1"


@pytest.mark.slow
def test_what_is_outside_is_not_served_whatever_it_is_called(tmp_path):
    root = tmp_path / "repository"
    write_linear(root / MODEL / "1")
    write_linear(tmp_path / "outside" / "1", seed=1)
    (root / "link").symlink_to(tmp_path / "outside")
    control = ("--model-control", "explicit", "--load-model", "*")
    with (
        serving(root, *control, log=tmp_path / "log") as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        for name in ("../outside", "..", "/", f"{root}/{MODEL}", f"{MODEL}/1", "a\0b", ".", ""):
            with raises_status("NOT_FOUND", "no .*model"):
                client.infer(name, [stock_input(x_of(2))])
            with raises_status("NOT_FOUND", "no .*model"):
                client.load_model(name)
        for version in ("../1", "1/../1", "-1", "1\0", "9" * 40):
            with raises_status("NOT_FOUND", "has no version"):
                client.infer(MODEL, [stock_input(x_of(2))], model_version=version)
        with raises_status("FAILED_PRECONDITION", "leads out of the model repository"):
            client.infer("link", [stock_input(x_of(2))])
        assert client.infer(MODEL, [stock_input(x_of(2))])
        assert "Traceback" not in server.log()
