"""A stranger in the browser of the demo: four pages, a prompt, a deep link; the pictures of the README come from here."""

import re

import pytest
from driving import click_row, is_feature, picture, serving, settle, shows, visiting

import saekit as sk

pytestmark = [pytest.mark.browser, pytest.mark.demo]
PROMPT = '''class Stack:
    """A list that is used from one end."""

    def __init__(self, items=None):
        self.items = list(items or [])  # a copy

    def push(self, item):
        if item is None:
            raise ValueError("nothing to push")
        self.items.append(item)
'''


@pytest.fixture(scope="module")
def visit(demo, chromium, tmp_path_factory):
    with (
        serving(demo.folder / "saes", tmp_path_factory.mktemp("serve")) as server,
        visiting(server, chromium) as open_page,
    ):
        yield open_page


def test_a_walk_through_the_demo(visit, demo):
    page = visit("/")
    shows(page.get_by_text("Worth a look"))
    shows(page.get_by_text(re.compile(r"nats with the SAE in place")))
    picture(page, "demo-overview")
    page.get_by_role("link", name="Features", exact=True).click()
    settle(page)
    shows(page.get_by_text(re.compile(r"of 3,072 features")))
    picture(page, "demo-features")
    click_row(page, 1)
    shows(page.get_by_text("Codes where it fires"))
    page.get_by_role("link", name="Prompt", exact=True).click()
    settle(page)
    page.get_by_role("textbox", name="Text").fill(PROMPT)
    page.keyboard.press("Control+Enter")
    page.get_by_text("Where the strongest fire").wait_for(timeout=60_000)
    settle(page)
    assert "def push(self, item)" in "".join(page.locator("#tokens span").all_text_contents())
    picture(page, "demo-prompt")


def test_a_deep_link_shows_what_the_index_holds(visit, demo):
    index = sk.open_index(demo.folder / "saes/topk")
    wanted = int(index.table(sort="-token_f1", limit=1).features[0])
    page = visit(f"/feature?feature={wanted}")
    is_feature(page, wanted)
    shows(page.get_by_text(f"{index.feature(wanted).n:,}", exact=True).first)
    picture(page, "demo-feature")


def test_a_deep_link_to_nothing_says_so(visit):
    page = visit("/feature?feature=999999")
    shows(page.get_by_text("feature 999,999 does not exist; this SAE has 0 to 3,071"))
