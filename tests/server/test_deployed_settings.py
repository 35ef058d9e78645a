"""What the deployments give the server are its settings, ports and formats of today."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from aqt_engine.bundle import FORMAT_VERSION
from aqt_server import configuration

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
HELP = configuration._parser().format_help()


def variables():
    """The environment that the image gives."""
    lines = re.findall(r"^ENV (.*)$", DOCKERFILE, re.MULTILINE)
    found = dict(part.split("=", 1) for line in lines for part in shlex.split(line))
    return {name: value for name, value in found.items() if name.startswith("AQT_")}


def settings(*arguments, config=None):
    arguments = [str(config) if a == "/etc/aqt/aqt.toml" else a for a in arguments]
    return configuration.read(arguments, variables()).settings


def documents(path):
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


def test_the_image_gives_settings_that_the_server_has():
    assert configuration.unknown_variables(variables()) == []
    found = settings()
    assert found.models.model_repository == "/models"
    ports = re.search(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)[1].split()
    listen = found.listen
    assert ports == [str(port) for port in (listen.http_port, listen.port, listen.metrics_port)]


def test_the_manifests_give_settings_that_the_server_has(tmp_path):
    manifests = {d["kind"]: d for d in documents("kubernetes/aqt-server.yaml")}
    config = tmp_path / "aqt.toml"
    config.write_text(manifests["ConfigMap"]["data"]["aqt.toml"])
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    found = settings(*container["args"], config=config)
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {found.models.model_repository, "/etc/aqt"} <= mounted
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    listen = found.listen
    assert named == {"http": listen.http_port, "grpc": listen.port, "metrics": listen.metrics_port}


def test_the_runtime_of_kserve_has_settings_ports_and_format_of_the_server():
    (runtime,) = documents("kserve/serving-runtime.yaml")
    (container,) = runtime["spec"]["containers"]
    listen = settings(*container["args"]).listen
    assert [port["containerPort"] for port in container["ports"]] == [listen.port]
    scraped = runtime["spec"]["annotations"]["prometheus.kserve.io/port"]
    assert scraped == str(listen.metrics_port)
    (served,) = runtime["spec"]["supportedModelFormats"]
    assert served["version"] == str(FORMAT_VERSION)


def test_compose_and_prometheus_reach_the_ports_of_the_server():
    listen = settings().listen
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    published = {port.rpartition(":")[2] for port in compose["services"]["server"]["ports"]}
    assert published == {str(p) for p in (listen.http_port, listen.port, listen.metrics_port)}
    (scraped,) = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())[
        "scrape_configs"
    ]
    assert scraped["static_configs"] == [{"targets": [f"server:{listen.metrics_port}"]}]


@pytest.mark.parametrize("kind", ["*.yaml", "*.tpl", "*.yml"])
def test_every_flag_that_a_deployment_names_is_one(kind):
    files = [*DEPLOY.rglob(kind), *([ROOT / "compose.yaml"] if kind == "*.yaml" else [])]
    assert files
    for file in files:
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", file.read_text()):
            assert re.search(rf"(?<![\w-]){flag}\b(?!-)", HELP), f"{flag} in {file}"


def test_a_flag_that_is_none_would_be_found():
    with pytest.raises(configuration.SettingsError):
        settings("--model-repositories", "/mnt/models")
    assert configuration.unknown_variables({"AQT_HTTP_PORTS": "1"}) == ["AQT_HTTP_PORTS"]
