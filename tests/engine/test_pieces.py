"""A batch is cut into pieces that together hold it, and each is computed once."""

import threading
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from aqt_engine import bundle, pieces
from aqt_engine.execution import Program
from bundles import FEATURES, TILE, write_linear
from engine.contractions import assert_same_bits

WAIT_S = 60.0
NBYTES = st.one_of(st.floats(0, 2**32), st.just(float("inf")))
MOST_TILES, THREADS = st.integers(1, 300), st.integers(1, 70)


@hypothesis.given(NBYTES, MOST_TILES, THREADS, st.data())
def test_the_pieces_of_a_batch_hold_it_and_no_more_than_the_last_has_room(
    nbytes, most_tiles, threads, data
):
    cut = pieces.cut(nbytes, most_tiles, threads)
    tiles = data.draw(st.integers(1, most_tiles))
    found = cut.pieces(tiles)
    assert set(found) <= set(cut.sizes)
    assert sum(found[:-1]) < tiles <= sum(found)
    if sum(found) > tiles:
        # Only what is computed at once anyway is padded.
        assert found[-1] <= 2 * cut.alone
    if tiles <= cut.alone:
        assert len(found) == 1
    elif tiles >= 2 and threads >= 2:
        assert len(found) >= 2


@hypothesis.given(NBYTES, MOST_TILES, THREADS)
def test_batches_of_powers_of_two_need_every_executable(nbytes, most_tiles, threads):
    """By these a version is proved before it answers."""
    cut = pieces.cut(nbytes, most_tiles, threads)
    batches = [2**i for i in range((most_tiles - 1).bit_length() + 1)]
    assert {size for tiles in batches for size in cut.pieces(tiles)} == set(cut.sizes)


@hypothesis.given(MOST_TILES, THREADS)
def test_what_takes_long_is_cut_finely_and_what_does_not_is_not(most_tiles, threads):
    assert pieces.cut(pieces.PIECE_NBYTES * 2, most_tiles, threads).sizes in {(1,), (1, 2)}
    small = pieces.cut(1, most_tiles, threads)
    assert small.alone == min(pieces.ALONE_TILES, 2 ** (most_tiles - 1).bit_length())


def test_a_batch_that_is_whole_is_one_piece():
    cut = pieces.whole((3, 6, 12))
    assert [cut.pieces(tiles) for tiles in (1, 3, 4, 12)] == [(3,), (3,), (6,), (12,)]


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_each_piece_is_called_once_and_all_are_when_it_returns(count):
    called = []
    pieces.compute(called.append, count, pieces.threads())
    assert sorted(called) == list(range(count))


@pytest.fixture
def two_threads(monkeypatch):
    """However many cores there are: one thread helps."""
    with ThreadPoolExecutor(1) as helper:
        monkeypatch.setattr(pieces, "_HELPERS", helper)
        yield helper


def test_pieces_are_computed_at_the_same_time(two_threads):
    """Each waits for the other to begin."""
    both = threading.Barrier(2)
    pieces.compute(lambda _: both.wait(WAIT_S), 2, 2)


def test_nobody_waits_for_a_thread_that_has_other_work(two_threads):
    busy, done = threading.Event(), threading.Event()
    other = two_threads.submit(lambda: (busy.set(), done.wait(WAIT_S)))
    assert busy.wait(WAIT_S)
    called = []
    pieces.compute(called.append, 5, 2)
    assert called == [0, 1, 2, 3, 4]
    done.set()
    assert other.result(WAIT_S)


@pytest.mark.parametrize("wrong", [0, 1])
def test_what_one_raises_is_raised_when_no_other_computes_any_more(two_threads, wrong):
    both, ended = threading.Barrier(2), []

    def piece(number):
        both.wait(WAIT_S)
        if number == wrong:
            raise ArithmeticError(number)
        ended.append(number)

    with pytest.raises(ArithmeticError):
        pieces.compute(piece, 2, 2)
    assert ended == [1 - wrong]


def test_a_thread_that_helps_has_the_number_of_bits_of_the_one_that_asks(two_threads):
    both, found = threading.Barrier(2), []

    def piece(number):
        both.wait(WAIT_S)
        found.append(jax.config.jax_enable_x64)

    for bits in (True, False):
        with jax.enable_x64(bits):
            pieces.compute(piece, 2, 2)
    assert found == [True, True, False, False]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU's batches are cut")
def test_every_program_cuts_alike_by_what_a_tile_reads_and_writes(tmp_path, monkeypatch):
    """No clock decides, so that a cache has what the next start compiles."""
    write_linear(tmp_path / "m" / "1")
    loaded = bundle.load(tmp_path / "m" / "1")
    counted = []
    count = pieces.nbytes_accessed
    monkeypatch.setattr(
        pieces, "nbytes_accessed", lambda of: counted.append(count(of)) or counted[-1]
    )
    cuts = [Program(loaded, max_rows=16 * TILE).cuts for _ in range(2)]
    assert cuts[0] == cuts[1]
    assert counted[0] == counted[1] > loaded.manifest.weights[0].nbytes
    monkeypatch.setattr(pieces, "ALONE_NBYTES", 3 * counted[0])
    assert Program(loaded, max_rows=16 * TILE).cuts[()].alone == 2


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU's batches are cut")
def test_a_batch_in_pieces_has_the_bits_of_one_in_one(tmp_path, monkeypatch):
    write_linear(tmp_path / "m" / "1")
    loaded = bundle.load(tmp_path / "m" / "1")
    at_once = Program(loaded, max_rows=8 * TILE)
    monkeypatch.setattr(pieces, "ALONE_NBYTES", 0)
    monkeypatch.setattr(pieces, "threads", lambda: 2)
    cut = Program(loaded, max_rows=8 * TILE)
    assert (at_once.cuts[()].pieces(7), cut.cuts[()].pieces(7)) == ((8,), (4, 2, 1))
    x = np.random.default_rng(2).normal(size=(30 * TILE, FEATURES)).astype(np.float32)
    for rows in (1, TILE, TILE + 1, 7 * TILE - 1, 8 * TILE, 30 * TILE):
        assert_same_bits(cut({"x": x[:rows]})["y"], at_once({"x": x[:rows]})["y"])
