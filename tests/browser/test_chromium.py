"""The browser in a real Chromium against a real server: what a person sees, clicks and types."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from driving import (
    click_row,
    free_port,
    holds,
    is_feature,
    number,
    parameters,
    picture,
    press,
    serving,
    settle,
    shows,
    start,
    table_at,
    visiting,
    wait_for,
)

import saekit as sk

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server(saes, tmp_path_factory):
    with serving(saes, tmp_path_factory.mktemp("serve")) as address:
        yield address


@pytest.fixture
def visit(server, chromium):
    with visiting(server, chromium) as open_page:
        yield open_page


def test_first_start_asks_nothing(saes, tmp_path):
    """Empty HOME, no terminal, stdin closed: the page answers within 10 s, nothing is asked, HOME stays empty."""
    home = tmp_path / "home"
    home.mkdir()
    process, address = start(saes, home)
    try:
        assert wait_for(address, 10) < 10
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert list(home.iterdir()) == []
    said = (tmp_path / "server.log").read_text()
    assert address in said and "mail" not in said.lower()


def test_four_pages(visit):
    page = visit("/?sae=plain")
    shows(page.get_by_role("heading", name="plain"))
    shows(page.get_by_text("Worth a look"))
    picture(page, "overview")
    page.get_by_role("link", name="Features", exact=True).click()
    settle(page)
    shows(page.get_by_text(re.compile(r"of 256 features")))
    picture(page, "features")
    click_row(page, 1)
    shows(page.get_by_text("Codes where it fires"))
    picture(page, "feature")
    page.get_by_role("link", name="Prompt", exact=True).click()
    settle(page)
    page.get_by_role("textbox", name="Text").fill("def add(self, a):\n    return self.total + a\n")
    page.keyboard.press("Control+Enter")
    page.get_by_text("Where the strongest fire").wait_for(timeout=40_000)
    settle(page)
    tokens = page.locator("#tokens span")
    assert (
        "".join(tokens.all_text_contents()).replace("↵", "").endswith("def add(self, a):\n    return self.total + a\n")
    )
    tokens.nth(2).click()
    page.get_by_text(re.compile("On token 2")).wait_for()
    picture(page, "prompt")


def test_steer(visit):
    """From a feature to its doses, with Back and the address in order."""
    page = visit("/feature?sae=plain&feature=7")
    page.get_by_test_id("stMain").get_by_role("link", name="Steer").click()
    settle(page)
    shows(page.get_by_role("heading", name="Steer"))
    is_feature(page, 7)
    page.get_by_role("textbox", name="Prompt").fill("class Stack:\n    def push(self, item):\n")
    page.keyboard.press("Control+Enter")
    settle(page)
    page.get_by_role("button", name="Write").click()
    page.get_by_role("heading", name="dose −4").wait_for(timeout=60_000)
    settle(page)
    assert page.get_by_role("heading", name="baseline").count() == 1
    assert parameters(page) == {"feature": "7", "text": "class Stack:\n    def push(self, item):\n"}
    picture(page, "steer")
    # a link opens the same, and waits for the button
    other = visit("/steer?sae=plain&feature=7&mode=set&doses=-1,3&text=class")
    shows(other.get_by_text("Press Write"))
    holds(other.get_by_role("textbox", name="Doses"), "-1,3")


def test_compare_map_and_data(visit):
    """Two SAEs side by side with Back and Forward; points under a lasso; the folder's facts."""
    page = visit("/compare?a=plain&b=signed")
    shows(page.get_by_text("S is the cosine of decoder rows", exact=False))
    page.get_by_text("Only in B").click()
    settle(page)
    assert parameters(page) == {"a": "plain", "b": "signed", "kind": "second"}
    picture(page, "compare")
    page.get_by_test_id("stMain").get_by_role("link", name=re.compile(r"Feature \d+ of B")).click()
    settle(page)
    assert parameters(page)["sae"] == "signed"
    page.go_back()
    settle(page)
    shows(page.get_by_role("heading", name="Compare"))
    page = visit("/map?sae=plain&color=energy")
    plot = page.locator(".js-plotly-plot").first
    plot.wait_for()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    for x, y in (
        (box["width"] - 150, 60),
        (box["width"] - 150, box["height"] - 60),
        (60, box["height"] - 60),
        (60, 60),
    ):
        page.mouse.move(box["x"] + x, box["y"] + y, steps=4)
    page.mouse.up()
    page.get_by_text(re.compile(r"\d+ picked")).wait_for(timeout=20_000)
    settle(page)
    picture(page, "map")
    page = visit("/data?sae=plain", theme="dark")
    page.get_by_role("button", name="Check every file").click()
    page.get_by_text("are what their manifests say").wait_for(timeout=30_000)
    settle(page)
    picture(page, "data-dark")


def test_a_job_with_progress_and_cancel(saes, chromium, tmp_path):
    """The page refreshes itself while the job runs; a reload finds it; cancel ends it, and what it left stays."""
    root = tmp_path / "saes"
    shutil.copytree(saes / "plain", root / "plain", ignore=shutil.ignore_patterns("labels*", "jobs"))
    # a file of 256 GiB that takes no space on the disk, and minutes to read
    manifest = root / "plain" / "index" / "manifest.json"
    content = json.loads(manifest.read_text())
    size = 1 << 38
    manifest.write_text(
        json.dumps({**content, "files": {**content["files"], "map.safetensors": {"bytes": size, "sha256": ""}}})
    )
    with open(root / "plain" / "index" / "map.safetensors", "wb") as file:
        file.truncate(size)
    with serving(root, tmp_path) as server, visiting(server, chromium) as visit:
        page = visit("/data")
        page.get_by_role("button", name="Check every file").click()
        said = page.get_by_text(re.compile(r"check [\d,]+ of 262,\d+ MiB · .* left"))
        said.wait_for(timeout=30_000)
        # it goes on by itself
        before = said.inner_text()
        page.wait_for_function("before => !document.body.innerText.includes(before)", arg=before, timeout=20_000)
        picture(page, "job")
        page.reload()
        settle(page)
        said.wait_for(timeout=20_000)
        page.get_by_role("button", name="Cancel").click()
        page.get_by_text(re.compile("Check every file: cancelled after")).wait_for(timeout=20_000)
        # nothing is asked of the server any more
        page.wait_for_timeout(500)
        shows(page.get_by_role("button", name="Check every file"))
        assert page.get_by_role("button", name="Cancel").count() == 0
        picture(page, "job-cancelled")
    assert not (root / "plain" / "jobs" / "check.json").exists()


def test_measuring(trained, chromium, tmp_path):
    """Page Evaluate measures, and shows what it measured without being asked again; a link shows one tier."""
    folder = shutil.copytree(trained, tmp_path / "sae")
    with serving(folder, tmp_path) as server, visiting(server, chromium) as visit:
        page = visit("/evaluate")
        shows(page.get_by_text("has no evaluation yet", exact=False))
        page.get_by_role("button", name="Measure").click()
        page.get_by_role("heading", name="The language model with the SAE in place (tier 2)").wait_for(timeout=90_000)
        settle(page)
        assert page.get_by_text("has no evaluation yet", exact=False).count() == 0
        picture(page, "evaluate")
        page = visit("/evaluate?tier=1", theme="dark")
        shows(page.get_by_role("heading", name="Held-out activations (tier 1)"))
        assert page.get_by_role("heading", name="(tier 2)").count() == 0
        picture(page, "evaluate-dark")


def test_ablate_and_a_text_of_ones_own(trained, chromium, tmp_path):
    """On page Feature: an example without the feature, a text that stays while J goes on."""
    number_of = int(sk.open_index(trained).table(sort="-n", limit=1).features[0])
    with serving(trained, tmp_path) as server, visiting(server, chromium) as visit:
        page = visit(f"/feature?feature={number_of}")
        page.get_by_text("Ablated on an example").click()
        page.get_by_role("button", name="Ablate", exact=True).click()
        page.get_by_text(re.compile(r"taken away · KL .* nats at the next token")).wait_for(timeout=60_000)
        assert page.get_by_role("columnheader", name="next token").count() == 1
        page.get_by_text("On a text of yours").click()
        page.get_by_role("textbox", name="A text").fill("def add(self, a):\n    return self.total + a\n")
        page.keyboard.press("Control+Enter")
        page.get_by_text(re.compile(r"fires on \d+ of \d+ tokens")).wait_for(timeout=60_000)
        settle(page)
        picture(page, "ablate")
        page.get_by_role("heading").first.click()
        press(page, "j")
        assert number(page) != number_of
        holds(page.get_by_role("textbox", name="A text"), "def add(self, a):\n    return self.total + a\n")
        page.get_by_text(re.compile(r"fires on \d+ of \d+ tokens")).wait_for(timeout=60_000)
        page.emulate_media(color_scheme="dark")
        settle(page)
        page.get_by_text("Ablated on an example").scroll_into_view_if_needed()
        picture(page, "ablate-dark")


def test_two_texts_and_the_effect_on_a_next_token(visit):
    """A token of the second text is clicked: the ranking is its own, by the effect on the token that follows."""
    page = visit("/prompt?sae=plain&rank=effect&text=def%20add(self)%3A&beside=import%20os%2C%20sys")
    page.get_by_text("Where the strongest fire").first.wait_for(timeout=60_000)
    settle(page)
    shows(page.get_by_text("Name a next token, or click a token"))
    views = page.locator("#tokens")
    assert views.count() == 2
    views.nth(1).locator("span").nth(1).click()
    page.get_by_text(re.compile(r"on the logit of .* \(token [\d,]+\)")).wait_for(timeout=60_000)
    page.get_by_text(re.compile("On token 1, import")).wait_for(timeout=20_000)
    settle(page)
    assert views.nth(1).locator(".chosen").count() == 1 and views.nth(0).locator(".chosen").count() == 0
    page.get_by_text("Error per token").first.click()
    settle(page)
    picture(page, "prompt-two")
    assert parameters(page)["rank"] == "effect" and parameters(page)["beside"] == "import os, sys"
    other = visit("/prompt?sae=plain&document=2", theme="dark")
    shows(other.get_by_text(re.compile(r"tokens in the index")))
    holds(other.get_by_role("spinbutton", name="Document"), "2")
    picture(other, "prompt-document-dark")


def test_dark(visit):
    page = visit("/feature?sae=signed&feature=2", theme="dark")
    assert (
        page.evaluate("getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor")
        == "rgb(21, 22, 26)"
    )
    # both poles are drawn, in their two colours
    colours = {
        page.locator(f".saekit b.{c}").first.evaluate("e => getComputedStyle(e).backgroundColor") for c in ("p4", "n4")
    }
    assert colours == {"rgba(230, 97, 1, 0.4)", "rgba(67, 147, 195, 0.4)"}
    picture(page, "feature-dark")


def test_deep_link_and_keys(visit):
    page = visit("/feature?sae=plain&feature=7&view=quantiles&zoom=full&list=sort%3Dfeature%26desc%3Dfalse")
    is_feature(page, 7)
    shows(page.get_by_text("From strong to weak"))
    press(page, "j")
    is_feature(page, 8)
    assert parameters(page)["feature"] == "8"
    press(page, "k", "k")
    is_feature(page, 6)
    press(page, "Shift+J")
    is_feature(page, 16)
    page.go_back()
    settle(page)
    is_feature(page, 6)
    press(page, "1")
    assert parameters(page)["zoom"] == "stacked"
    press(page, "v")
    assert parameters(page)["view"] == "random"
    # the list survives a reload, because the address carries it
    page.reload()
    settle(page)
    press(page, "j")
    is_feature(page, 7)


def test_label_with_j_and_k_in_it(visit):
    page = visit("/feature?sae=plain&feature=3")
    press(page, "l")
    page.keyboard.type("jk docstring J")
    press(page, "Enter")
    is_feature(page, 3)
    # Enter gave the keyboard back
    press(page, "b", "j")
    assert number(page) != 3
    page.goto(page.url.split("?")[0] + "?sae=plain&feature=3")
    settle(page)
    holds(page.get_by_role("textbox", name="Label"), "jk docstring J")
    other = visit("/features?sae=plain&q=docstring")
    shows(other.get_by_text(re.compile(r"of 256 features")))
    click_row(other, 0)
    is_feature(other, 3)


def test_bad_deep_link(visit):
    page = visit("/feature?sae=../etc&feature=999999&view=nonsense")
    shows(page.get_by_text("feature 999,999 does not exist; this SAE has 0 to 255"))
    shows(page.get_by_text("no SAE named ../etc here"))
    shows(page.get_by_text("Strongest", exact=True))
    is_feature(page, 0)


def test_filters_stay(visit, server):
    """Three filters, a sort and a query come back by the menu, by Back, and by reload; another tab is not affected."""
    page = visit("/features?sae=plain")
    page.get_by_role("searchbox", name="Search").fill("self")
    page.keyboard.press("Enter")
    settle(page)
    page.get_by_text("Largest first").click()
    settle(page)
    page.get_by_role("spinbutton", name="Density from").fill("0.0001")
    page.keyboard.press("Enter")
    settle(page)
    page.get_by_role("radio", name="unlabelled").or_(page.get_by_role("button", name="unlabelled")).first.click()
    settle(page)
    page.get_by_role("combobox").nth(1).click()
    page.get_by_role("option", name="n", exact=True).click()
    settle(page)
    wanted = {"q": "self", "sort": "n", "desc": "false", "dmin": "0.0001", "label": "unlabelled"}

    def as_left():
        holds(page.get_by_role("searchbox", name="Search"), "self")
        got = parameters(page)
        assert {k: got.get(k) for k in wanted} == wanted

    as_left()
    click_row(page, 2)
    opened = number(page)
    page.go_back()
    settle(page)
    as_left()
    click_row(page, 2)
    is_feature(page, opened)
    page.get_by_role("link", name="Features", exact=True).click()
    settle(page)
    as_left()
    page.reload()
    settle(page)
    as_left()
    other = visit("/features?sae=plain")
    holds(other.get_by_role("searchbox", name="Search"), "")


def test_clicked_row_after_sorting_in_the_table(visit):
    """Sorted by a header (which the server does not know of) and by the sort box, the clicked row is the one that opens."""
    page = visit("/features?sae=plain&sort=feature&desc=false")
    box = table_at(page)
    # the header of the column of numbers: ascending, then descending
    for _ in range(2):
        page.mouse.click(box["x"] + 80, box["y"] + 17)
        page.wait_for_timeout(300)
    click_row(page, 2)
    # 256 features, 21 of them dead (feature 19, and 236 to 255): the third row from the end is 233
    is_feature(page, 233)


def test_table_by_keyboard(visit):
    """Tab into the table opens nothing, although the grid then selects a cell by itself; down and right opens the row."""
    page = visit("/features?sae=plain&sort=feature&desc=false")
    page.get_by_test_id("stDataFrame").first.locator("canvas").first.focus()
    settle(page)
    press(page, "ArrowDown", "ArrowDown")
    assert "/features" in page.url
    press(page, "ArrowRight")
    is_feature(page, 2)


def test_narrow_and_signed(visit):
    page = visit("/feature?sae=signed&feature=2", width=900)
    for name in ("Feature", "Features", "Overview", "Prompt"):
        page.get_by_role("link", name=name, exact=True).click()
        settle(page)
        assert page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth") <= 900, name
        picture(page, f"narrow-{name.lower()}")


def test_ctrl_c(saes, tmp_path):
    """`saekit browse` itself: the address is printed, Ctrl-C ends it with code 130."""
    home = tmp_path / "home"
    home.mkdir()
    port = free_port()
    log = tmp_path / "log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "saekit", "browse", str(saes), "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            env={"HOME": str(home), "PATH": os.environ["PATH"]},
        )  # fmt: skip
    wait_for(f"http://127.0.0.1:{port}", 15)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 130
    assert f"http://127.0.0.1:{port}" in log.read_text()


MEASURED = """() => ({
    width: document.querySelector('[data-testid=stMain]').scrollWidth,
    small: [...document.querySelectorAll('[data-testid=stMain] *')]
        .filter(e => !e.childElementCount && e.textContent.trim() && !e.closest('svg') && parseFloat(getComputedStyle(e).fontSize) < 13)
        .map(e => e.textContent),
    unnamed: [...document.querySelectorAll('[data-testid=stPlotlyChart], [data-testid=stDataFrame]')]
        .filter(e => !e.getAttribute('aria-label') && !e.querySelector('[aria-label], [role=img], [alt]')).length,
})"""


@pytest.mark.parametrize(
    "path",
    ["", "features", "feature?feature=4", "prompt?text=def", "compare?a=plain&b=signed", "steer?feature=4", "map", "evaluate", "data"],
)  # fmt: skip
def test_narrow_legible_and_named(visit, path):
    """At 900 pixels no page is wider than the window; no text is smaller than 13; every chart and table has a name."""
    page = visit(f"/{path}{'&' if '?' in path else '?'}sae=plain", width=900)
    assert page.evaluate(MEASURED) == {"width": 900, "small": [], "unnamed": 0}
