"""Run in a process of its own, with eight devices: how many values differ, as JSON."""

import contextlib
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from aqt_engine import arrays, bundle, replication
from aqt_engine.execution import Program
from aqt_engine.layout import Layout

LAYOUTS = [(8, 1), (1, 8), (2, 4)]
MAX_ROWS = 32


def differing(program, alone, compute=None):
    """How many values differ in any bit, of batches of several sizes."""
    compute = compute or program
    rng = np.random.default_rng(0)
    tile, (spec,) = program.manifest.tile, program.manifest.inputs
    values = 0
    for rows in (1, tile, MAX_ROWS - 1):
        x = rng.normal(size=(rows, *spec.shape[1:])).astype(np.float32)
        expected, found = alone({spec.name: x}), compute({spec.name: x})
        values += sum(
            int((found[k].view(np.uint32) != v.view(np.uint32)).sum()) for k, v in expected.items()
        )
    return values


@contextlib.contextmanager
def reading():
    """Bytes of the arrays that are read in it, one after the other, and bytes of their files."""
    parts, asked = [], []

    def zeros(shape, dtype, original=arrays.aligned_zeros):
        array = original(shape, dtype)
        parts.append(array.nbytes)
        return array

    def filled(stream, memory, original=arrays._filled):
        asked.append(memory.nbytes)
        return original(stream, memory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrays, "aligned_zeros", zeros)
        patch.setattr(arrays, "_filled", filled)
        yield parts, asked


def sharded(loaded, alone):
    for copies, shards in LAYOUTS:
        layout = Layout(copies=copies, shards=shards)
        with reading() as (parts, asked):
            program = Program(loaded, max_rows=MAX_ROWS, layout=layout)
        with reading() as (_, asked_to_gather):
            gathered = differing(program, alone, program.gathered)
        text = program._gathering[()].as_text()
        gathers = text.count(" all-gather(")
        others = sum(text.count(f" {kind}(") for kind in ("all-reduce", "reduce-scatter"))
        program.compile(program.sizes()[0])
        text = program._executables[(), program.sizes()[0]].as_text()
        sums = re.findall(r"= \(?(\w+)\[\S* all-reduce\(", text)
        weights = {
            w.name: x.addressable_shards[0].data.nbytes / x.nbytes
            for w, x in zip(loaded.manifest.weights, program._weights[()], strict=True)
        }
        yield {
            "layout": [copies, shards],
            "differing": differing(program, alone),
            "added_across_devices": sorted(set(sums)),
            "part_of_weights": weights,
            "axes": {w.name: layout.axis_of(w) for w in loaded.manifest.weights},
            "read_at_once": sorted(set(parts)),
            "read": sum(asked),
            "weights": [w.nbytes for w in loaded.manifest.weights],
            "here": [layout.nbytes_here(w) for w in loaded.manifest.weights],
            "differing_gathered": gathered,
            "read_to_gather": sum(asked_to_gather),
            "gathers": gathers,
            "other_sums": others,
            "departures": layout.departures(loaded.manifest.weights),
        }


def left_to_the_partitioner(loaded, alone):
    """What differs over eight shards if the partitioner is told nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replication, "replicating", lambda graph, layout: graph)
        program = Program(loaded, max_rows=MAX_ROWS, layout=Layout(shards=8))
        whole = differing(program, alone, program.gathered)
    return differing(program, alone), whole


def most_gathered(path):
    """Temporary bytes of what gathers the weights at `path`, by those of the largest."""
    loaded = bundle.load(path)
    program = Program(loaded, max_rows=MAX_ROWS, layout=Layout(shards=8))
    (spec,) = loaded.manifest.inputs
    program.gathered({spec.name: np.zeros(spec.with_rows(1, {}).shape, spec.dtype)})
    temporary = program._gathering[()].memory_analysis().temp_size_in_bytes
    return temporary / max(w.nbytes for w in loaded.manifest.weights)


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    loaded = bundle.load(Path(sys.argv[1]))
    alone = Program(loaded, max_rows=MAX_ROWS)
    left, gathered = left_to_the_partitioner(loaded, alone)
    told = {
        "sharded": list(sharded(loaded, alone)),
        "left": left,
        "left_gathered": gathered,
        "most_gathered": most_gathered(Path(sys.argv[2])),
    }
    print(json.dumps(told))
