"""The guide for users of `aqtp` names what there is, and its code runs."""

import importlib
import operator
import re
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from engine.contractions import assert_same_bits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the oracle's own, on today's JAX
    import aqt.jax.v2.config as aqtp_config
    import aqt.jax.v2.flax.aqt_flax as aqtp_flax
    import aqt.jax.v2.utils as aqtp_utils

pytestmark = [pytest.mark.slow, pytest.mark.in_haste]

GUIDE = (Path(__file__).parents[2] / "docs" / "migrating-from-aqtp.md").read_text()
MODULES = re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", GUIDE, re.DOTALL | re.MULTILINE)
# What `aqtp` has for its own tests, or prints.
NOT_FOR_USERS = {
    "tiled_dot_general": {"interleave", "get_ra", "maybe_add_one", "print_dimension_numbers"}
}


def ours(name):
    """The object that a dotted name of the guide means."""
    parts = name.split(".")
    for split in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(".".join(["aqt_engine", *parts[:split]]))
        except ImportError:
            continue
        return operator.attrgetter(".".join(parts[split:]))(found) if parts[split:] else found
    raise AssertionError(name)


@pytest.mark.parametrize(("module", "table"), MODULES, ids=[name for name, _ in MODULES])
def test_every_public_name_is_in_the_table(module, table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = importlib.import_module(f"aqt.jax.v2.{module}")
    rows = re.findall(r"^\| `([^`]+)` \| (?:`([^`]+)` )?\|", table, re.MULTILINE)
    public = {
        name
        for name, value in vars(theirs).items()
        if getattr(value, "__module__", None) == theirs.__name__ and not name.startswith("_")
    }
    named = {name for name, _ in rows}
    assert named >= public - NOT_FOR_USERS.get(module, set())
    assert all(hasattr(theirs, name) for name in named)
    for _, name in rows:
        assert not name or ours(name) is not None


def block(name):
    return re.search(rf"<!-- guide: {name} -->\n```python\n(.*?)```", GUIDE, re.DOTALL).group(1)


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "guide"}
    exec(block("model"), names)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    np.save("inputs.npy", x)

    class Theirs(names["nn"].Module):
        mode: aqtp_utils.QuantMode

        @names["nn"].compact
        def __call__(self, x):
            for features in (8, 3):
                dot_general = aqtp_flax.AqtDotGeneral(
                    aqtp_config.config_v4(fwd_bits=8, dlhs_bits=8),
                    rhs_quant_mode=self.mode,
                    rhs_freeze_mode=aqtp_flax.FreezerMode.CALIBRATION_AND_VALUE,
                )
                x = names["nn"].Dense(features, dot_general=dot_general)(names["nn"].relu(x))
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modes = aqtp_utils.QuantMode
        keys = {"params": jax.random.key(0)}
        params = Theirs(modes.TRAIN).init(jax.random.key(1), x)
        trained = jax.jit(Theirs(modes.TRAIN).apply)(params, x, rngs=keys)
        convert = Theirs(modes.CONVERT).apply
        _, stored = jax.jit(lambda v: convert(v, x, rngs=keys, mutable=True))(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "trained_with_aqtp", params)
        checkpointer.save(tmp_path / "stored_by_aqtp", stored)
    exec(block("parameters"), names)
    assert Path("models/mlp/1/manifest.json").exists()
    exec(block("stored"), names)
    assert_same_bits(names["logits"], trained)
