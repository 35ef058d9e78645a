"""The servers of `servers/`, ready to be measured by `benchmarks.serving`."""

import json
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from aqt_protos import tensors
from benchmarks.contenders import Arrays, Contender
from benchmarks.peers import environments

SERVERS = Path(__file__).parent / "servers"
# What Triton's stub for Python 3.11 is linked to: `python3-numpy` of Debian 12.
_DEBIAN_NUMPY = Path("/usr/lib/python3/dist-packages/numpy")


def servers(folder: Path, model: str, inputs: Arrays) -> list[Contender]:
    """MLServer, kserve and Triton with an identity model; their files are written to `folder`.

    A server that cannot be installed here is left out, and the reason printed.
    """
    return list(_installed(folder, model, inputs))


def _installed(folder: Path, model: str, inputs: Arrays) -> Iterator[Contender]:
    makers: dict[str, Callable[[Path, Path, str, Arrays], Contender]]
    makers = {"mlserver": _mlserver, "kserve": _kserve, "triton": _triton}
    for name, make in makers.items():
        try:
            made = folder / name
            made.mkdir()
            yield make(environments.python(name), made, model, inputs)
        except environments.NotInstalled as error:
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)


def identity(inputs: Arrays) -> Callable[[Arrays], bool]:
    """Whether an answer has the inputs, in every bit."""
    return lambda answer: all(
        answer[name].tobytes() == array.tobytes() for name, array in inputs.items()
    )


def _mlserver(python: Path, folder: Path, model: str, inputs: Arrays) -> Contender:
    """In one process: requests that are sent to workers are slower."""
    shutil.copy(SERVERS / "mlserver_identity.py", folder)
    of_model = {"name": model, "implementation": "mlserver_identity.Identity"}
    (folder / "model-settings.json").write_text(json.dumps(of_model))
    settings = {"metrics_endpoint": None, "parallel_workers": 0, "debug": False}
    (folder / "settings.json").write_text(json.dumps(settings))
    return Contender(
        name="MLServer",
        command=(str(python.parent / "mlserver"), "start", str(folder)),
        model=model,
        inputs=inputs,
        expected=identity(inputs),
        environment={
            "PYTHONPATH": str(folder),
            "MLSERVER_HOST": "127.0.0.1",
            "MLSERVER_GRPC_PORT": "{port}",
            "MLSERVER_HTTP_PORT": _free_port(),
        },
    )


def _kserve(python: Path, folder: Path, model: str, inputs: Arrays) -> Contender:
    return Contender(
        name="kserve",
        command=(str(python), str(SERVERS / "kserve_identity.py"), model, "{port}", _free_port()),
        model=model,
        inputs=inputs,
        expected=identity(inputs),
        environment={"PYTHONPATH": ""},
    )


def _triton(python: Path, folder: Path, model: str, inputs: Arrays) -> Contender:
    """The binary of `nvidia-pytriton`, its Python backend beside the stub for Debian's Python.

    Raises:
      NotInstalled: Debian's Python or its NumPy is not there: with another, answers are empty.
    """
    if not _DEBIAN_NUMPY.exists():
        raise environments.NotInstalled("Triton's stub needs Debian's package python3-numpy")
    (triton,) = python.parent.parent.glob("lib/python*/site-packages/pytriton/tritonserver")
    # Beside the backend, from where the stub finds its libraries.
    stub = triton / "python_backend_stubs" / "3.11" / "triton_python_backend_stub"
    shutil.copy(stub, triton / "backends" / "python")
    version = folder / "models" / model / "1"
    version.mkdir(parents=True)
    shutil.copy(SERVERS / "triton_identity.py", version / "model.py")
    sides = "\n".join(
        f'{side} [{{ name: "{name}" data_type: TYPE_{tensors.datatype_of(a.dtype).name} '
        f"dims: {list(a.shape)} }}]"
        for side in ("input", "output")
        for name, a in inputs.items()
    )
    config = f'name: "{model}"\nbackend: "python"\n{sides}\n'
    (version.parent / "config.pbtxt").write_text(config)
    return Contender(
        name="Triton, Python backend",
        command=(
            *(str(triton / "bin" / "tritonserver"), "--model-repository", str(folder / "models")),
            *("--backend-directory", str(triton / "backends"), "--grpc-address", "127.0.0.1"),
            *("--grpc-port", "{port}", "--allow-http", "false", "--allow-metrics", "false"),
        ),
        model=model,
        inputs=inputs,
        expected=identity(inputs),
        environment={"PATH": "/usr/bin:/bin", "PYTHONPATH": ""},
    )


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
