"""The Dockerfile is linted, its targets are what they are said to be, and so is compose.yaml."""

import difflib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())


def run(*command):
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def stages():
    """The lines of each stage by its name, without what names the stage itself."""
    found = {}
    for text in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        first, *lines = text.splitlines()
        base, name = first.split(" AS ")
        code = [line for line in lines if line and not line.startswith("#")]
        found[name] = [f"FROM {base}", *code]
    return found


def test_hadolint_finds_nothing_to_say():
    run(BIN / "hadolint", "Dockerfile")


@pytest.mark.parametrize("target", ["cuda", "tpu"])
def test_a_target_differs_from_cpu_in_the_line_of_its_packages(target):
    def lines(name):
        return [*stages()[f"{name}-packages"], *stages()[name]]

    changes = difflib.unified_diff(lines("cpu"), lines(target), n=0, lineterm="")
    changed = [line for line in changes if line.startswith("+ ") or re.match(r"\+[A-Z]", line)]
    assert changed == [
        f"+COPY requirements-{target}.txt requirements.txt",
        f"+COPY --from={target}-packages /opt/aqt /opt/aqt",
    ]


def versions(lock):
    text = (ROOT / f"requirements-{lock}.txt").read_text()
    return set(re.findall(r"^[\w.-]+==[^\\]+", text, re.MULTILINE))


@pytest.mark.parametrize("lock", ["serve", "cuda", "tpu", "build"])
def test_what_is_installed_is_pinned_with_hashes(lock):
    text = (ROOT / f"requirements-{lock}.txt").read_text()
    packages = re.split(r"\n(?! )", text.strip())
    assert all("--hash=sha256:" in package for package in packages)
    assert versions(lock) >= (set() if lock == "build" else versions("serve"))
    if lock == "build":
        assert "pip install --require-hashes -r requirements-build.txt" in DOCKERFILE
    else:
        assert f"COPY requirements-{lock}.txt requirements.txt" in DOCKERFILE
        assert (
            'install --require-hashes -r "$1"'
            in (ROOT / "deploy" / "image" / "install-packages.sh").read_text()
        )


def test_compose_has_the_form_of_its_specification():
    run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_compose_mounts_what_is_there():
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./deploy"):
                assert (ROOT / source).exists(), source
            elif source != "./models":
                assert source in COMPOSE["volumes"]


def test_compose_serves_as_the_image_is_meant_to_be():
    server = COMPOSE["services"]["server"]
    assert server["read_only"]
    assert server["cap_drop"] == ["ALL"]
    assert int(server["stop_grace_period"].removesuffix("s")) > 30
    (scraped,) = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())[
        "scrape_configs"
    ]
    assert scraped["static_configs"] == [{"targets": ["server:8002"]}]


def test_grafana_is_given_its_source_and_the_dashboard():
    provisioning = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((provisioning / "dashboards/aqt.yaml").read_text())["providers"]
    assert source["url"] == "http://prometheus:9090"
    dashboard = json.loads((ROOT / "deploy/grafana/aqt-server.json").read_text())
    assert {v["type"] for v in dashboard["templating"]["list"]} == {"datasource", "query"}
    mounted = "\n".join(COMPOSE["services"]["grafana"]["volumes"])
    assert f":{provider['options']['path']}/aqt-server.json" in mounted
