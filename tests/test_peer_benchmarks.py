"""Peers are told what to prepare, checked, timed in turns, and held against the marks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import memory
from benchmarks.compiled import bytes_accessed
from benchmarks.mortal import mortal
from benchmarks.peers import environments, layers, report, rounds
from benchmarks.peers.process import Peer, PeerError, Seconds, started
from server_process import WAIT_S, eventually


def seconds(*elapsed):
    return [Seconds(each, 2 * each) for each in elapsed]


def test_ratios_are_those_of_each_round():
    # The machine was three times as slow in the second round.
    times = {"ours": seconds(1, 3, 1), "peer": seconds(2, 6, 2)}
    found = rounds.ratios(times, "ours")
    assert found["peer"]["ratio"] == found["peer"]["processor_ratio"] == 2
    assert found["peer"]["quartiles"] == [2, 2]
    assert found["ours"]["ratio"] == 1


def test_a_mark_tells_the_least_of_its_results(capsys):
    def result(rows, ratio):
        peer = {"ms": 1.0, "ratio": ratio, "quartiles": [ratio, ratio]}
        ours = {"ms": 1.0, "ratio": 1.0, "quartiles": [1.0, 1.0]}
        return {"case": {"rows": rows}, "peers": {"ours": ours, "peer": peer}}

    options = report.parser("layers", "", 2).parse_args(["--markdown"])
    marks = [
        report.Mark("fast", "peer", lambda case: True),
        report.Mark("fast at one row", "peer", lambda case: case["rows"] == 1),
        report.Mark("of nobody", "nobody", lambda case: True),
    ]
    foot = {"cpu": "x", "cores": 2, "instructions": [], "device": "cpu", "load_average_1min": 0}
    results = [result(1, 1.5), result(8, 0.5)]
    report.report(options, {"": results}, marks, {}, foot | {"jax": "1", "flax": "1"})
    told = capsys.readouterr().out
    assert "| fast            | 0.50 (0.50-0.50)        | rows 8 | missed: met at 1 of 2 |" in told
    assert "| fast at one row | 1.50 (1.50-1.50)        | rows 1 | met" in told
    assert "| of nobody       | not measured" in told


def test_every_environment_is_pinned_by_hash_and_names_no_index():
    names = {peer.environment for peer in layers.LAYERS if peer.environment}
    for name in (*names, "mlserver", "kserve", "triton"):
        locked = (environments.REQUIREMENTS / f"{name}.txt").read_text()
        assert "://" not in locked
        for package, version in environments.pins(name).items():
            assert f"\n{package}=={version} \\\n    --hash=" in f"\n{locked}"


def test_what_a_killed_benchmark_started_ends():
    program = (
        "import subprocess, time\n"
        "from benchmarks.mortal import mortal\n"
        "print(subprocess.Popen(mortal('sleep', '600')).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    with killed, killed.stdout as stream:
        child = Path("/proc", stream.readline().strip())
        assert child.exists()
        killed.kill()
    killed.wait(WAIT_S)
    eventually(lambda: not child.exists() or "State:\tZ" in (child / "status").read_text())


@pytest.mark.slow
def test_a_worker_computes_is_timed_and_tells_what_went_wrong(tmp_path):
    rng = np.random.default_rng(0)
    arrays = tmp_path / "layer.npz"
    x, w = (rng.integers(0, 127, (8, 8)).astype(np.int8) for _ in range(2))
    np.savez(arrays, xq=x, qvalue=w, x=x, w=w)
    peers = (Peer("XLA int8", "xla"),)
    with started(peers) as workers:
        found = layers.compare(workers, peers, "product", arrays, 4, rounds=2)
        assert found["XLA int8"]["ratio"] == 1
        assert len(found["XLA int8"]["seconds"]) == 2
        with pytest.raises(PeerError, match="xla: KeyError: 'no such thing'"):
            workers["XLA int8"].prepare("key", "no such thing", arrays)
        # It lives on.
        assert workers["XLA int8"].time("product XLA int8", 1).elapsed > 0


class Answering:
    """A worker that answers `times` what is right."""

    def __init__(self, times):
        self.times = times

    def prepare(self, key, what, arrays, *, rows):
        with np.load(arrays) as of:
            return self.times * (of["x"][:rows] @ of["w"])

    def time(self, key, calls):
        return Seconds(calls, calls)


def test_a_peer_that_is_wrong_is_left_out_and_said_so(tmp_path, capsys):
    rng = np.random.default_rng(0)
    arrays = tmp_path / "layer.npz"
    np.savez(arrays, xq=0, qvalue=0, x=rng.normal(size=(8, 4)), w=rng.normal(size=(4, 4)))
    ours, peer = Peer("ours", "ours"), Peer("peer", "peer")
    workers = {"ours": Answering(1.02), "peer": Answering(1.04)}
    assert list(layers.compare(workers, (ours, peer), "layer", arrays, 4, rounds=1)) == ["ours"]
    told = "peer is wrong by 4.00% in the layer of 4 rows"
    assert capsys.readouterr().err == f"{told}: left out\n"
    with pytest.raises(RuntimeError, match=told):
        layers.compare(workers, (peer, ours), "layer", arrays, 4, rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(384, 384), (384, 1536)])
def test_served_weights_are_read_in_int8_and_not_widened(shape):
    served, in_float = bytes_accessed(shape)
    assert served < 0.6 * in_float


@pytest.mark.slow
def test_the_peak_is_of_the_command_and_not_of_what_started_it(tmp_path, monkeypatch):
    held = np.ones(300_000_000, np.uint8)
    # It ends when it was looked at while it held them.
    holds = (
        "import pathlib, sys, time\n"
        "held, folder = bytearray(b'1' * int(sys.argv[1])), pathlib.Path(sys.argv[2])\n"
        "(folder / 'holds').touch()\n"
        "while not (folder / 'seen').exists():\n"
        "    time.sleep(0.001)\n"
    )
    look = memory._status

    def peak(size):
        folder = tmp_path / str(size)
        folder.mkdir()

        def seen(process):
            holds = (folder / "holds").exists()
            found = look(process)
            if holds:
                (folder / "seen").touch()
            return found

        monkeypatch.setattr(memory, "_status", seen)
        command = (sys.executable, "-c", holds, str(size), folder)
        return memory.peak(*mortal(*command))

    small, large = peak(1), peak(100_000_000)
    assert small.resident < held.nbytes
    assert 100_000_000 <= large.resident - small.resident < held.nbytes
    assert 100_000_000 <= large.anonymous - small.anonymous < held.nbytes
    assert large.anonymous < large.resident
