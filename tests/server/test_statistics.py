"""ModelStatistics, ModelConfig and the metrics endpoint, which have to tell the same story."""

import urllib.request

import grpc
import pytest
import tritonclient.grpc as stock
from prometheus_client.parser import text_string_to_metric_families

from aqt_protos import open_inference_pb2_grpc as pb_grpc
from bundles import TILE, write_linear
from server.messages import MODEL, raises_status, request_of, stock_input, x_of
from server_process import WAIT_S, serving

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path):
    write_linear(tmp_path / "repository" / MODEL / "1")
    write_linear(tmp_path / "repository" / MODEL / "2", seed=2)
    return tmp_path / "repository"


def scrape(server):
    with urllib.request.urlopen(server.metrics_url, timeout=WAIT_S) as response:
        text = response.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        assert family.type != "unknown"
        assert family.documentation
        for sample in family.samples:
            samples[sample.name, *sorted(sample.labels.items())] = sample.value
    return samples


def of(samples, name, version="1", **labels):
    labels = {"model": MODEL, "version": version, **labels}
    return samples[f"aqt_{name}", *sorted(labels.items())]


def test_requests_rows_and_durations_are_counted(root, tmp_path):
    with (
        serving(root, log=tmp_path / "log") as server,
        stock.InferenceServerClient(server.address) as client,
        grpc.insecure_channel(server.address) as channel,
    ):
        (before,) = client.get_inference_statistics(MODEL, "1").model_stats
        assert (before.last_inference, before.inference_count, before.execution_count) == (0, 0, 0)
        assert not before.batch_stats
        for rows in (1, 4, 5, 5, 70, 100):
            client.infer(MODEL, [stock_input(x_of(rows))], model_version="1")
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        for _ in range(2):
            request = request_of(x_of(1), model_version="1")
            request.inputs[0].datatype = "FP64"
            with raises_status("INVALID_ARGUMENT", "FP64"):
                stub.ModelInfer(request)
        with raises_status("NOT_FOUND", "nope"):
            client.infer("nope", [stock_input(x_of(1))])

        (found,) = client.get_inference_statistics(MODEL, "1").model_stats
        assert (found.name, found.version) == (MODEL, "1")
        assert (found.inference_count, found.execution_count) == (185, 6)
        assert {b.batch_size: b.compute_infer.count for b in found.batch_stats} == {
            **{1: 1, 4: 1, 5: 2, 70: 1, 100: 1}
        }
        stats = found.inference_stats
        assert (stats.success.count, stats.fail.count, stats.queue.count) == (6, 2, 6)
        parts = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
        assert 0 < sum(part.ns for part in parts) <= stats.success.ns
        assert stats.compute_infer.ns == sum(b.compute_infer.ns for b in found.batch_stats)
        assert found.last_inference > 1_700_000_000_000
        assert found.memory_usage[0].byte_size == 6 * 4 + 4 * 4 + 4 * 4
        (untouched,) = client.get_inference_statistics(MODEL, "2").model_stats
        assert untouched.inference_count == 0
        every = [(m.name, m.version) for m in client.get_inference_statistics().model_stats]
        assert every == [(MODEL, "1"), (MODEL, "2")]
        with raises_status("NOT_FOUND", "no model 'nope'"):
            client.get_inference_statistics("nope")
        with raises_status("NOT_FOUND", "no version '3'"):
            client.get_inference_statistics(MODEL, "3")

        samples = scrape(server)
        assert of(samples, "inference_request_success_total") == 6
        assert of(samples, "inference_request_failure_total", reason="OTHER") == 2
        assert of(samples, "inference_request_failure_total", reason="REJECTED") == 0
        assert of(samples, "inference_count_total") == 185
        assert of(samples, "inference_exec_count_total") == 6
        for name, duration in {
            "request": stats.success,
            "queue": stats.queue,
            "compute_input": stats.compute_input,
            "compute_infer": stats.compute_infer,
            "compute_output": stats.compute_output,
        }.items():
            us = of(samples, f"inference_{name}_duration_us_total")
            assert us == pytest.approx(duration.ns / 1000)
        assert of(samples, "inference_request_success_total", version="2") == 0
        buckets = {"4.0": 2, "8.0": 4, "32.0": 4, "64.0": 4, "+Inf": 6}
        for limit, count in buckets.items():
            assert of(samples, "inference_batch_rows_bucket", le=limit) == count
        assert of(samples, "inference_batch_rows_sum") == 185
        assert of(samples, "inference_pending_request_count") == 0
        assert of(samples, "inference_pending_row_count") == 0
        assert of(samples, "model_weight_bytes") == 56


def test_exactness_states_and_the_compilation_cache_are_told(root, tmp_path):
    write_linear(root / "wrong" / "1", wrong_witness=True)
    cache = str(tmp_path / "cache")
    flags = ("--allow-inexact", "--compilation-cache", cache)
    with serving(root, *flags, log=tmp_path / "log") as server:
        samples = scrape(server)
        assert of(samples, "model_exact") == 1
        assert samples["aqt_model_exact", ("model", "wrong"), ("version", "1")] == 0
        assert samples["aqt_model_versions", ("state", "READY")] == 3
        cold = samples["aqt_compilation_cache_misses_total",]
        assert cold > 0
    with serving(root, "--compilation-cache", cache, log=tmp_path / "log") as server:
        samples = scrape(server)
        assert samples["aqt_model_versions", ("state", "READY")] == 2
        assert samples["aqt_model_versions", ("state", "UNAVAILABLE")] == 1
        assert ("aqt_model_exact", ("model", "wrong"), ("version", "1")) not in samples
        assert samples["aqt_compilation_cache_misses_total",] == 0
        assert samples["aqt_compilation_cache_hits_total",] > 0
        assert samples["process_resident_memory_bytes",] > 0


def test_configuration(root, tmp_path):
    with (
        serving(root, "--max-batch-rows", "30", log=tmp_path / "log") as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        config = client.get_model_config(MODEL, "1").config
        assert (config.name, config.platform, config.max_batch_size) == (MODEL, "aqt_stablehlo", 32)
        (x,), (y,) = config.input, config.output
        assert (x.name, x.data_type, list(x.dims)) == ("x", 11, [6])
        assert (y.name, y.data_type, list(y.dims)) == ("y", 11, [4])
        batching = config.dynamic_batching
        assert list(batching.preferred_batch_size) == [4, 8, 16, 32]
        assert (batching.priority_levels, batching.default_priority_level) == (10, 5)
        assert config.parameters["aqt_exact"].string_value == "true"
        assert config.parameters["aqt_tile"].string_value == str(TILE)
        assert config.instance_group[0].count == 1
        assert not config.model_transaction_policy.decoupled
        with raises_status("NOT_FOUND", "no model 'nope'"):
            client.get_model_config("nope")


def test_metrics_go_where_the_flag_says(root, tmp_path):
    with serving(root, log=tmp_path / "log", ready=False) as server:
        port = server.metrics_url.split(":")[2].split("/")[0]
        assert server.metrics_url == f"http://127.0.0.1:{port}/metrics"
        # Scraped at once, before anything is loaded.
        assert scrape(server)["aqt_compilation_cache_hits_total",] >= 0
