"""Models of other frameworks are converted as they were trained; a killed training goes on."""

import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from aqt_engine import bundle
from aqt_engine.convert import Function, convert
from aqt_engine.execution import Program
from aqt_engine.proof import in_tiles
from examples.digits.train import split_digits
from examples.frameworks import digits_equinox, digits_jax
from examples.frameworks.training import accuracy, train
from server_process import environment

pytestmark = pytest.mark.slow

STEPS = 40


@pytest.mark.parametrize(
    ("classify", "initial"),
    [
        (digits_jax.classify, digits_jax.initial(0)),
        pytest.param(
            *(digits_equinox.classify, digits_equinox.named(digits_equinox.ARRAYS)),
            marks=pytest.mark.long,
        ),
    ],
    ids=["plain JAX", "Equinox"],
)
def test_what_was_trained_is_served(classify, initial, tmp_path):
    seen, held_out = split_digits()
    variables = train(classify, initial, seen, steps=150)
    assert accuracy(classify, variables, held_out) > 0.9
    images = {"image": held_out.images[:64]}
    manifest = convert(Function(classify), variables, images, tmp_path / "1")
    assert {w.dtype for w in manifest.weights if w.role == "qvalue"} == {"int8"}
    expected = in_tiles(jax.jit(lambda v, i: classify(v, **i)), variables, images, 16)
    served = Program(bundle.load(tmp_path / "1"), max_rows=64)(images)["logits"]
    assert (served.view(np.uint32) == expected["logits"].view(np.uint32)).all()


@pytest.mark.in_haste
def test_a_killed_training_ends_with_the_bits_of_one_that_was_not(tmp_path):
    command = [sys.executable, "-m", "examples.frameworks.training", "--steps", str(STEPS)]
    # What the first has compiled, the second finds: they are to differ in when they end alone.
    compiled = environment(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",
    )
    killed = subprocess.Popen([*command, tmp_path], stdout=subprocess.PIPE, text=True, env=compiled)
    with killed.stdout:
        assert any(line.startswith("step 20") for line in killed.stdout)
        killed.send_signal(signal.SIGKILL)
    killed.wait(60)
    done = subprocess.run(
        [*command, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=compiled,
    )
    assert "going on after step " in done.stdout
    seen, _ = split_digits()
    expected = train(digits_jax.classify, digits_jax.initial(0), seen, steps=STEPS)
    with np.load(tmp_path / "variables.npz") as found:
        for name, value in expected.items():
            assert (found[name].view(np.uint32) == np.asarray(value).view(np.uint32)).all()
