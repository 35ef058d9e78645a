"""One dense layer in int8: our bundle, as it is served, beside other libraries.

    python -m benchmarks.peers.layers --markdown --json out/bench/layers.json

A layer takes float32 rows, quantizes them, multiplies them with int8 weights, and gives float32:
the same weights and scales for all. All use as many threads as there are cores, take NumPy arrays
and give them. Each cell is the time of a peer divided by that of our bundle in the same round,
median and quartiles: above 1, ours is faster.

A second table has the product of integers alone, int8 by int8 to int32: our kernel's, and XLA's
which it takes the place of.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from aqt_engine import QuantMode, bundle, config, tiles
from aqt_engine.convert import convert
from aqt_engine.flax import AqtDotGeneral
from benchmarks.environment import environment
from benchmarks.peers.environments import pins
from benchmarks.peers.process import Peer, Worker, started
from benchmarks.peers.report import Mark, Result, parser, report
from benchmarks.peers.rounds import interleaved, ratios

Tile = int | Callable[..., Any]
ROWS = (1, 8, 64, 512)
SHAPES = ((384, 384), (384, 1536), (1536, 384), (1024, 1024), (4096, 1024))
ROUNDS = 11
OURS = "aqt exact"
LAYERS = (
    Peer(OURS, "served", options={"mode": "exact"}),
    Peer("aqt fast", "served", options={"mode": "fast"}),
    Peer("XLA float32", "xla", options={"dtype": "float32"}),
    Peer("XLA bfloat16", "xla", options={"dtype": "bfloat16"}),
    Peer("aqtp, jit", "aqtp_jit"),
    Peer("ONNX Runtime", "onnx_int8", "onnxruntime"),
    Peer("OpenVINO, dynamic", "openvino_int8", "openvino", {"static": False}),
    Peer("OpenVINO, static", "openvino_int8", "openvino", {"static": True}),
    Peer("PyTorch, x86", "torch_int8", "torch", {"engine": "x86"}),
    Peer("PyTorch, onednn", "torch_int8", "torch", {"engine": "onednn"}),
)
PRODUCTS = (
    Peer("aqt kernel", "kernel"),
    Peer("XLA int8", "xla"),
    Peer("ONNX Runtime", "onnx_int8", "onnxruntime"),
    Peer("PyTorch", "torch_int8", "torch"),
)
MARKS = (
    Mark(
        "1024x1024: at least as fast as ONNX Runtime",
        "ONNX Runtime",
        lambda case: case.get("layer") == "1024x1024",
    ),
    Mark(
        "the product of 1024x1024: at least as fast as ONNX Runtime",
        "ONNX Runtime",
        lambda case: case.get("product") == "1024x1024",
    ),
    Mark("never slower than XLA's float32", "XLA float32", lambda case: "layer" in case),
)
# What quantizing both operands to 8 bits costs a sum over normal values.
MOST_ERROR = 0.03


def int8_layer(features: int) -> Callable[[QuantMode], nn.Module]:
    """The factory of a dense layer without bias, each row quantized by a scale of its own."""
    int8 = config.fully_quantized(fwd_bits=8, bwd_bits=None)

    def model(mode: QuantMode) -> nn.Module:
        dot_general = AqtDotGeneral(int8, rhs_quant_mode=mode)
        return nn.Dense(features, use_bias=False, dot_general=dot_general)

    return model


def prepare(folder: Path, shape: tuple[int, int], tile: Tile) -> tuple[Path, Path]:
    """A layer's bundle at a tile, and its arrays for the peers."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS[-1], shape[0])).astype(np.float32)
    w = (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
    path, arrays = folder / "layer" / "1", folder / "layer.npz"
    typical = {"inputs": x[: tiles.CANDIDATES[-1]]}
    variables = {"params": {"kernel": w}}
    convert(int8_layer(shape[1]), variables, typical, path, tile=tile)
    stored = dict(zip(*_named_weights(path), strict=True))
    # Neither negative nor above 127: the same integers for kernels of int8 and of uint8.
    integers = rng.integers(0, 128, x.shape).astype(np.int8)
    scale = stored["scale"].reshape(-1)
    np.savez(arrays, inputs=x, x=x, w=w, xq=integers, qvalue=stored["qvalue"], scale=scale)
    return path, arrays


def _named_weights(path: Path) -> tuple[list[str], tuple[np.ndarray, ...]]:
    loaded = bundle.load(path)
    return [spec.name.rpartition("/")[2] for spec in loaded.manifest.weights], loaded.weights


def compare(
    workers: dict[str, Worker],
    peers: Sequence[Peer],
    what: str,
    arrays: Path,
    rows: int,
    rounds: int,
    **ours: Any,
) -> dict[str, Any]:
    """The ratios of one layer or product; each peer's answer is checked first."""
    turns = {}
    with np.load(arrays) as of:
        integers = what == "product"
        left, right = (of["xq"], of["qvalue"]) if integers else (of["x"], of["w"])
        right_answer = left[:rows].astype(np.float64) @ right.astype(np.float64)
    for peer in (p for p in peers if p.name in workers):
        key, own = f"{what} {peer.name}", ours if peer.script == "served" else {}
        options = {**peer.options, **own}
        answer = workers[peer.name].prepare(key, what, arrays, rows=rows, **options)
        error = np.linalg.norm(answer - right_answer) / np.linalg.norm(right_answer)
        if not error <= (0 if integers else MOST_ERROR):
            wrong = f"{peer.name} is wrong by {error:.2%} in the {what} of {rows} rows"
            if peer is peers[0]:
                raise RuntimeError(wrong)
            print(f"{wrong}: left out", file=sys.stderr, flush=True)
            continue
        turns[peer.name] = lambda calls, w=workers[peer.name], key=key: w.time(key, calls)
    times = interleaved(turns, rounds)
    return ratios(times, peers[0].name)


def main(arguments: Sequence[str] | None = None) -> None:
    understood = parser("layers", __doc__, ROUNDS)
    understood.add_argument("--products", action="store_true", help="only the second table")
    options = understood.parse_args(arguments)
    before = environment()
    asked = () if options.products else LAYERS
    # The products of integers have none; as `aqt convert` does, the layers' is measured.
    tile_of = tiles.CANDIDATES[0] if options.products else tiles.measured
    layers: list[Result] = []
    products: list[Result] = []
    with started((*asked, *PRODUCTS)) as workers:
        for shape in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                path, arrays = prepare(Path(folder), shape, tile_of)
                tile = bundle.read_manifest(path).tile
                for rows in ROWS:
                    name = "x".join(map(str, shape))
                    if asked:
                        case = {"rows": rows, "layer": name, "tile": tile}
                        told = workers, LAYERS, "layer", arrays, rows, options.rounds
                        layers.append({"case": case, "peers": compare(*told, path=str(path))})
                    case = {"rows": rows, "product": name}
                    told = workers, PRODUCTS, "product", arrays, rows, options.rounds
                    products.append({"case": case, "peers": compare(*told)})
        used = {p.environment for p in (*LAYERS, *PRODUCTS) if p.environment and p.name in workers}
        versions = {name: v for each in sorted(used) for name, v in pins(each).items()}
    tables = {"Layers: time of the peer / time of ours": layers} if layers else {}
    tables["Products of integers: time of the peer / time of ours"] = products
    report(options, tables, MARKS, versions, before)


if __name__ == "__main__":
    main()
