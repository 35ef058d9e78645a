"""The generated code: up to date, in a pool of its own, and described by reflection."""

import shutil
import subprocess
import sys
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from aqt_protos import POOL, SERVICE_NAME
from aqt_protos import open_inference_pb2 as pb

PROTOS = Path(__file__).parents[2] / "protos"
BOUND_S = 60


def run(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=BOUND_S
    )


def test_the_committed_code_is_what_the_proto_gives():
    done = run(PROTOS / "generate.py", "--check")
    assert (done.returncode, done.stderr) == (0, "")


def edit_the_proto(package):
    file = package / "open_inference.proto"
    file.write_text(file.read_text().replace("bool live = 1;", "bool live = 2;"))


def edit_the_code(package):
    file = package / "generated" / "open_inference_pb2_grpc.py"
    file.write_text(file.read_text() + "# by hand\n")


def remove_a_stub(package):
    (package / "generated" / "open_inference_pb2.pyi").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("change", [edit_the_proto, edit_the_code, remove_a_stub])
def test_check_finds_a_difference_and_generating_removes_it(tmp_path, change):
    shutil.copytree(PROTOS, tmp_path / "protos")
    change(tmp_path / "protos" / "aqt_protos")
    script = tmp_path / "protos" / "generate.py"
    done = run(script, "--check")
    assert done.returncode == 1
    assert "open_inference_pb2" in done.stderr
    assert "run `python protos/generate.py`" in done.stderr
    assert run(script).returncode == 0
    assert run(script, "--check").returncode == 0


ROUND_TRIP = """
from aqt_protos import open_inference_pb2 as ours
from tritonclient.grpc import service_pb2 as theirs
sent = theirs.ModelInferRequest(model_name="m", raw_input_contents=[b"x"]).SerializeToString()
assert ours.ModelInferRequest.FromString(sent).SerializeToString() == sent
"""


@pytest.mark.parametrize(
    "imports",
    ["import aqt_protos, tritonclient.grpc", "import tritonclient.grpc, aqt_protos"],
)
def test_it_lives_beside_tritonclient_in_either_order(imports):
    done = run("-c", imports + ROUND_TRIP)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_default_pool_stays_untouched():
    code = (
        "import aqt_protos; from google.protobuf import descriptor_pool\n"
        "descriptor_pool.Default().FindMessageTypeByName('inference.ModelInferRequest')"
    )
    assert "KeyError" in run("-c", code).stderr
    assert pb.DESCRIPTOR.pool is POOL
    assert POOL is not descriptor_pool.Default()


def test_the_package_imports_no_jax():
    code = (
        "import sys, aqt_protos.tensors\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib', 'aqt_engine')])"
    )
    assert run("-c", code).stdout.strip() == "[]"


def test_reflection_describes_all_services():
    names = (SERVICE_NAME, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    with futures.ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        reflection.enable_server_reflection(names, server, pool=POOL)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                pool = descriptor_pool.DescriptorPool(database)
                assert sorted(database.get_services()) == sorted(names)
                for name in names:
                    found, ours = (p.FindServiceByName(name) for p in (pool, POOL))
                    assert set(found.methods_by_name) == set(ours.methods_by_name)
                infer = pool.FindMethodByName(f"{SERVICE_NAME}.ModelInfer")
                assert set(infer.input_type.fields_by_name) == set(
                    pb.ModelInferRequest.DESCRIPTOR.fields_by_name
                )
        finally:
            server.stop(None).wait(BOUND_S)
