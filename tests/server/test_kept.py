"""What was proved is not made again, unless anything that decides about its bits is another."""

import asyncio
import dataclasses
import itertools
import secrets
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from aqt_engine import bundle, calling_thread, pieces
from aqt_engine.execution import Mode, Program, tile_buckets
from aqt_engine.restoration import NotRestoredError
from aqt_server import executor, kept, repository
from aqt_server.compiled import Entries, given, keep_in
from aqt_server.entry import State
from aqt_server.errors import NotServable
from aqt_server.loader import Outcome
from aqt_server.memory import Memory
from aqt_server.policies import Policies
from aqt_server.settings import Models, Settings
from aqt_server.source import open_source
from bundles import FEATURES, write_linear
from compiled import shared_cache
from engine.contractions import assert_same_bits
from server_process import WAIT_S

EARLIER = "at an earlier start"
SEEDS = itertools.count(secrets.randbits(48))


@pytest.fixture(scope="module", autouse=True)
def a_cache_of_ones_own(tmp_path_factory):
    """What this process keeps: another that runs these tests would damage the same executables."""
    compilation_cache.reset_cache()
    keep_in(tmp_path_factory.mktemp("kept"))
    yield
    compilation_cache.reset_cache()
    keep_in(Path(shared_cache()))


def cache():
    return Path(jax.config.jax_compilation_cache_dir)


@pytest.fixture
def records():
    return kept.Records(cache())


@pytest.fixture
def path(tmp_path):
    """Of a bundle that nothing is kept of."""
    path = tmp_path / "linear" / "1"
    write_linear(path, seed=next(SEEDS))
    return path


def load(path, records, *, proof_s=0.0, rows=12):
    return executor.load(
        path,
        max_batch_rows=rows,
        allow_inexact=False,
        mode=Mode.EXACT,
        proof_s=proof_s,
        memory=Memory(limit=None, held=0, available=lambda: 2**40),
        records=records,
    )


def of(path, rows=12):
    loaded = bundle.load(path)
    return kept.identity(loaded.manifest, tile_buckets(rows, loaded.manifest.tile))


def restored(path, records, **arguments):
    found = load(path, records, **arguments)
    assert found.exact
    return found.verdict.endswith(EARLIER)


def refused(*_, **__):
    raise AssertionError("this was to be taken as it was kept")


@pytest.mark.parametrize("alone_nbytes", [pieces.ALONE_NBYTES, 0])
def test_a_restart_compiles_nothing_and_gives_the_same_bits(
    path, records, monkeypatch, alone_nbytes
):
    """What was cut into pieces is cut so again."""
    monkeypatch.setattr(pieces, "ALONE_NBYTES", alone_nbytes)
    first = load(path, records)
    x = np.random.default_rng(0).normal(size=(40, FEATURES)).astype(np.float32)
    expected = {rows: first.executor({"x": x[:rows]})["y"] for rows in (1, 2, 5, 9, 40)}
    with monkeypatch.context() as patched:
        patched.setattr(Program, "compile", refused)
        patched.setattr(bundle, "_load_graphs", refused)
        patched.setattr(executor.Executor, "prove", refused)
        second = load(path, records)
        assert second.verdict == f"{first.verdict}, {EARLIER}"
        assert second.executor.workspace_nbytes == first.executor.workspace_nbytes
        assert second.executor.kernel == first.executor.kernel
        for rows, right in expected.items():
            assert_same_bits(second.executor({"x": x[:rows]})["y"], right)
        assert second.executor.cuts == first.executor.cuts
        weights = second.executor._program._weights[()]
        assert {w.device for w in weights} == {calling_thread.device()}
        assert all(bool(cut.alone) == bool(alone_nbytes) for cut in second.executor.cuts.values())
        replayed = second.replay()
    assert (replayed.passed, replayed.failed) == (5, ())
    assert first.replay is None


def another_bundle(path, records, monkeypatch):
    other = path.parent / "2"
    write_linear(other, seed=next(SEEDS))
    record = records.find(of(path), proof_s=0)
    # Under the name that the other's would have.
    Entries(cache()).put(f"proved-{of(other)}", kept._FORM_OF_RECORD.dump_json(record))
    return other


def another_executable(path, records, monkeypatch):
    record = records.find(of(path), proof_s=0)
    first, *others = record.executables
    wrong = dataclasses.replace(first, sha256="0" * 64)
    records.keep(dataclasses.replace(record, executables=(wrong, *others)))


def an_executable_less(path, records, monkeypatch):
    record = records.find(of(path), proof_s=0)
    records.keep(dataclasses.replace(record, executables=record.executables[1:]))


def a_damaged_record(path, records, monkeypatch):
    (file,) = cache().glob(f"proved-{of(path)}*")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def a_record_of_another_form(path, records, monkeypatch):
    Entries(cache()).put(f"proved-{of(path)}", b'{"of": 1}')


def another_processor(path, records, monkeypatch):
    monkeypatch.setattr(kept, "_processor", lambda _: ["flags: sse2"])


def another_version_of_jax(path, records, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.0.1")


def other_flags(path, records, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")


def other_code(path, records, monkeypatch):
    monkeypatch.setattr(kept, "_CODE", ("*.py",))


def a_wrong_answer(path, records, monkeypatch):
    right, calls = Program.__call__, itertools.count()

    def wrong_once(self, inputs):
        found = right(self, inputs)
        return found if next(calls) else {k: np.nextafter(v, np.inf) for k, v in found.items()}

    monkeypatch.setattr(Program, "__call__", wrong_once)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        another_bundle,
        another_executable,
        an_executable_less,
        a_damaged_record,
        a_record_of_another_form,
        another_processor,
        another_version_of_jax,
        other_flags,
        other_code,
        a_wrong_answer,
    ],
)
def test_what_is_not_the_same_is_compiled_and_proved_anew(path, records, monkeypatch, change):
    load(path, records)
    assert restored(path, records)
    kept._here.cache_clear()
    try:
        changed = change(path, records, monkeypatch) or path
        assert not restored(changed, records)
        # And kept, as it is now.
        assert restored(changed, records)
    finally:
        kept._here.cache_clear()


@pytest.mark.slow
def test_other_buckets_or_a_longer_proof_are_not_what_was_proved(path, records):
    load(path, records)
    assert not restored(path, records, rows=40)
    assert not restored(path, records, proof_s=WAIT_S)
    # That one was whole.
    assert restored(path, records, proof_s=2 * WAIT_S)


@pytest.mark.slow
def test_nothing_is_kept_of_what_is_not_exact_or_where_processors_cannot_be_told(
    tmp_path, path, records, monkeypatch
):
    write_linear(tmp_path / "wrong", seed=next(SEEDS), wrong_witness=True)
    for _ in range(2):
        with pytest.raises(executor.InexactError):
            load(tmp_path / "wrong", records)
    assert records.find(of(tmp_path / "wrong"), proof_s=0) is None
    monkeypatch.setattr(kept, "_here", dict)
    assert not restored(path, records)
    assert not restored(path, records)


def test_a_stand_in_is_never_taken_for_an_executable(path):
    loaded = bundle.load(path)
    program = Program(loaded, max_rows=8, packed={(): {}}, cuts={(): pieces.whole((1,))})
    with (
        given(b"no executable"),
        pytest.warns(match="Error reading persistent compilation cache"),
        pytest.raises(NotRestoredError, match="stand_in"),
    ):
        program.restore(1)


def test_a_version_that_is_not_exact_any_more_answers_nothing(path, records, monkeypatch):
    load(path, records, rows=64)
    right = executor.Executor.replay

    def wrong_at_last(self, loaded, *, most=None):
        found = right(self, loaded, most=most)
        return found if most else dataclasses.replace(found, failed=("with the first rows, no",))

    monkeypatch.setattr(executor.Executor, "replay", wrong_at_last)
    monkeypatch.setattr(repository, "REPLAY_AFTER_S", 0)
    root = str(path.parent.parent)
    settings = Settings(models=Models(model_repository=root, proof_s=0,
                                      compilation_cache=cache()))  # fmt: skip

    async def states_of():
        served = repository.Repository(settings, open_source(root, tmp), Policies(None))
        ready = asyncio.Event()
        states = []

        async def settled():
            states.append(served.known()[0].state)
            ready.set()

        watching = asyncio.create_task(served.watch(settled))
        await asyncio.wait_for(ready.wait(), WAIT_S)
        async with asyncio.timeout(WAIT_S):
            while not served.loads["linear", Outcome.INEXACT]:
                await asyncio.sleep(0.01)
        with pytest.raises(NotServable, match="was exact at an earlier start and is not now"):
            served.get("linear", "")
        states.append(served.known()[0].state)
        watching.cancel()
        assert await served.close()
        return states

    tmp = path.parent.parent
    assert asyncio.run(states_of()) == [State.READY, State.UNAVAILABLE]
    assert records.find(of(path, rows=64), proof_s=0) is None
