"""Run in a process of its own, with eight devices: how many values differ, as JSON."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from aqt_engine import bundle, execution
from aqt_engine.execution import Program
from aqt_engine.layout import Layout

LAYOUTS = [(8, 1), (1, 8), (2, 4)]
MAX_ROWS = 32


def differing(program, alone):
    """How many values differ in any bit, of batches of several sizes."""
    rng = np.random.default_rng(0)
    tile, (spec,) = program.manifest.tile, program.manifest.inputs
    values = 0
    for rows in (1, tile, MAX_ROWS - 1):
        x = rng.normal(size=(rows, *spec.shape[1:])).astype(np.float32)
        expected, found = alone({spec.name: x}), program({spec.name: x})
        values += sum(
            int((found[k].view(np.uint32) != v.view(np.uint32)).sum()) for k, v in expected.items()
        )
    return values


def sharded(loaded, alone):
    for copies, shards in LAYOUTS:
        layout = Layout(copies=copies, shards=shards)
        program = Program(loaded, max_rows=MAX_ROWS, layout=layout)
        program.compile(program.buckets[0])
        text = program._executables[(), program.buckets[0]].as_text()
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
            "departures": layout.departures(loaded.manifest.weights),
        }


def left_to_the_partitioner(loaded, alone):
    """What differs over eight shards if the partitioner is told nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "replicating", lambda graph, layout: graph)
        program = Program(loaded, max_rows=MAX_ROWS, layout=Layout(shards=8))
    return differing(program, alone)


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    loaded = bundle.load(Path(sys.argv[1]))
    alone = Program(loaded, max_rows=MAX_ROWS)
    told = {"sharded": list(sharded(loaded, alone)), "left": left_to_the_partitioner(loaded, alone)}
    print(json.dumps(told))
