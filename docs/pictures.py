"""Pictures of the browser's pages for docs/browser.md and the README, light and dark.

    saekit demo --no-browser --out /tmp/demo
    saekit train abs-topk /tmp/demo/acts --out /tmp/demo/saes/abs-topk      and mutual-choice likewise, each indexed and evaluated
    python docs/pictures.py /tmp/demo/saes [--only steer map]

Needs Chromium and the test extra. Look at every picture before it is committed.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlencode

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests" / "browser"))
from driving import CHROMIUM, serving, settle  # noqa: E402  (a folder of tests)

from saekit.feature_index import open_index  # noqa: E402

IMAGES, SIZE = ROOT / "docs" / "images", {"width": 1280, "height": 900}
TEXT = 'def load(path, encoding="utf-8"):\n    """Read a file."""\n    with open(path, encoding=encoding) as file:\n        return file.read()\n'


def pages(saes: Path) -> dict[str, tuple[str, dict, str | None]]:
    """Name → path, parameters, and the button that is pressed before the picture."""
    index = open_index(saes / "topk")
    named = int(index.search(regex=r"\s*(def|class)")[0].feature)
    top = {"sae": "topk"}
    return {
        "overview": ("", top, None),
        "features": ("features", {**top, "q": "/[0-9]+/"}, None),
        "feature": ("feature", {**top, "feature": named}, None),
        "feature-signed": ("feature", {"sae": "abs-topk", "feature": two_sided(saes)}, None),
        "prompt": ("prompt", {**top, "text": TEXT}, None),
        "prompt-counts": ("prompt", {"sae": "mutual-choice", "text": TEXT}, None),
        "compare": ("compare", {"a": "topk", "b": "mutual-choice"}, None),
        "steer": ("steer", {**top, "feature": named, "doses": "-2,2,4", "text": "import os\n\n"}, "Write"),
        "map": ("map", top, None),
        "evaluate": ("evaluate", top, None),
        "data": ("data", top, None),
    }


def two_sided(saes: Path) -> int:
    """The signed feature whose two signs are most even, of those that are not dense."""
    index = open_index(saes / "abs-topk")
    n, rows = index.column("n_pos"), index.table("-energy", without="dense", density=(0.002, 0.05)).features
    share = n[rows] / index.column("n")[rows]
    return int(rows[abs(share - 0.5).argmin()])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", type=Path)
    parser.add_argument("--only", nargs="+")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(args.saes, Path(folder)) as address, sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, (path, parameters, button) in pages(args.saes).items():
            for theme in ("light", "dark"):
                if args.only is None or name in args.only:
                    page = chromium.new_page(viewport=SIZE, color_scheme=theme)
                    page.goto(f"{address}/{path}?{urlencode(parameters)}")
                    settle(page)
                    if button:
                        page.get_by_role("button", name=button).click()
                        page.wait_for_timeout(1000)
                    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=120_000)
                    page.wait_for_timeout(2500)
                    page.screenshot(path=IMAGES / f"{name}-{theme}.png")
                    page.close()
                    shrink(IMAGES / f"{name}-{theme}.png")
        chromium.close()


def shrink(path: Path):
    """Two hundred colours say as much as all of them, in a third of the bytes."""
    Image.open(path).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
