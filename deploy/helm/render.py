"""Writes what Helm renders of the chart, with its default values, to deploy/kubernetes."""

from pathlib import Path

import helm_python

DEPLOY = Path(__file__).parents[1]
TARGET = DEPLOY / "kubernetes/aqt-server.yaml"
HEAD = "# Rendered from deploy/helm/aqt-server with its default values: `make manifests`.\n"


def main() -> None:
    with helm_python.Chart.load(DEPLOY / "helm/aqt-server") as chart:
        files = chart.render(name="aqt-server", namespace="default")
    documents = [text.strip() for _, text in sorted(files.items()) if text.strip()]
    TARGET.write_text(HEAD + "---\n".join(f"{text}\n" for text in documents))


if __name__ == "__main__":
    main()
