"""Every model of the zoo by name; run, it converts, serves and compares them.

`make zoo` runs all, `python -m examples.zoo digits_conv_int8` those that are named.
"""

import argparse
import concurrent.futures
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.table import Table

from aqt_client import Client
from aqt_engine import bundle, tiles, witness
from aqt_engine.convert import convert
from examples.digits.zoo import MODELS as DIGITS
from examples.entry import Arrays, Forward, Model
from examples.language.zoo import MODELS as LANGUAGE
from examples.patients.zoo import MODELS as PATIENTS
from examples.pipeline import aqt, console, save, server, size_on_disk, wait_ready
from examples.search.zoo import MODELS as SEARCH
from examples.sentences.zoo import MODELS as SENTENCES

MODELS = {model.name: model for model in (*DIGITS, *SENTENCES, *LANGUAGE, *PATIENTS, *SEARCH)}
SMALL = tuple(name for name, model in MODELS.items() if model.cost < 100)
"""Those that take milliseconds, where the others, MiniLM, take seconds."""

OUT = Path("out/zoo")
EXAMPLE_ROWS = 32
POOL_ROWS = 48
CLIENTS = 4
REQUESTS = 32
MAX_ROWS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="NAME", help=", ".join(MODELS))
    names = parser.parse_args().models or list(MODELS)
    if unknown := sorted(set(names) - set(MODELS)):
        parser.error(f"no model is called {unknown[0]}; there are {', '.join(MODELS)}")
    shutil.rmtree(OUT, ignore_errors=True)
    models = [MODELS[name] for name in names]
    references = {model.name: make(model, OUT) for model in models}
    console.rule(f"Serving to {CLIENTS} concurrent clients")
    table = Table("model", "measured", title="The zoo", title_justify="left")
    for column in ("float", "served", "float bytes", "bytes", "on disk", "compared", "differ"):
        table.add_column(column, justify="right")
    wrong = 0
    with server(OUT / "repository") as address, Client(address, timeout_s=120) as client:
        for model in models:
            wait_ready(client, model.name)
            values, differ = compare(model, references[model.name], client)
            wrong += differ
            converted = OUT / "repository" / model.name / "1"
            manifest = bundle.read_manifest(converted)
            sizes = (
                f"{manifest.float_nbytes:,}",
                f"{manifest.nbytes:,}",
                f"{size_on_disk(converted / 'weights'):,}",
            )
            quality, float_quality = model.quality(served(client, model)), model.float_quality()
            for line, (measure, value) in enumerate(quality.items()):
                of_model = (*sizes, f"{values:,}", str(differ)) if line == 0 else ()
                table.add_row(
                    model.name if line == 0 else "",
                    measure,
                    f"{float_quality[measure]:.4f}",
                    f"{value:.4f}",
                    *of_model,
                )
    console.print(table)
    if wrong:
        sys.exit("served answers are not those of training")


def make(model: Model, out: Path, *, fast: bool = False) -> Forward:
    """Trains or takes `model` and converts it into `out`'s repository; gives its R."""
    console.rule(f"{model.name}: {model.summary}")
    started = time.monotonic()
    variables = model.variables(fast)
    console.print(f"trained or taken in {time.monotonic() - started:.0f} s")
    files = out / model.name
    save(variables, files / "checkpoint")
    np.savez(files / "example.npz", **_example(model))
    options: list[str | Path] = ["--tile", str(model.tile), *_signature(model)]
    if model.calibration is not None:
        np.savez(files / "calibration.npz", **model.calibration())
        options += ["--calibration", files / "calibration.npz"]
    converted = out / "repository" / model.name / "1"
    aqt(
        *("convert", "--model", model.factory, "--checkpoint", files / "checkpoint"),
        *("--example", files / "example.npz", *options, "--output", converted),
    )
    return model.training_forward(model.calibrated(variables))


def convert_untrained(
    model: Model, repository: Path, *, tile: int | tiles.Measure | None = None
) -> Forward:
    """Converts `model` at once, here, with weights that were not trained; gives its R at its tile.

    For whom the bits matter, or the speed, and not the quality. `tile` may be another one.
    """
    variables = model.calibrated(model.variables(True))
    convert(
        model.convertible(),
        variables,
        _example(model),
        repository / model.name / "1",
        signature=model.signature,
        tile=model.tile if tile is None else tile,
    )
    return model.training_forward(variables)


def _example(model: Model) -> Arrays:
    return model.inputs(np.random.default_rng(0), EXAMPLE_ROWS, model.lengths[-1])


def _signature(model: Model) -> Iterator[str]:
    """The options of `aqt convert` that declare the model's signature."""
    signature = model.signature
    for name, shape in signature.shapes.items():
        yield from ("--shape", f"{name}={','.join(map(str, shape))}")
    for name, sizes in signature.lengths.items():
        yield from ("--lengths", f"{name}={','.join(map(str, sizes))}")
    for name in signature.per_request:
        yield from ("--per-request", name)


def served(client: Client, model: Model) -> Forward:
    """The model behind the server."""
    return lambda inputs: client.infer(model.name, inputs).outputs


def compare(model: Model, reference: Forward, client: Client) -> tuple[int, int]:
    """Asks from several threads in requests of random rows; counts values, and those that differ.

    Each row of a pool is asked for in many requests, in different company each time. A model with
    lengths has two pools for each bucket, one of them shorter.
    """
    rng = np.random.default_rng(1)
    tried = [length for size in model.lengths for length in (size, size - min(3, size // 2))]
    pools = [model.inputs(rng, POOL_ROWS, length) for length in tried]
    expected = [reference(pool) for pool in pools]
    picks = [rng.integers(0, POOL_ROWS, rng.integers(1, MAX_ROWS + 1)) for _ in range(REQUESTS)]

    def ask(request: tuple[int, np.ndarray]) -> witness.Verdict:
        number, pick = request
        pool, right = pools[number % len(pools)], expected[number % len(pools)]
        found = served(client, model)({k: v[pick] if len(v) > 1 else v for k, v in pool.items()})
        return witness.compare(found, {k: v[pick] for k, v in right.items()})

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as threads:
        verdicts = list(threads.map(ask, enumerate(picks)))
    differences = [d for verdict in verdicts for d in verdict.differences]
    return sum(d.total for d in differences), sum(d.values for d in differences)


if __name__ == "__main__":
    main()
