"""Every test that the list of features names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "docs/features.md").read_text().splitlines()


def named(line):
    """The (file, test or None) of a line; `::test` alone is in the file named before it."""
    found, file = [], None
    for path, test in re.findall(r"`((?:deploy/)?tests/[\w/]+\.py)?(?:::(\w+))?[^`]*`", line):
        file = path or file
        if path or (test and file):
            found.append((file, test or None))
    return found


NAMED = sorted({pair for line in LINES for pair in named(line)}, key=str)


def test_features_are_named():
    assert len(NAMED) > 50


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_a_test_that_is_named_is_there(file):
    text = (ROOT / file).read_text()
    there = set(re.findall(r"^(?:async )?def (test_\w+)", text, re.MULTILINE))
    missing = {test for name, test in NAMED if name == file and test} - there
    assert not missing, f"docs/features.md names tests that {file} does not have"
