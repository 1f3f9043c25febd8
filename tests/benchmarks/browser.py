"""How long a person waits for the browser, on the index that `index.py --keep` leaves (1 M tokens, 24,576 features).

    python tests/benchmarks/index.py --keep && python tests/benchmarks/browser.py [--rounds 60]

1. Server side, under Streamlit's AppTest: a rerun after another feature was chosen, and the Features table of 131,072 features
   sorted anew.
2. In Chromium against a real server: the first page of a fresh server, and the time from pressing J to the new feature on the
   screen.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from streamlit.testing.v1 import AppTest

sys.path[:0] = [str(Path(__file__).parents[1] / "browser"), str(Path(__file__).parent)]
from driving import CHROMIUM, serving, settle  # noqa: E402  (a folder of tests)
from index import KEPT, milliseconds  # noqa: E402
from saekit_browser import state  # noqa: E402

SAES = KEPT / "saes"


def quantiles(times: np.ndarray) -> str:
    return f"p50 {np.quantile(times, 0.5):.0f} ms, p95 {np.quantile(times, 0.95):.0f} ({len(times)} times)"


def opened(page: str, sae: str) -> AppTest:
    main = str(Path(state.__file__).parent / "main.py")
    sys.argv = [main, str(SAES), "--no-model"]
    app = AppTest.from_file(main, default_timeout=120)
    app.query_params["sae"] = sae
    app.run()
    app.switch_page(f"views/{page}.py")
    app.query_params["sae"] = sae
    app.run()
    assert not app.exception, app.exception
    return app


def reruns(rounds: int):
    app, rng = opened("feature", "large"), np.random.default_rng(0)
    numbers = rng.integers(0, 24_576, rounds + 5).tolist()
    times = milliseconds(lambda j=j: app.number_input(key="feature").set_value(j).run() for j in numbers)
    assert not app.exception and not app.error
    print(f"rerun with another feature: {quantiles(times[5:])}")
    app = opened("features", "wide")
    sorts = [s for s in app.selectbox(key="sort").options if s != "energy"]
    times = milliseconds(lambda s=s: app.selectbox(key="sort").select(s).run() for s in sorts)
    assert not app.exception and not app.error
    print(f"rerun of the table of 131,072 features, sorted anew: {quantiles(times)}")


def in_chromium(rounds: int):
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, serving(SAES, Path(folder)) as address, sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1440, "height": 1000})
        start = time.perf_counter()
        page.goto(f"{address}/?sae=large")
        page.wait_for_selector("[data-testid=stHtml]", timeout=60_000)
        print(f"first page of a fresh server: {time.perf_counter() - start:.1f} s")
        page.goto(f"{address}/feature?sae=large&feature=100")
        settle(page)
        times = milliseconds(lambda: next_feature(page) for _ in range(rounds + 3))
        print(f"key to painted: {quantiles(times[3:])}")
        start = time.perf_counter()
        page.goto(f"{address}/features?sae=wide")
        page.wait_for_selector("[data-testid=stDataFrame]", timeout=60_000)
        print(f"page Features with 131,072 rows: {time.perf_counter() - start:.1f} s")
        chromium.close()


def next_feature(page):
    """Presses J and waits for other numbers on the screen; they are drawn last."""
    before = page.text_content(".st-key-numbers")
    page.keyboard.press("j")
    page.wait_for_function(
        "before => document.querySelector('.st-key-numbers')?.textContent !== before", arg=before, polling="raf"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    for name in ("large", "wide"):
        if not (SAES / name / "index" / "manifest.json").is_file():
            sys.exit(f"{SAES / name} has no index; run tests/benchmarks/index.py --keep first")
    reruns(options.rounds)
    in_chromium(options.rounds)


if __name__ == "__main__":
    main()
