"""The status page in headless Chromium: `make page-test`, which also takes its picture.

It needs Debian's `chromium`, or a browser that CHROMIUM names, and is no part of `make test`.
"""

import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from aqt_client import Client
from aqt_engine import QuantMode, convert
from bundles import FEATURES, reference, write_linear
from engine.contractions import assert_same_bits
from examples.digits.model import int8_model
from examples.digits.train import split_digits, train
from server.messages import MODEL
from server_process import WAIT_S, serving

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "out" / "page"
# Its set-up trains a model and starts a browser, and a machine may have other work.
pytestmark = pytest.mark.timeout(900)
MARKUP = "<img src=x onerror=alert(1)>"
TOKEN = "token-of-the-reader-1234"
expect.set_options(timeout=WAIT_S * 1e3)
SIZE = {"width": 1180, "height": 900}


@pytest.fixture(scope="module")
def images():
    return split_digits()[0]


@pytest.fixture(scope="module")
def repository(tmp_path_factory, images):
    root = tmp_path_factory.mktemp("repository")
    variables = train(int8_model(QuantMode.TRAIN), images, epochs=2, on_epoch=lambda loss: None)
    inputs = {"image": images.images[:64]}
    convert.convert(int8_model, variables, inputs, root / "digits" / "1", tile=16)
    write_linear(root / MODEL / "1")
    write_linear(root / MARKUP / "1")
    write_linear(root / "wrong" / "1", wrong_witness=True)
    return root


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "tokens").write_text(f'reader = "{TOKEN}"\n')
    flags = ("--http-port", "0", "--status-page", f"--auth-tokens={folder / 'tokens'}")
    with serving(repository, *flags, log=folder / "log") as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    binary = (
        os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    assert binary, "there is no Chromium: apt-get install chromium, or name one in CHROMIUM"
    with sync_playwright() as playwright:
        # Without its sandbox, which root cannot have: it opens no page but ours.
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium, server, request):
    """The page with its token given, and nothing said in the console at the end."""
    opened = chromium.new_page(viewport=SIZE, color_scheme=getattr(request, "param", "light"))
    opened.set_default_timeout(WAIT_S * 1e3)
    said = []
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("dialog", lambda dialog: said.append(dialog.message))
    opened.on("console", lambda line: said.append(line.text))
    opened.goto(f"{server.page_url}#digits/1")
    expect(opened.locator("#refusal")).to_contain_text("authorization: Bearer")
    opened.get_by_label("Token").fill(TOKEN)
    opened.get_by_role("button", name="Show").click()
    expect(opened.locator("#access")).to_be_hidden()
    yield opened
    opened.close()
    # Chromium tells of each refusal, of which tests provoke some; all else is a defect.
    assert [line for line in said if not re.search(r"status of 40[01]", line)] == []


def test_it_shows_models_states_and_verdicts(page):
    rows = page.locator("#versions tr")
    expect(rows).to_have_count(4)
    expect(rows.nth(0)).to_contain_text(MARKUP)
    expect(page.locator("img")).to_have_count(0)
    expect(page.locator("#verdict")).to_contain_text("exact: no bit differs")
    page.get_by_role("link", name="wrong").click()
    expect(page.locator("#verdict")).to_contain_text("1 of 16 values")
    expect(page.locator("#live")).to_be_hidden()
    page.get_by_role("link", name=MARKUP).click()
    expect(page.locator("#selected-title")).to_have_text(f"{MARKUP}, version 1")
    expect(page.locator("#layers tr")).to_have_count(2)


def test_the_form_sends_a_request_and_shows_its_bits(page, repository):
    page.get_by_role("link", name=MODEL).click()
    x = np.random.default_rng(0).normal(size=(3, FEATURES)).astype(np.float32)
    page.get_by_label("x FP32").fill(str(x.tolist()))
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#answer")).to_contain_text("exact, in ")
    (output,) = page.locator("#body").evaluate("node => JSON.parse(node.textContent).outputs")
    found = np.array(output["data"], np.float32).reshape(3, -1)
    assert_same_bits(found, reference(repository / MODEL / "1", x))
    for wrong, said in (("[[1,2", "is no JSON"), ("[[1]]", "refused with 400")):
        page.get_by_label("x FP32").fill(wrong)
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#answer")).to_contain_text(said)


def test_it_can_be_used_by_keyboard(page):
    link = page.get_by_role("link", name=MODEL)
    link.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#selected-title")).to_have_text(f"{MODEL}, version 1")
    polled = page.locator("#connection").evaluate("node => performance.now()")
    page.wait_for_function("before => performance.now() > before + 5000", arg=polled)
    # Drawing it again has taken nothing away.
    expect(link).to_be_focused()
    unnamed = "input, textarea, button, svg, [role=region]"
    for control in page.locator(unnamed).all():
        named = "n => n.ariaLabel || n.labels?.length || n.textContent || n.ariaLabelledByElements"
        assert control.evaluate(named)


@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_latencies_are_drawn_while_requests_come(page, server, images, request):
    ended = threading.Event()

    def load():
        rng = np.random.default_rng(0)
        with Client(server.address, token=TOKEN) as client:
            while not ended.is_set():
                picked = rng.integers(0, len(images.images), rng.integers(1, 25))
                client.infer("digits", {"image": images.images[picked]})
                ended.wait(rng.exponential(0.02))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        expect(page.locator("#latency-chart path.second")).to_have_attribute("d", _curve(8))
        expect(page.locator("#rate-chart path")).to_have_attribute("d", _curve(8))
        assert page.locator("#histogram-chart rect").count() > 0
        expect(page.locator("#layers tr").first).to_contain_text("IntNumerics, 8 bits")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#answer")).to_contain_text("exact, in ")
        PICTURES.mkdir(parents=True, exist_ok=True)
        scheme = request.node.callspec.params["page"]
        page.screenshot(path=PICTURES / f"status-page-{scheme}.png", full_page=True)
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 22, 28)"}[scheme]
        # Nothing is wider than a narrow screen.
        page.set_viewport_size({"width": 360, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    finally:
        ended.set()
        thread.join(WAIT_S)


def _curve(points):
    """A path with at least so many points that are joined."""
    return re.compile(rf"(L.*){{{points}}}")
