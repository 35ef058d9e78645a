"""The manifests are what Kubernetes and Helm accept, and agree with each other and the server."""

import json
import re
import tomllib
from pathlib import Path

import helm_python
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/aqt-server"
PLAIN = ROOT / "deploy/kubernetes/aqt-server.yaml"
KUBERNETES = ("1.30", kubernetes_validate.latest_version())


def rendered(**values):
    """What Helm makes of the chart, by kind."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values=values, name="aqt-server", namespace="default")
    documents = [d for text in files.values() for d in yaml.safe_load_all(text) if d]
    return {document["kind"]: document for document in documents}


def container(manifests):
    return manifests["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def configuration(manifests):
    return tomllib.loads(manifests["ConfigMap"]["data"]["aqt.toml"])


def loaded(name):
    return yaml.safe_load((ROOT / "deploy" / name).read_text())


def test_helm_finds_nothing_to_say():
    found = helm_python.lint(CHART, strict=True)
    assert found["errors"] == []
    assert [m["error"] for m in found["messages"]] == ["icon is recommended"]


def test_the_plain_manifests_are_what_the_chart_renders():
    """`make manifests` writes them."""
    documents = list(yaml.safe_load_all(PLAIN.read_text()))
    assert {document["kind"]: document for document in documents} == rendered()


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"autoscaling": {"enabled": False}, "networkPolicy": {"enabled": False}},
        {"nodeSelector": {"pool": "gpu"}, "tolerations": [{"operator": "Exists"}]},
    ],
    ids=json.dumps,
)
def test_kubernetes_accepts_them(version, values):
    manifests = rendered(**values)
    kinds = {"ConfigMap", "Deployment", "PodDisruptionBudget", "Service"}
    kinds |= {"HorizontalPodAutoscaler", "NetworkPolicy"} if "autoscaling" not in values else set()
    assert manifests.keys() == kinds
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, version, strict=True)


def test_a_wrong_manifest_is_refused():
    manifest = rendered()["Deployment"]
    manifest["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("drain", [0, 30, 300])
def test_a_pod_is_given_longer_than_the_server_takes_to_stop(drain):
    manifests = rendered(drainSeconds=drain)
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    stopping = drain + container(manifests)["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert configuration(manifests)["batching"]["drain_s"] == drain
    assert pod["terminationGracePeriodSeconds"] > stopping
    alive = container(manifests)["livenessProbe"]
    assert alive["periodSeconds"] * (alive["failureThreshold"] - 1) > stopping


def test_settings_keep_their_types():
    settings = {
        "batching": {"queue_rows": 1_000_000},
        "models": {"load_model": ["a"], "poll_s": 0.5, "allow_inexact": True},
    }
    found = configuration(rendered(settings=settings))
    assert found["batching"] == {"queue_rows": 1_000_000, "drain_s": 30}
    assert found["models"] == settings["models"]


def test_it_runs_without_rights_on_a_read_only_root():
    pod = rendered()["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    for found in (
        container(rendered()),
        *loaded("kserve/serving-runtime.yaml")["spec"]["containers"],
    ):
        context = found["securityContext"]
        assert context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"/var/cache/aqt", "/tmp"} <= {m["mountPath"] for m in found["volumeMounts"]}


def test_everything_selects_the_pods_of_the_deployment():
    manifests = rendered()
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        manifests["Service"]["spec"]["selector"],
    ]
    assert all(selector == labels for selector in selectors)


def test_ports_and_user_are_those_of_the_image():
    image = (ROOT / "Dockerfile").read_text()
    exposed = re.search(r"^EXPOSE (.*)$", image, re.MULTILINE)[1].split()
    assert [str(p["containerPort"]) for p in container(rendered())["ports"]] == exposed
    user = rendered()["Deployment"]["spec"]["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"USER {user}:" in image


def test_the_autoscaler_reads_a_metric_of_the_server_through_the_adapter():
    (metric,) = rendered()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    (rule,) = loaded("kubernetes/prometheus-adapter.yaml")["rules"]["custom"]
    assert rule["seriesQuery"].startswith(name + "{")
    told = (ROOT / "server/aqt_server/metrics.py").read_text()
    assert f'"{name.removeprefix("aqt_")}": (' in told


def test_a_serving_runtime_of_kserve_holds_a_pod_that_kubernetes_accepts():
    """The rest of it, and the InferenceService, only KServe's own schema knows."""
    runtime = loaded("kserve/serving-runtime.yaml")["spec"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "runtime", "annotations": runtime["annotations"]},
        "spec": {"containers": runtime["containers"], "volumes": runtime["volumes"]},
    }
    kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)
    service = loaded("kserve/inference-service.yaml")["spec"]["predictor"]
    assert service["model"]["runtime"] == loaded("kserve/serving-runtime.yaml")["metadata"]["name"]
    (served,) = runtime["supportedModelFormats"]
    assert service["model"]["modelFormat"] == {k: served[k] for k in ("name", "version")}
