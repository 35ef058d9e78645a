"""Our bundle, run as a server runs it."""

from protocol import work

from aqt_engine import bundle
from aqt_engine.execution import Mode, Program


def served(arrays, *, path, mode, rows):
    """The bundle at `path`, compiled for the bucket that holds `rows`."""
    program = Program(bundle.load(path), max_rows=rows, mode=Mode(mode))
    inputs = {spec.name: arrays[spec.name][:rows] for spec in program.manifest.inputs}
    output = program.manifest.outputs[0].name
    return lambda: program(inputs)[output]


if __name__ == "__main__":
    work({"layer": served, "encoder": served})
