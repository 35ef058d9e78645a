"""Generates the code of `aqt_protos/generated/` from `aqt_protos/open_inference.proto`.

python protos/generate.py           writes it
python protos/generate.py --check   only says whether what is there is what would be written
"""

import argparse
import re
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

_ROOT = Path(__file__).resolve().parent
_PACKAGE = "aqt_protos/generated"
_INIT = '"""Written by `protos/generate.py`; not to be edited."""\n'
_DEFAULT_POOL = re.compile(r"\b_descriptor_pool\.Default\(\)\.AddSerializedFile\(")
_POOL_IMPORT = "from google.protobuf import descriptor_pool as _descriptor_pool\n"
_OUR_POOL_IMPORT = "from aqt_protos._pool import POOL as _POOL\n"


def generate(root: Path) -> Path:
    """Writes the generated package under `root`; returns its directory."""
    arguments = [
        "protoc",
        # A file's name decides where protoc writes and how the code imports: this maps the
        # package's name onto the folder of the source.
        f"--proto_path={_PACKAGE}={_ROOT / 'aqt_protos'}",
        f"--proto_path={Path(grpc_tools.__file__).parent / '_proto'}",
        f"--plugin=protoc-gen-mypy={_plugin('protoc-gen-mypy')}",
        f"--plugin=protoc-gen-mypy_grpc={_plugin('protoc-gen-mypy_grpc')}",
        f"--python_out={root}",
        f"--grpc_python_out={root}",
        f"--mypy_out=quiet:{root}",
        f"--mypy_grpc_out=quiet,generate_concrete_servicer_stubs:{root}",
        f"{_PACKAGE}/open_inference.proto",
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc refused open_inference.proto; its message stands above.")
    package = root / _PACKAGE
    (package / "__init__.py").write_text(_INIT)
    messages = package / "open_inference_pb2.py"
    messages.write_text(_in_our_pool(messages.read_text()))
    return package


def _plugin(name: str) -> str:
    path = shutil.which(name, path=sysconfig.get_path("scripts"))
    if path is None:
        raise SystemExit(f"{name} is not installed beside {sys.executable}: install mypy-protobuf.")
    return path


def _in_our_pool(code: str) -> str:
    """The generated code with its descriptors in our pool; `_pool.py` says why."""
    code, calls = _DEFAULT_POOL.subn("_POOL.AddSerializedFile(", code)
    if calls != 1 or code.count(_POOL_IMPORT) != 1:
        raise SystemExit(
            "The code that protoc writes has another form than generate.py knows: "
            "adapt how it is moved into our descriptor pool."
        )
    return code.replace(_POOL_IMPORT, _OUR_POOL_IMPORT)


def differences(found: Path, expected: Path) -> list[str]:
    """Names of the files that are not the same in both directories, sorted."""
    contents = [
        {file.name: file.read_bytes() for file in root.iterdir() if file.is_file()}
        for root in (found, expected)
    ]
    names = contents[0].keys() | contents[1].keys()
    return sorted(name for name in names if contents[0].get(name) != contents[1].get(name))


def main() -> None:
    """Generates, or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    if not parser.parse_args().check:
        generate(_ROOT)
        return
    with tempfile.TemporaryDirectory() as temporary:
        stale = differences(_ROOT / _PACKAGE, generate(Path(temporary)))
    if stale:
        raise SystemExit(
            f"The generated code is not what the .proto gives ({', '.join(stale)}): "
            f"run `python protos/generate.py` and commit the result."
        )


if __name__ == "__main__":
    main()
