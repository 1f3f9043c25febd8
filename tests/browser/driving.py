"""Drives the browser as a person does: starts the server like `saekit browse`, opens pages, presses, clicks, looks."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from saekit.browse import command

ARTEFACTS = Path(__file__).parents[2] / "test-artifacts"
CHROMIUM = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(p).is_file()), None)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(path: Path, home: Path) -> tuple[subprocess.Popen, str]:
    """The server as `saekit browse` starts it: empty HOME, no terminal, standard input closed."""
    port = free_port()
    line = command(path, host="127.0.0.1", port=port, model=True)
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    if "PYTHONPATH" in os.environ:
        # a checkout that is not the installed one
        environment["PYTHONPATH"] = os.environ["PYTHONPATH"]
    log = open(home.parent / "server.log", "wb")
    process = subprocess.Popen(
        line, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    return process, f"http://127.0.0.1:{port}"


def wait_for(address: str, seconds: float) -> float:
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        try:
            with urllib.request.urlopen(address, timeout=1) as answer:
                assert answer.status == 200
                return time.monotonic() - begin
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"no answer from {address} in {seconds} s")


@contextlib.contextmanager
def serving(path: Path, folder: Path):
    """The address of a server that shows `path`; at the end its log in `folder` holds no traceback."""
    home = folder / "home"
    home.mkdir()
    process, address = start(path, home)
    try:
        wait_for(address, 30)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert "Traceback" not in (folder / "server.log").read_text()


@contextlib.contextmanager
def visiting(server: str, chromium):
    """Opens pages of the server; at the end nothing was asked of another host and the console is clean."""
    pages, foreign, complaints = [], [], []

    def open_page(path: str, *, width: int = 1440, theme: str = "light"):
        page = chromium.new_page()
        pages.append(page)
        page.set_viewport_size({"width": width, "height": 1000})
        page.emulate_media(color_scheme=theme)
        page.on("request", lambda r: None if r.url.startswith((server, "data:", "blob:")) else foreign.append(r.url))
        page.on(
            "response",
            lambda r: complaints.append(f"{r.status} {r.url}") if r.status >= 400 and not expected(r.url) else None,
        )
        page.on(
            "console",
            lambda m: complaints.append(m.text) if m.type == "error" and not expected(m.location["url"]) else None,
        )
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(server + path)
        settle(page)
        return page

    def expected(address: str) -> bool:
        # Streamlit looks for its server below the page's own path first; those two answers are meant to be 404
        return address.endswith(("/_stcore/health", "/_stcore/host-config"))

    yield open_page
    for page in pages:
        page.close()
    assert not foreign
    assert not complaints


def settle(page):
    """Waits until the page shows something, no script has been running for a moment, and tables are drawn."""
    page.wait_for_selector("[data-testid=stHtml], [data-testid=stAlert]", timeout=30_000, state="attached")
    for _ in range(2):
        page.wait_for_timeout(120)
        page.wait_for_selector(
            "[data-testid=stApp][data-test-script-state=notRunning]", timeout=30_000, state="attached"
        )


def press(page, *keys: str):
    for key in keys:
        page.keyboard.press(key)
        settle(page)


def shows(locator):
    from playwright.sync_api import expect

    expect(locator).to_be_visible(timeout=20_000)


def holds(locator, value: str):
    from playwright.sync_api import expect

    expect(locator).to_have_value(value, timeout=20_000)


def is_feature(page, wanted: int):
    holds(page.get_by_role("spinbutton", name="Feature"), str(wanted))


def number(page) -> int:
    return int(page.get_by_role("spinbutton", name="Feature").input_value())


def parameters(page) -> dict:
    return {k: v[0] for k, v in parse_qs(urlsplit(page.url).query).items()}


ROW = 33
"""Pixels of a table row at the theme's font size."""


def table_at(page) -> dict:
    """Place of the first table, once it has stopped moving: widgets above it get their heights late."""
    table, before = page.get_by_test_id("stDataFrame").first, None
    while (box := table.bounding_box()) != before:
        before = box
        page.wait_for_timeout(250)
    return box


def click_row(page, row: int, x: int = 150):
    """Clicks visible row `row` of the first table; the grid is a canvas."""
    box = table_at(page)
    page.mouse.click(box["x"] + x, box["y"] + ROW * (row + 1.5))
    settle(page)


def picture(page, name: str):
    ARTEFACTS.mkdir(exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"browser-{name}.png")
