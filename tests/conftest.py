"""Settings that every test runs under."""

import os
import re
from pathlib import Path

import hypothesis
import pytest

from aqt_server.compiled import keep_in
from compiled import compile_in_haste, shared_cache

ENGINE = Path(__file__).parent / "engine"
SLOW_AS_A_WHOLE = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.slow\b", re.MULTILINE)

# What a worker or a server has compiled, no other compiles again.
keep_in(Path(shared_cache()))

# More cases on demand: HYPOTHESIS_PROFILE=long. No deadline: the first example compiles.
hypothesis.settings.register_profile("default", deadline=None, max_examples=30)
hypothesis.settings.register_profile("long", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run those marked long too")


def pytest_ignore_collect(collection_path, config):
    # What is left out as a whole need not be imported, with what it imports, in each worker.
    if config.option.markexpr == "not slow" and collection_path.match("test_*.py"):
        return bool(SLOW_AS_A_WHOLE.search(collection_path.read_text())) or None
    return None


def pytest_collection_modifyitems(config, items):
    if not config.getoption("long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
    # Last what sets up little: workers share out the end, and none does a setup again. Those
    # that are compiled in haste together, since what was compiled otherwise is not kept.
    items.sort(key=lambda item: (ENGINE in item.path.parents, _in_haste(item)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    # Before its fixtures, which compile as well.
    compile_in_haste(_in_haste(item))


def _in_haste(item):
    """Whether a test says so; with --long there is time to compile as for everybody."""
    return not item.config.getoption("long") and item.get_closest_marker("in_haste") is not None
