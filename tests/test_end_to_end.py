"""The main job: train, convert by command, serve, and ask with two kinds of clients at once."""

import concurrent.futures
import functools
import json

import jax
import numpy as np
import pytest
import tritonclient.grpc as stock

import forked
from aqt_client import Client
from aqt_engine import QuantMode
from bundles import write_linear
from compiled import in_haste
from engine.contractions import assert_same_bits
from examples.digits.demo import training_forward
from examples.digits.model import int8_model
from examples.digits.train import split_digits, train
from examples.pipeline import save
from server_process import WAIT_S, serving

pytestmark = pytest.mark.slow


# Wide enough that tables do not fold the names that are looked for.
aqt = functools.partial(forked.aqt, COLUMNS="200")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Trained variables, held-out images, and the repository with the converted model."""
    root = tmp_path_factory.mktemp("digits")
    training, held_out = split_digits()
    model = int8_model(QuantMode.TRAIN)
    with in_haste():
        variables = train(model, training, epochs=2, on_epoch=lambda loss: None)
    save(variables, root / "checkpoint")
    np.savez(root / "example.npz", image=training.images[:100])
    result = aqt(
        *("convert", "--model", "examples.digits.model:int8_model", "--json", "--tile", "16"),
        *("--checkpoint", root / "checkpoint", "--example", root / "example.npz"),
        *("--output", root / "repository" / "digits" / "1"),
    )
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["bundle_bytes"] < summary["float_bytes"] / 3
    return variables, held_out.images, root


@pytest.fixture(scope="module")
def server(digits, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(digits[2] / "repository", log=log) as running:
        yield running


def test_no_held_out_digit_differs_in_any_bit(digits, server):
    variables, images, _ = digits
    expected = training_forward(variables, images, tile=16)

    def ours(seed):
        with Client(server.address) as client:
            for pick in picks(seed):
                result = client.infer("digits", {"image": images[pick]})
                assert result.exact
                check(result.outputs, pick)

    def theirs(seed):
        with stock.InferenceServerClient(server.address) as client:
            for pick in picks(seed):
                tensor = stock.InferInput("image", [len(pick), 8, 8], "FP32")
                tensor.set_data_from_numpy(images[pick])
                result = client.infer("digits", [tensor])
                check({name: result.as_numpy(name) for name in expected}, pick)

    def picks(seed):
        """Every image once, in random order, in batches of random sizes."""
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(images))
        return np.split(order, np.sort(rng.integers(1, len(images), 40)))

    def check(found, pick):
        for name, array in expected.items():
            assert_same_bits(found[name], array[pick])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(client, seed) for seed in range(4) for client in (ours, theirs)]
        for job in jobs:
            job.result(WAIT_S)


def test_plain_batching_would_not_be_exact(digits):
    # What the tile is for: without it the same forward gives other bits, so the test above can
    # fail.
    variables, images, _ = digits
    whole = jax.jit(int8_model(QuantMode.TRAIN).apply)(variables, images)["logits"]
    tiled = training_forward(variables, images, tile=16)["logits"]
    assert (np.asarray(whole).view(np.uint32) != tiled.view(np.uint32)).any()


def test_inspect_verify_and_predict_read_well_and_as_json(digits, server, tmp_path):
    _, images, root = digits
    path = root / "repository" / "digits" / "1"
    assert "AqtEinsum_0" in aqt("inspect", path).stdout
    document = json.loads(aqt("inspect", path, "--json").stdout)
    quantized = [layer for layer in document["layers"] if layer["quantized"]]
    assert len(quantized) == 8
    assert {layer["dtype"] for layer in quantized} == {"int8"}
    # No float copy: no float weight has the shape of a quantized one.
    shapes = {tuple(layer["shape"]) for layer in quantized}
    assert not [x for x in document["layers"] if not x["quantized"] and tuple(x["shape"]) in shapes]

    verified = aqt("verify", path, "--json")
    assert verified.returncode == 0
    assert json.loads(verified.stdout)["exact"]

    np.savez(tmp_path / "one.npz", image=images[:3])
    arguments = ("predict", "digits", "--inputs", tmp_path / "one.npz", "--server", server.address)
    shown = aqt(*arguments)
    assert shown.returncode == 0, shown.stderr
    assert "logits" in shown.stdout
    assert json.loads(aqt(*arguments, "--json").stdout)["exact"] is True


def test_verify_says_what_differs(tmp_path):
    write_linear(tmp_path / "right" / "1")
    write_linear(tmp_path / "wrong" / "1", wrong_witness=True)
    assert "answers here what was trained" in aqt("verify", tmp_path / "right" / "1").stdout
    result = aqt("verify", tmp_path / "wrong" / "1")
    assert result.returncode == 1
    assert "not exact" in result.stdout
    result = aqt("verify", tmp_path / "nowhere")
    assert result.returncode == 1
    assert "is not a bundle" in result.stderr
    assert "Traceback" not in result.stderr
