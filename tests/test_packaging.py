"""The wheel that a user installs: what it puts where, and that it works outside of the source."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BOUND_S = 120.0
PACKAGES = {"aqt_cli", "aqt_client", "aqt_engine", "aqt_protos", "aqt_server"}


def run(*command, **kwargs):
    return subprocess.run(
        [sys.executable, *command],
        check=True,
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        **kwargs,
    ).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=ROOT)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder that holds what an installation puts beside the other packages."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def sources(package):
    """Files of the package in this checkout, as an installation names them."""
    (found,) = (
        p
        for p in (ROOT / package, *ROOT.glob(f"*/{package}"), *ROOT.glob(f"*/*/{package}"))
        if p.is_dir()
    )
    return {
        p.relative_to(found.parent).as_posix()
        for p in found.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }


def test_it_installs_its_packages_and_nothing_else(installed):
    top = {p.name for p in installed.iterdir()}
    (metadata,) = (name for name in top if name.endswith(".dist-info"))
    assert top - {metadata} == PACKAGES


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_a_package_is_whole(installed, package):
    found = {
        p.relative_to(installed).as_posix() for p in (installed / package).rglob("*") if p.is_file()
    }
    assert found == sources(package)
    assert f"{package}/py.typed" in found


def test_the_metadata_names_the_command_and_the_license(installed):
    (metadata,) = installed.glob("*.dist-info")
    scripts = configparser.ConfigParser()
    scripts.read(metadata / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"aqt": "aqt_cli.main:app"}
    assert list(metadata.rglob("LICENSE"))
    text = (metadata / "METADATA").read_text()
    assert "Requires-Python: >=3.11" in text
    assert "License-Expression: Apache-2.0" in text


def test_what_is_installed_runs_without_the_source(installed, tmp_path):
    # The test environment has the source installed as editable, and PYTHONPATH comes before that.
    environment = os.environ | {"PYTHONPATH": str(installed)}
    names = ", ".join(sorted(PACKAGES))
    code = f"import {names}\nfor package in ({names}): print(package.__file__)"
    files = run("-P", "-c", code, cwd=tmp_path, env=environment).split()
    assert [Path(f).parent for f in files] == [installed / p for p in sorted(PACKAGES)]
    command = "from aqt_cli.main import app; app()"
    helped = run("-P", "-c", command, "--help", cwd=tmp_path, env=environment)
    for name in ("convert", "inspect", "verify", "serve", "top", "predict"):
        assert name in helped
