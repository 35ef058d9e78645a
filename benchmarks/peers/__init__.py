"""Other libraries that compute and serve the same, measured beside ours in one run.

`layers` and `encoder` compare computing; the serving peers stand in `benchmarks.serving`.
Each peer is installed in an environment of its own (`environments`, from `requirements/`) and runs
in a process of its own: `process` here talks to `workers/protocol.py` there. `rounds` takes turns.
"""
