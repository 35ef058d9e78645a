# The serving image: `docker build -t aqt . && docker run -v ./models:/models -p 8000-8002:8000-8002 aqt`.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY requirements-serve.txt ./
RUN python3 -m venv /opt/aqt \
    && /opt/aqt/bin/pip install --no-cache-dir --require-hashes -r requirements-serve.txt
COPY pyproject.toml README.md LICENSE ./
COPY aqt_engine aqt_engine
COPY cli cli
COPY clients clients
COPY protos protos
COPY server server
RUN /opt/aqt/bin/pip install --no-cache-dir --no-deps . ./protos ./clients/python ./server

FROM ${BASE}
COPY --from=build /opt/aqt /opt/aqt
RUN useradd --system --create-home --uid 10001 aqt
USER aqt
ENV PATH=/opt/aqt/bin:$PATH \
    AQT_HOST=0.0.0.0 \
    AQT_HTTP_PORT=8000 \
    AQT_MODEL_REPOSITORY=/models
VOLUME /home/aqt/.cache
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
ENTRYPOINT ["aqt", "serve"]
