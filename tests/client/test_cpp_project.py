"""What can be told of the C++ client without a compiler; `make cpp-test` builds and runs it."""

import re
import tomllib
from pathlib import Path

from aqt_protos.tensors import DATATYPES
from documentation import blocks

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "clients" / "cpp"
PROJECT = (CLIENT / "CMakeLists.txt").read_text()


def test_its_project_has_all_files_and_our_version():
    sources = {path.relative_to(CLIENT).as_posix() for path in CLIENT.glob("*/*.cc")}
    assert sources == set(re.findall(r"\w+/\w+\.cc(?=[\s)])", PROJECT))
    ours = tomllib.loads((ROOT / "protos" / "pyproject.toml").read_text())["project"]["version"]
    assert f"VERSION {ours} " in PROJECT
    (said,) = (b.text for b in blocks(CLIENT / "README.md") if b.language == "cmake")
    assert f"find_package(aqt_client {ours.rpartition('.')[0]} REQUIRED)" in said


def test_the_code_of_its_readme_is_that_of_the_example():
    example = (CLIENT / "examples" / "digits.cc").read_text()
    (shown,) = re.findall(r"// \[README\n(.*?)  // README\]", example, re.DOTALL)
    (said,) = (b.text for b in blocks(CLIENT / "README.md") if b.language == "cpp")
    assert said == re.sub("^  ", "", shown, flags=re.MULTILINE)


def test_its_datatypes_are_the_protocols():
    source = (CLIENT / "src" / "tensor.cc").read_text()
    found = re.findall(r'\{"(\w+)", (\d)\}', source)
    sizes = {n: 0 if n == "BYTES" else d.dtype.itemsize for n, d in DATATYPES.items()}
    assert {name: int(size) for name, size in found} == sizes
    header = (CLIENT / "include" / "aqt_client" / "tensor.h").read_text()
    (listed,) = re.findall(r"enum class Datatype \{(.*?)\}", header, re.DOTALL)
    assert re.findall(r"k(\w+)", listed) == [name.capitalize() for name, _ in found]
