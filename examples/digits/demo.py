"""The main job, end to end: train in float and in AQT int8, convert, serve, and compare every bit.

Run by `make demo`, or `python -m examples.digits.demo`.
"""

import asyncio
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
from rich.progress import Progress, TextColumn
from rich.table import Table

from aqt_client import AsyncClient
from aqt_engine import QuantMode, bundle, witness
from examples.digits.model import Mixer, float_model, int8_model
from examples.digits.train import EPOCHS, Digits, accuracy, split_digits, train
from examples.entry import forward_of
from examples.pipeline import aqt, console, save, server, shown, size_on_disk

OUT = Path("out/digits")
CLIENTS = 16
REQUESTS = 50
MAX_ROWS = 24


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    training, held_out = split_digits()
    console.rule("Training on handwritten digits")
    models = {"float32": float_model(), "AQT int8": int8_model(QuantMode.TRAIN)}
    variables, losses = {}, {}
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[loss]}")) as progress:
        for name, model in models.items():
            variables[name], losses[name] = _train(progress, name, model, training)
            save(variables[name], OUT / "checkpoints" / name.replace(" ", "_"))

    console.rule("Converting")
    checkpoint = OUT / "checkpoints" / "AQT_int8"
    np.savez(OUT / "example.npz", image=training.images[:256])
    served = OUT / "repository" / "digits" / "1"
    aqt(
        *("convert", "--model", "examples.digits.model:int8_model", "--checkpoint", checkpoint),
        *("--example", OUT / "example.npz", "--output", served),
    )
    aqt("inspect", served)
    manifest = bundle.read_manifest(served)

    console.rule(f"Serving to {CLIENTS} concurrent clients")
    truth = training_forward(variables["AQT int8"], held_out.images, manifest.tile)
    with server(OUT / "repository") as address:
        answers, picks, seconds, elapsed = asyncio.run(_classify(address, held_out.images))
    differing = 0
    served_digits = np.full(len(held_out.labels), -1)
    for answer, pick in zip(answers, picks, strict=True):
        verdict = witness.compare(answer, {name: array[pick] for name, array in truth.items()})
        differing += sum(difference.values for difference in verdict.differences)
        served_digits[pick] = answer["digit"]

    table = Table(title="Held-out digits", title_justify="left")
    for column in ("model", "last loss", "accuracy", "weights", "on disk"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, model in models.items():
        table.add_row(
            f"{name}, trained",
            f"{losses[name]:.4f}",
            f"{accuracy(model, variables[name], held_out):.2%}",
            f"{manifest.float_nbytes:,} bytes",
            f"{size_on_disk(OUT / 'checkpoints' / name.replace(' ', '_')):,} bytes",
        )
    table.add_row(
        "AQT int8, served",
        "",
        f"{(served_digits == held_out.labels).mean():.2%}",
        f"{manifest.nbytes:,} bytes",
        f"{size_on_disk(served / 'weights'):,} bytes",
    )
    console.print(table)
    rows = sum(map(len, picks))
    latency = np.percentile(np.array(seconds) * 1e3, [50, 99])
    console.print(
        f"{len(answers)} requests of 1 to {MAX_ROWS} rows ({rows} rows, every held-out digit among "
        f"them): [bold]{differing} values differ in any bit[/bold] from the training forward.\n"
        f"Latency p50 {latency[0]:.1f} ms, p99 {latency[1]:.1f} ms with {CLIENTS} clients at once; "
        f"{rows / elapsed:,.0f} rows a second.",
    )
    plain = _differing_rows_of_plain_batching(variables["AQT int8"], held_out.images, truth)
    console.print(
        f"For comparison, the same model in one plain batch of {len(held_out.labels)}: {plain} of "
        f"{len(held_out.labels)} rows get other bits than in batches of {manifest.tile}."
    )
    console.rule("Go on playing")
    np.savez(OUT / "one.npz", image=held_out.images[:1])
    console.print(
        f"  {shown('aqt')} serve --model-repository {OUT / 'repository'}\n"
        f"  {shown('aqt')} predict digits --inputs {OUT / 'one.npz'}      (in another terminal)",
        soft_wrap=True,
    )
    if differing:
        sys.exit("the served answers are not those of training")


def training_forward(variables, images: np.ndarray, tile: int) -> dict[str, np.ndarray]:
    """What the model answers in TRAIN mode, compiled at the tile: what has to be served."""
    return forward_of(int8_model(QuantMode.TRAIN).apply, variables, tile)({"image": images})


def _train(progress: Progress, name: str, model: Mixer, data: Digits):
    task = progress.add_task(name, total=EPOCHS, loss="")
    last = 0.0

    def on_epoch(loss: float) -> None:
        nonlocal last
        last = loss
        progress.update(task, advance=1, loss=f"loss {loss:.4f}")

    return train(model, data, on_epoch=on_epoch), last


async def _classify(address: str, images: np.ndarray):
    """All answers with the rows they are for, seconds of each request, and of all together."""
    # Every image once, in batches of random sizes, then images at random.
    rng = np.random.default_rng(1)
    once, picks = rng.permutation(len(images)), []
    while len(once):
        size = int(rng.integers(1, MAX_ROWS + 1))
        picks.append(once[:size])
        once = once[size:]
    while len(picks) < CLIENTS * REQUESTS:
        picks.append(rng.integers(0, len(images), rng.integers(1, MAX_ROWS + 1)))
    answers, seconds = [None] * len(picks), [0.0] * len(picks)
    waiting = iter(enumerate(picks))

    async def one_client() -> None:
        async with AsyncClient(address) as client:
            for i, pick in waiting:
                start = time.perf_counter()
                result = await client.infer("digits", {"image": images[pick]})
                seconds[i] = time.perf_counter() - start
                answers[i] = dict(result.outputs)

    async with AsyncClient(address) as client:
        await _until_ready(client)
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(one_client())
    return answers, picks, seconds, time.perf_counter() - start


async def _until_ready(client: AsyncClient) -> None:
    async with asyncio.timeout(120):
        while not await client.is_model_ready("digits"):
            await asyncio.sleep(0.1)


def _differing_rows_of_plain_batching(variables, images, truth) -> int:
    logits = np.asarray(jax.jit(int8_model(QuantMode.TRAIN).apply)(variables, images)["logits"])
    return int((logits.view(np.uint32) != truth["logits"].view(np.uint32)).any(axis=1).sum())


if __name__ == "__main__":
    main()
