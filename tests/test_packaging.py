"""The wheels that a user installs: what they put where, and that each asks for what it needs."""

import configparser
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BOUND_S = 120.0
NOT_SOURCE = (
    ".git",
    ".venv*",
    "out",
    "node_modules",
    "__pycache__",
    "*.so",
    "*.so.*",
    ".hypothesis",
)
FOLDERS = {
    "aqt-client": ROOT / "clients/python",
    "aqt-engine": ROOT,
    "aqt-protos": ROOT / "protos",
    "aqt-server": ROOT / "server",
}
PACKAGES = {
    "aqt-client": [ROOT / "clients/python/aqt_client"],
    "aqt-engine": [ROOT / "aqt_engine", ROOT / "cli/aqt_cli"],
    "aqt-protos": [ROOT / "protos/aqt_protos"],
    "aqt-server": [ROOT / "server/aqt_server"],
}


def run(*command, **kwargs):
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND_S, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder for each distribution, with what an installation puts beside other packages."""
    wheels, folder = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    # A build compiles in place, under the feet of tests that load what was compiled before.
    source = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    for project in FOLDERS.values():
        build = ("-m", "hatchling", "build", "-t", "wheel", "-d", wheels)
        run(sys.executable, *build, cwd=source / project.relative_to(ROOT))
    for wheel in wheels.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / canonicalize_name(wheel.name.split("-")[0]))
    return folder


def project(name):
    return tomllib.loads((FOLDERS[name] / "pyproject.toml").read_text())["project"]


def files(package):
    """Names of a package's files, from the folder that it stands in."""
    return {
        p.relative_to(package.parent).as_posix()
        for p in package.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_wheel_has_its_packages_whole_and_nothing_else(installed, name):
    (metadata,) = (installed / name).glob("*.dist-info")
    top = {p.name for p in (installed / name).iterdir()} - {metadata.name}
    assert top == {package.name for package in PACKAGES[name]}
    for package in PACKAGES[name]:
        found = files(installed / name / package.name)
        assert found == files(package)
        assert f"{package.name}/py.typed" in found


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_the_metadata_names_the_license_and_the_one_version(installed, name):
    (metadata,) = (installed / name).glob("*.dist-info")
    assert list(metadata.rglob("LICENSE"))
    text = (metadata / "METADATA").read_text()
    assert "Requires-Python: >=3.11" in text
    assert "License-Expression: Apache-2.0" in text
    version = project("aqt-engine")["version"]
    assert f"\nVersion: {version}\n" in text
    siblings = [d for d in project(name)["dependencies"] if Requirement(d).name in PACKAGES]
    assert all(d.endswith(f"=={version}") for d in siblings)


def test_the_engine_brings_the_command(installed):
    (metadata,) = (installed / "aqt-engine").glob("*.dist-info")
    scripts = configparser.ConfigParser()
    scripts.read(metadata / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"aqt": "aqt_cli.main:app"}


def test_what_several_ask_for_has_one_lower_bound():
    asked = {}
    for name in PACKAGES:
        for dependency in project(name)["dependencies"]:
            requirement = Requirement(dependency)
            asked.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert {name: bounds for name, bounds in asked.items() if len(bounds) > 1} == {}


def asked_for(requirements):
    """The distributions that an installation of these brings: ours by name, others as metadata."""
    ours, others, todo = set(), {}, [(Requirement(r), None) for r in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra or ""}):
            continue
        name = canonicalize_name(requirement.name)
        extras = {None, *requirement.extras}
        if name in PACKAGES:
            if name not in ours:
                ours.add(name)
                todo += [(Requirement(d), None) for d in project(name)["dependencies"]]
            continue
        done, found = others.setdefault(name, (set(), importlib.metadata.distribution(name)))
        for new in extras - done:
            done.add(new)
            todo += [(Requirement(r), new) for r in found.requires or ()]
    return ours, [distribution for _, distribution in others.values()]


def link(target, source):
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


@pytest.fixture
def clean(installed, tmp_path):
    """Makes an environment with what installing a distribution brings, and no more.

    Files are those of the environment that runs the tests: what an index has today is for
    `make test-latest` and `make test-minimum`.
    """

    def make(name):
        environment = tmp_path / name
        run(sys.executable, "-m", "venv", "--without-pip", environment)
        (site,) = environment.glob("lib/python*/site-packages")
        ours, others = asked_for([name])
        for distribution in others:
            for file in distribution.files:
                target, source = site / file, Path(distribution.locate_file(file))
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    link(target, source)
                if file.suffix == ".py":
                    # Compiled already: importing takes half.
                    link(*(Path(importlib.util.cache_from_source(f)) for f in (target, source)))
        (site / "ours.pth").write_text("\n".join(str(installed / o) for o in ours))
        return environment / "bin/python"

    return make


ALL_MODULES = """
import importlib, pkgutil, sys
for name in sys.argv[1].split(","):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        importlib.import_module(module.name)
print(*sorted(m for m in ("jax", "grpc", "flax", "aqt_engine") if m in sys.modules))
"""


@pytest.mark.parametrize(
    ("name", "packages", "loaded"),
    [
        ("aqt-client", "aqt_client,aqt_protos", "grpc"),
        ("aqt-engine", "aqt_engine,aqt_cli", "aqt_engine flax jax"),
        ("aqt-server", "aqt_server,aqt_client", "aqt_engine grpc jax"),
    ],
)
def test_every_module_finds_what_it_imports(clean, name, packages, loaded, tmp_path):
    python = clean(name)
    assert run(python, "-I", "-c", ALL_MODULES, packages, cwd=tmp_path).strip() == loaded


def test_commands_of_the_server_say_what_to_install(clean, tmp_path):
    python = clean("aqt-engine")
    code = "from aqt_cli.main import app; app()"
    assert "convert" in run(python, "-I", "-c", code, "--help", cwd=tmp_path)
    for command in (["serve"], ["predict", "iris", "--inputs", "x.npz"], ["bench", "iris"]):
        done = subprocess.run(
            [python, "-I", "-c", code, *command],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert "pip install aqt-server" in done.stderr
        assert "Traceback" not in done.stderr
