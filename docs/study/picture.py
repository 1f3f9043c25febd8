"""A Plotly figure as a PNG, drawn by Chromium: docs/images hold pictures of these."""

import shutil
from pathlib import Path


def save(figure, path: Path) -> None:
    """Writes the figure in its own width and height. SystemExit where there is no Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("no Chromium found for the picture; on Debian:  apt-get install chromium")
    path.parent.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": figure.layout.width + 20, "height": figure.layout.height + 20})
        page.set_content(figure.to_html(include_plotlyjs=True, full_html=True))
        page.wait_for_selector(".main-svg")
        page.screenshot(path=str(path))
        browser.close()
    print(f"wrote {path}")
