# The serving image, with a target for each kind of device: cpu, cuda, tpu. How it is built and run
# stands in docs/deployment.md.
#
#     docker build --target cpu -t aqt:cpu .
#     docker run --read-only --tmpfs /tmp -v aqt-cache:/var/cache/aqt -v ./models:/models:ro \
#         -p 8000-8002:8000-8002 aqt:cpu

# Any Debian with Python 3.11. Give it with its digest to build the same image again.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS pip
# Where an index or its certificate has to be told, give pip's own file as the secret `pip`.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
# Nothing of this stage is in the image.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/aqt
COPY deploy/image/install-packages.sh ./

# The targets differ in what is installed here.
FROM pip AS cpu-packages
COPY requirements-serve.txt requirements.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf /build/install-packages.sh requirements.txt

FROM pip AS cuda-packages
COPY requirements-cuda.txt requirements.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf /build/install-packages.sh requirements.txt

FROM pip AS tpu-packages
COPY requirements-tpu.txt requirements.txt
RUN --mount=type=secret,id=pip,target=/etc/pip.conf /build/install-packages.sh requirements.txt

FROM pip AS wheel
# What the fast door and the int8 kernel are compiled with; the kernel needs jaxlib's headers too.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ libnghttp2-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY requirements-build.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pip/bin/pip install --require-hashes -r requirements-build.txt
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY aqt_engine aqt_engine
COPY cli cli
COPY clients clients
COPY protos protos
COPY server server
RUN --mount=type=bind,from=cpu-packages,source=/opt/aqt/lib,target=/mnt \
    PYTHONPATH="$(echo /mnt/python3.*/site-packages)" /opt/pip/bin/pip wheel \
        --no-deps --no-build-isolation --wheel-dir /wheels . ./protos ./clients/python ./server \
    && /opt/pip/bin/pip --python /opt/aqt/bin/python install --no-deps /wheels/*.whl

FROM ${BASE} AS server
# In /var/cache/aqt are the compiled executables, and copies of bundles from object stores.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends libnghttp2-14 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/* \
    && groupadd --gid 10001 aqt \
    && useradd --uid 10001 --gid aqt --no-log-init --no-create-home --home-dir /nonexistent aqt \
    && install -d /models && install -d -o aqt -g aqt /var/cache/aqt
ENV PATH=/opt/aqt/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    AQT_HOST=0.0.0.0 \
    AQT_HTTP_PORT=8000 \
    AQT_MODEL_REPOSITORY=/models \
    AQT_COMPILATION_CACHE=/var/cache/aqt/compiled \
    AQT_BUNDLE_CACHE=/var/cache/aqt/bundles
USER 10001:10001
VOLUME /var/cache/aqt
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s CMD ["aqt", "health"]
ENTRYPOINT ["aqt", "serve"]

FROM server AS cuda
COPY --from=cuda-packages /opt/aqt /opt/aqt
COPY --from=wheel /opt/aqt /opt/aqt

FROM server AS tpu
COPY --from=tpu-packages /opt/aqt /opt/aqt
COPY --from=wheel /opt/aqt /opt/aqt

FROM server AS cpu
COPY --from=cpu-packages /opt/aqt /opt/aqt
COPY --from=wheel /opt/aqt /opt/aqt
