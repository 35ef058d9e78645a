"""Run in two processes, with four devices each: what each reads, and what differs, as JSON."""

import json
import sys

import jax
from eight_devices import MAX_ROWS, differing, reading

from aqt_engine import bundle
from aqt_engine.execution import Program
from aqt_engine.layout import Layout

if __name__ == "__main__":
    path, address, index = sys.argv[1:]
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    loaded = bundle.load(path)
    layout = Layout(shards=8)
    with reading() as (parts, asked):
        program = Program(loaded, max_rows=MAX_ROWS, layout=layout)
    alone = Program(loaded, max_rows=MAX_ROWS)
    told = {
        "read": sum(asked),
        "read_at_once": max(parts),
        "here": sum(map(layout.nbytes_here, loaded.manifest.weights)),
        "differing": differing(program, alone),
        "differing_gathered": differing(program, alone, program.gathered),
    }
    print(json.dumps(told))
    jax.distributed.shutdown()
