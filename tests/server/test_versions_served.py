"""Version policies, aliases and splits of a real server; swaps and rollbacks under load."""

import concurrent.futures
import shutil
import threading

import numpy as np
import pytest
import tritonclient.grpc as stock

import forked
from aqt_client import Client, ClientError, RetryPolicy
from bundles import reference, write_linear
from engine.contractions import assert_same_bits
from server.messages import MODEL, raises_status, stock_input, x_of
from server.test_model_control import damage, index
from server.test_statistics import scrape
from server_process import WAIT_S, eventually, serving

pytestmark = pytest.mark.slow

X = x_of(5)
NEW_S = "0.1"


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "repository"
    for version in (1, 2, 3):
        write_linear(root / MODEL / str(version), seed=version)
    return root


def with_policies(root, tmp_path, text, *flags):
    (tmp_path / "policies.toml").write_text(text)
    file = str(tmp_path / "policies.toml")
    return serving(root, "--model-policies", file, "--poll-s", NEW_S, *flags, log=tmp_path / "log")


def states(client, name=MODEL):
    return {int(v): state for (n, v), (state, _) in index(client).items() if n == name}


def test_policies_say_which_versions_are_served(root, tmp_path):
    shutil.copytree(root / MODEL, root / "other")
    shutil.copytree(root / MODEL, root / "third")
    text = '["*"]\nversions = {latest = 1}\n[other]\nversions = [1, 2]\n[third]\nversions = "all"\n'
    with (
        with_policies(root, tmp_path, text) as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        ready, not_ready = "READY", "UNAVAILABLE"
        assert states(client) == {1: not_ready, 2: not_ready, 3: ready}
        assert states(client, "other") == {1: ready, 2: ready, 3: not_ready}
        assert states(client, "third") == {1: ready, 2: ready, 3: ready}
        assert index(client)[MODEL, "1"][1] == "left out by the model's policy"
        latest = client.get_model_config(MODEL).config.version_policy
        assert latest.latest.num_versions == 1
        specific = client.get_model_config("other").config.version_policy
        assert list(specific.specific.versions) == [1, 2]
        assert client.get_model_config("third").config.version_policy.HasField("all")
        # Another policy, without a restart.
        (tmp_path / "policies.toml").write_text(f"[{MODEL}]\nversions = [1]\n")
        eventually(lambda: states(client) == {1: ready, 2: not_ready, 3: not_ready})
        assert_same_bits(
            client.infer(MODEL, [stock_input(X)]).as_numpy("y"), reference(root / MODEL / "1", X)
        )


def test_aliases_name_versions_and_a_split_shares_requests_out(root, tmp_path):
    text = f"[{MODEL}]\naliases = {{stable = 1, canary = 2}}\nsplit = {{stable = 1, canary = 1}}\n"
    expected = {str(v): reference(root / MODEL / str(v), X) for v in (1, 2, 3)}

    def answer(**arguments):
        response = client.infer(MODEL, [stock_input(X)], **arguments)
        version = response.get_response().model_version
        assert_same_bits(response.as_numpy("y"), expected[version])
        return version

    with (
        with_policies(root, tmp_path, text) as server,
        stock.InferenceServerClient(server.address) as client,
    ):
        assert answer(model_version="stable") == "1"
        assert answer(model_version="canary") == "2"
        assert answer(model_version="3") == "3"
        assert client.is_model_ready(MODEL, "canary")
        (counted,) = client.get_inference_statistics(MODEL, "canary").model_stats
        assert (counted.version, counted.inference_stats.success.count) == ("2", 1)
        with raises_status("NOT_FOUND", r"'beta': it has 1, 2, 3, stable \(1\), canary \(2\)"):
            answer(model_version="beta")
        ids = [f"id-{i}" for i in range(20)]
        shares = [answer(request_id=i) for i in ids]
        assert set(shares) == {"1", "2"}
        assert [answer(request_id=i) for i in ids] == shares
        # 2**-29 that one of them is not drawn.
        assert {answer() for _ in range(30)} == {"1", "2"}

        (tmp_path / "policies.toml").write_text(f"[{MODEL}]\naliases = {{stable = 3}}\n")
        eventually(lambda: answer(model_version="stable") == "3")
        assert answer() == "3"


class Load:
    """Clients that ask without a pause, none of which tries again; all that they were answered."""

    def __init__(self, server, expected):
        self.versions = set()
        self.failures = []
        self.wrong = 0
        self.answered = 0
        self._expected = expected
        self._server = server
        self._stop = threading.Event()

    def __enter__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(3)
        self._clients = [self._pool.submit(self._ask) for _ in range(3)]
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._pool.shutdown()
        for client in self._clients:
            client.result()

    def _ask(self):
        with Client(self._server.address, retry=RetryPolicy(max_attempts=1)) as client:
            while not self._stop.is_set():
                try:
                    response = client.infer(MODEL, {"x": X})
                except ClientError as error:
                    self.failures.append(error)
                    continue
                wanted = self._expected[response.model_version]
                self.wrong += int((response["y"].view(np.uint32) != wanted.view(np.uint32)).sum())
                self.answered += 1
                self.versions.add(response.model_version)


def test_a_swap_under_load_fails_no_request(root, tmp_path):
    shutil.move(root / MODEL, tmp_path / "made")
    expected = {v: reference(tmp_path / "made" / v, X) for v in "123"}
    for version in "12":
        shutil.copytree(tmp_path / "made" / version, root / "staged" / version)
    shutil.move(root / "staged" / "1", root / MODEL / "1")
    text = f"[{MODEL}]\nversions = {{latest = 1}}\n"
    with (
        with_policies(root, tmp_path, text) as server,
        stock.InferenceServerClient(server.address) as client,
        Load(server, expected) as load,
    ):
        eventually(lambda: load.answered > 20)
        shutil.move(root / "staged" / "2", root / MODEL / "2")
        eventually(lambda: states(client) == {1: "UNAVAILABLE", 2: "READY"})
        # Renamed in one look of the server: one goes and another comes.
        shutil.copytree(tmp_path / "made" / "3", root / "staged" / "3")
        (root / MODEL / "2").rename(root / "staged" / "2")
        (root / "staged" / "3").rename(root / MODEL / "3")
        eventually(lambda: "3" in load.versions)
        before = load.answered
        eventually(lambda: load.answered > before + 20)
    assert (load.failures, load.wrong) == ([], 0)
    assert load.versions == {"1", "2", "3"}
    assert load.answered > 40


def test_a_version_that_is_refused_leaves_the_old_one_serving_and_does_not_flap(root, tmp_path):
    expected = {v: reference(root / MODEL / v, X) for v in "123"}
    text = f"[{MODEL}]\nversions = {{latest = 1}}\n"
    with (
        with_policies(root, tmp_path, text) as server,
        stock.InferenceServerClient(server.address) as client,
        Load(server, expected) as load,
    ):
        write_linear(root / MODEL / "4", wrong_witness=True)
        eventually(lambda: "1 ulp" in index(client).get((MODEL, "4"), ("", ""))[1])
        write_linear(tmp_path / "made" / "5")
        damage(tmp_path / "made" / "5")
        shutil.move(tmp_path / "made" / "5", root / MODEL / "5")
        eventually(lambda: "has other content" in index(client).get((MODEL, "5"), ("", ""))[1])
        # Another model that comes shows that the directory was looked at again and again.
        for name in ("later", "latest"):
            write_linear(root / name / "1")
            eventually(lambda name=name: client.is_model_ready(name))
        assert states(client) == {
            1: "UNAVAILABLE",
            2: "UNAVAILABLE",
            3: "READY",
            4: "UNAVAILABLE",
            5: "UNAVAILABLE",
        }
        samples = scrape(server)
        counts = {
            dict(labels)["outcome"]: value
            for (name, *labels), value in samples.items()
            if name == "aqt_model_loads_total" and dict(labels)["model"] == MODEL
        }
        assert counts == {"ready": 1, "inexact": 1, "damaged": 1}
        before = load.answered
        eventually(lambda: load.answered > before + 20)
    assert (load.failures, load.wrong, load.versions) == ([], 0, {"3"})
    # After a restart too, the newest that can be served is.
    with (
        with_policies(root, tmp_path, text) as server,
        Client(server.address, timeout_s=WAIT_S) as client,
    ):
        assert client.infer(MODEL, {"x": X}).model_version == "3"


def test_a_file_that_cannot_be_used_ends_the_start(root, tmp_path):
    file = tmp_path / "policies.toml"
    file.write_text(f"[{MODEL}]\nsplit = {{stable = 1}}\n")
    result = forked.aqt("serve", "--model-repository", root, "--model-policies", file)
    assert result.returncode != 0
    assert "split has 'stable', which is no alias and no version" in result.stderr
    assert "Traceback" not in result.stderr
