"""The documentation does what it says: its code is run, and what it names is there."""

import contextlib
import re
import tomllib
from pathlib import Path

import pytest

from aqt_server.policies import Policies
from aqt_server.security.authorization import Guard
from aqt_server.settings import Access, Tls
from documentation import blocks, carry_out, commands

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md")]
    + [ROOT / f / "README.md" for f in ("clients/node", "clients/python", "protos", "server")]
)
TUTORIAL = DOCS / "tutorial.md"
ALONE = ["concepts.md", "how-to/quantize.md", "how-to/calibrate.md", "how-to/pretrained.md"]
AFTER_TUTORIAL = ["how-to/triton.md", "how-to/metrics.md", "how-to/canary.md"]
READ = {TUTORIAL, *(DOCS / page for page in ALONE + AFTER_TUTORIAL)}
# Their TOML is what a server reads: policies of models, or rules of who may do what.
SETTINGS = {DOCS / page for page in ("operations.md", "from-triton.md", "from-tf-serving.md")}
# Run by tests/test_quickstart.py, test_migration_guide.py and test_migration_from_qwix.py.
ELSEWHERE = {
    "quickstart": ROOT / "README.md",
    "guide": DOCS / "migrating-from-aqtp.md",
    "qwix": DOCS / "migrating-from-qwix.md",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_code_is_run_or_says_why_not(page):
    for block in blocks(page):
        if block.language in ("python", "sh", "toml", "json", "yaml"):
            named = (block.marker or "").partition(":")[0]
            run = page in READ or (page in SETTINGS and block.language == "toml")
            run = run or ELSEWHERE.get(named) == page
            assert run or block.why_not_run, f"{block.place} is not run and does not say why"


@pytest.mark.parametrize("page", sorted(SETTINGS), ids=lambda p: p.name)
def test_settings_on_a_page_are_such(page, tmp_path):
    found = [block for block in blocks(page) if block.language == "toml"]
    assert found
    for block in found:
        file = tmp_path / "file.toml"
        file.write_text(block.text)
        if "allow" in tomllib.loads(block.text):
            Guard(Access(auth_policy=file), Tls())
        else:
            Policies(file)


def test_targets_of_make_that_pages_name_are_there():
    targets = set(
        re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    targets |= {"test-minimum", "test-latest"}
    named = {c.split()[1] for page in PAGES for c in commands(page) if c.startswith("make ")}
    assert len(named) > 10
    assert named <= targets


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A directory in which somebody followed the tutorial."""
    folder = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.syspath_prepend(folder)
        carry_out(TUTORIAL, forked=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", ALONE)
def test_a_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    carry_out(DOCS / page)


@pytest.mark.slow
@pytest.mark.parametrize("page", AFTER_TUTORIAL)
def test_a_page_after_the_tutorial(page, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    carry_out(DOCS / page)
