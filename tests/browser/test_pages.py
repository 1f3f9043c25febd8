"""Every page in every state, without a browser: the right sentence is shown and nothing raises."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from saekit_browser import jobs, state
from streamlit.testing.v1 import AppTest

from saekit.feature_index import FeatureIndex, open_index, render
from saekit.progress import Progress
from saekit.store.format import take_lock
from saekit.variants import VARIANTS

MAIN = Path(state.__file__).parent / "main.py"
PAGES = ("overview", "features", "feature", "prompt", "steer", "map", "data")


@pytest.fixture
def browse(monkeypatch):
    """Runs the app on a folder: first main.py, then the page, as Streamlit does."""

    def run(path: Path, page: str = "overview", *options: str, **parameters: str) -> AppTest:
        monkeypatch.setattr(sys, "argv", [str(MAIN), str(path), *options])
        state.arguments.cache_clear()
        app = AppTest.from_file(str(MAIN), default_timeout=60)
        for key, value in parameters.items():
            app.query_params[key] = value
        app.run()
        if page != "overview":
            app.switch_page(f"views/{page}.py")
            for key, value in parameters.items():
                app.query_params[key] = value
            app.run()
        assert not app.exception, [e.message for e in app.exception]
        return app

    yield run
    state.arguments.cache_clear()


def html(app: AppTest) -> str:
    return "\n".join(e.proto.body for e in app.get("html"))


def words(elements) -> str:
    return " | ".join(e.value.replace("\\", "") for e in elements)


def pressed(app: AppTest, label: str) -> AppTest:
    app = next(b for b in app.button if b.label == label).click().run()
    assert not app.exception
    return app


def done(app: AppTest, cancel: bool = False) -> AppTest:
    """The page once its job has ended."""
    for _ in range(600):
        button = next((b for b in app.button if b.label == "Cancel"), None)
        if button is None:
            return app
        if cancel and not button.disabled:
            button.click()
        time.sleep(0.05)
        app.run()
    raise AssertionError("the job does not end")


def copied(saes: Path, root: Path) -> Path:
    shutil.copytree(saes / "plain", root / "saes" / "plain", ignore=shutil.ignore_patterns("labels*", "jobs"))
    return root / "saes"


@pytest.mark.parametrize("sae", ["plain", "signed"])
@pytest.mark.parametrize("page", PAGES)
def test_every_page(browse, saes, sae, page):
    app = browse(saes, page, sae=sae)
    assert not app.error
    assert f"{256:,} features" in html(app)


def test_overview(browse, saes):
    app = browse(saes / "plain")
    # one SAE: nothing to select; no evaluation: said, with the command
    assert not app.selectbox
    assert "has no evaluation yet: run saekit evaluate" in words(app.info)
    assert [m.label for m in app.metric] == ["Features per token", "Silent"]
    # feature 19 and the last 20 never fire: 21 of 256 = 8.2 %
    assert app.metric[1].value == "8.20 %"
    # links to features are widgets
    assert not re.search(r"Feature \d", html(app))
    assert len(app.get("page_link")) == 12


def test_overview_with_evaluation(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    fingerprint = json.loads((root / "plain" / "config.json").read_text())["fingerprint"]

    def metric(value, ci=None, **more):
        return {"value": value, "unit": "", "better": "lower", "ci95": ci, "n": 1000, "formula": "x/1", "baselines": {}, "note": "", **more}  # fmt: skip

    content = {
        "format": "saekit-evaluation",
        "format_version": 1,
        "sae": {"fingerprint": fingerprint, "F": 256, "k": 8},
        "data": {},
        "tiers": {
            "1": {
                "metrics": {
                    "fvu": metric(1.25, [1.2, 1.3], baselines={"pca_l0": 0.4}),
                    "l0": metric(8.0, [7.9, 8.1], note="5/50/95 %: 8/8/8"),
                    "alive": metric(0.9),
                },
                "warnings": ["FVU 1.25 is worse than predicting the mean: wrong site or scaling?"],
            }
        },
    }
    (root / "plain" / "evaluation.json").write_text(json.dumps(content))
    app = browse(root)
    assert "FVU 1.250 ± 0.050, L0 8.0, 10 % of 256 features silent" in html(app)
    assert "worse than predicting the mean" in words(app.warning)
    assert [(m.label, m.value) for m in app.metric][:2] == [
        ("Unexplained variance", "1.250"),
        ("Features per token", "8.0"),
    ]

    # page Evaluate has all of it, with what each number rests on
    app = browse(root, "evaluate")
    assert "worse than predicting the mean" in words(app.warning) and not app.error
    frame = app.dataframe[0].value
    assert frame["metric"].tolist() == ["fvu", "l0", "alive"] and frame["value"].tolist() == [
        "1.250",
        "8.000",
        "0.9000",
    ]
    assert frame["± 95 %"].tolist() == ["0.050", "0.100", ""] and frame["beside it"][0] == "pca_l0 0.400"


def test_evaluate_without_an_evaluation(browse, saes):
    app = browse(saes, "evaluate", sae="plain")
    assert "has no evaluation yet: run saekit evaluate" in words(app.error)
    assert any("saekit evaluate" in c.value for c in app.code)


def test_compare(browse, saes):
    app = browse(saes, "compare", a="plain", b="signed", kind="second")
    assert not app.error and "features" in html(app) and dict(app.query_params)["kind"] == "second"
    assert [box.value for box in app.selectbox if box.label in "AB"] == ["plain", "signed"]
    assert any("has no evaluation yet" in c.value for c in app.caption)
    frame = app.dataframe[0].value
    assert (frame["S"] < 0.5).all() and frame["S"].is_monotonic_increasing
    app.segmented_control(key="kind").set_value("matched").run()
    assert not app.error and not app.exception


def test_compare_takes_two_and_names_alone(browse, saes):
    assert "holds one SAE that can be shown" in words(browse(saes / "plain", "compare").error)
    app = browse(saes, "compare", a="../../etc", b="nobody")
    assert not app.error and {box.value for box in app.selectbox if box.label in "AB"} <= {"plain", "signed"}


def test_map(browse, saes):
    app = browse(saes, "map", sae="plain", color="energy")
    assert "two points that touch may have nothing in common" in words(app.caption) and not app.error
    spec = json.loads(app.get("plotly_chart")[0].proto.spec)
    # 21 of 256 never fire
    assert len(spec["data"][0]["text"]) == 235 and "energy" in spec["data"][0]["hovertemplate"]
    app.toggle(key="map_alive").set_value(False).run()
    app.segmented_control(key="color").set_value("sign").run()
    spec = json.loads(app.get("plotly_chart")[0].proto.spec)
    assert len(spec["data"][0]["text"]) == 256 and dict(app.query_params)["color"] == "sign"


def test_data(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    app = browse(root, "data")
    shown = html(app)
    config = json.loads((root / "plain" / "config.json").read_text())
    assert config["fingerprint"] in shown and config["site"] in shown and "256 features" in shown
    files = dict(zip(app.dataframe[0].value["file"], app.dataframe[0].value["bytes"], strict=True))
    assert files["sae.safetensors"] == (root / "plain" / "sae.safetensors").stat().st_size
    line = f"saekit check {root / 'plain'}"
    assert any(c.value == f"{line}\n{line}/index" for c in app.code)
    app = done(pressed(app, "Check every file"))
    assert "SAE, evaluation and index are what their manifests say" in words(app.success)
    # the result is a file, so another server finds it
    left = json.loads((root / "plain" / "jobs" / "check.json").read_text())
    assert left["problems"] == [] and left["checked"] == ["SAE", "evaluation", "index"]
    state.st.cache_resource.clear()
    assert "are what their manifests say, on 2" in words(browse(root, "data").success)
    weights = root / "plain" / "sae.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    app = done(pressed(browse(root, "data"), "Check every file"))
    assert "damaged" in words(app.error) and not app.success


def slow_check(self):
    """Reads one piece after the other, and has no end of its own within a test."""
    with Progress("check", 2000, "pieces") as progress:
        for _ in range(2000):
            time.sleep(0.05)
            progress.advance(1)
    return ["the end was reached"]


def test_a_job_shows_how_far_it_is_and_is_cancelled(browse, saes, tmp_path, monkeypatch):
    root = copied(saes, tmp_path)
    monkeypatch.setattr(FeatureIndex, "check", slow_check)
    app = pressed(browse(root, "data"), "Check every file")
    deadline = time.monotonic() + 20
    while "2,000 pieces" not in (text := app.get("progress")[0].proto.text.replace("\\", "")) or "left" not in text:
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
        app.run()
    assert re.match(r"Check every file · check \d+ of 2,000 pieces · .* left", text)
    # another tab and another page see the same job, and can start none of their own
    other = browse(root, "evaluate")
    assert other.get("progress") and not any(b.label == "Measure" for b in other.button)
    app = done(app, cancel=True)
    assert "Check every file: cancelled after" in words(app.warning) and not app.success and not app.error
    assert not (root / "plain" / "jobs" / "check.json").exists()
    # the lock is free again
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", [str(MAIN), str(root)])
    assert "are what their manifests say" in words(done(pressed(app, "Check every file")).success)


def test_a_job_that_fails(browse, saes, tmp_path, monkeypatch):
    root = copied(saes, tmp_path)

    def fails(self):
        raise ValueError("<b>boom</b>")

    monkeypatch.setattr(FeatureIndex, "check", fails)
    app = done(pressed(browse(root, "data"), "Check every file"))
    assert re.search(r"Check every file failed; error [0-9a-f]{4} in the output", words(app.warning))
    assert "boom" not in words(app.warning)


def test_one_job_per_sae_in_all_processes(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    jobs_of = root / "plain" / "jobs"
    jobs_of.mkdir()
    with take_lock(jobs_of / ".lock", root):
        app = pressed(browse(root, "data"), "Check every file")
        assert "is being worked on by process" in words(app.error) and not app.get("progress")
    shutil.rmtree(jobs_of)
    jobs_of.write_text("in the way")
    assert "run the command in a terminal" in words(pressed(browse(root, "data"), "Check every file").error)


def test_measuring(browse, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "sae")
    app = browse(folder, "evaluate", tier="1")
    assert "has no evaluation yet" in words(app.error)
    assert any(c.value == f"saekit evaluate {folder} --tiers 1" for c in app.code)
    app = done(pressed(app, "Measure"))
    assert not app.error
    stored = json.loads((folder / "evaluation.json").read_text())
    assert set(stored["tiers"]) == {"1"} and "Last measured here on" in words(app.caption)
    app.segmented_control(key="tier").set_value("all").run()
    assert "tier" not in app.query_params
    app = done(pressed(app, "Measure"))
    assert [s.value for s in app.subheader][:2] == [
        "Held-out activations (tier 1)",
        "The language model with the SAE in place (tier 2)",
    ]
    # a link shows one tier; without the model the other is refused, with the reason
    app = browse(folder, "evaluate", "--no-model", tier="2")
    assert app.subheader[0].value == "The language model with the SAE in place (tier 2)"
    assert next(b for b in app.button if b.label == "Measure").disabled and "--no-model" in words(app.caption)
    app = browse(folder, "evaluate", tier="7")
    assert app.segmented_control(key="tier").value == "all" and not app.error


def test_measuring_without_a_store(browse, saes, tmp_path):
    app = done(pressed(browse(copied(saes, tmp_path), "evaluate"), "Measure"))
    assert "does not say which store it was trained on" in words(app.warning)


def test_the_store_is_checked_where_it_is_at_hand(browse, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "sae")
    app = done(pressed(browse(folder, "data"), "Check every file"))
    assert "SAE, evaluation, index and store are what" in words(app.success)
    assert any(c.value.endswith(f"saekit check {trained.parent / 'acts'}") for c in app.code)


def test_large_saes_are_matched_once(browse, saes, tmp_path, monkeypatch):
    root = shutil.copytree(saes, tmp_path / "saes", ignore=shutil.ignore_patterns("labels*", "jobs", "store"))
    monkeypatch.setattr(jobs, "LARGE", 0)
    app = browse(root, "compare", a="plain", b="signed", kind="second")
    assert not app.dataframe and "256 by 256 cosines of 64 numbers" in words(app.caption)
    line = f"saekit compare {root / 'plain'} {root / 'signed'} --features"
    assert any(c.value == line for c in app.code)
    app = done(pressed(app, "Match the features"))
    kept = app.dataframe[0].value
    # the same as at once, and there after a reload
    monkeypatch.undo()
    monkeypatch.setattr(sys, "argv", [str(MAIN), str(root)])
    assert kept.equals(browse(root, "compare", a="plain", b="signed", kind="second").dataframe[0].value)
    monkeypatch.setattr(jobs, "LARGE", 0)
    app = browse(root, "compare", a="plain", b="signed", kind="second")
    assert kept.equals(app.dataframe[0].value) and not any(b.label == "Match the features" for b in app.button)


def figure(app: AppTest, name: str) -> dict:
    """The Plotly figure whose text alternative begins like that."""
    return next(json.loads(c.proto.spec) for c in app.get("plotly_chart") if c.proto.alt.startswith(name))


def subheaders(app: AppTest) -> list[str]:
    return [e.value for e in app.subheader]


def test_norms(browse, saes):
    app = browse(saes, sae="plain")
    spec = figure(app, "Scatter of ‖f‖ against ‖x‖ of")
    points = next(t for t in spec["data"] if t["name"] == "token")
    # 12,000 tokens, 94 of them BOS without a code; b_dec is 0, so a token on which nothing fires has no ‖f‖
    left_out = int(app.dataframe[1].value["value"].iloc[-1])
    assert len(points["text"]) == 12_000 - 94 - left_out and all("<b>" in text for text in points["text"])
    assert {t["name"] for t in spec["data"]} == {"token", "y = x", "δ = 0.25", "δ = 0.5", "δ = 1"}
    assert "mean of ‖f‖ / ‖x‖" in words(app.caption) and "normalised per token" not in words(app.caption)


def test_tokens_with_many_and_few_features(browse, variants):
    app = browse(variants, sae="mutual")
    assert {"Error by features per token", "Threshold and k-th value"} <= set(subheaders(app))
    assert "Tokens with the most features" in html(app) and "Tokens with the fewest" in html(app)
    assert "Trained for k = 8; in this index" in words(app.caption) and "calibrated on 4,096 training rows" in words(
        app.caption
    )
    assert "it was trained for: compare this SAE with others of L0" in words(app.warning)
    spec = figure(app, "Histogram of the 8-th largest code per token")
    assert spec["layout"]["shapes"][0]["x0"] == pytest.approx(0.01)
    assert "Density against rank" not in subheaders(app)
    for text in ("def add(self):\n    return 1", "x"):
        app = browse(variants, "prompt", sae="mutual", text=text)
        assert "Features per token" in subheaders(app) and not app.error
    app = browse(variants, "prompt", "--no-model", sae="mutual")
    assert "Features per token" in subheaders(app) and "most on a token of this text" in html(app)


def test_without_by_token_the_threshold_says_what_to_do(browse, variants, tmp_path):
    root = tmp_path / "saes"
    shutil.copytree(variants / "mutual", root / "mutual")
    manifest = root / "mutual" / "index" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["files"]["by_token.safetensors"]
    manifest.write_text(json.dumps(content))
    app = browse(root)
    assert "has no by_token; run saekit index" in words(app.caption) and not app.error


def test_budgets(browse, variants):
    from saekit.feature_index import open_index

    idx = open_index(variants / "budgets")
    used = idx.column("n") / idx.n_encoded / np.where(np.arange(256) < 4, 0.2, 0.01)
    under = np.flatnonzero(used < 0.5)
    app = browse(variants, sae="budgets")
    assert f"{len(under):,} of 256 features fire less than half of their budget" in words(app.caption)
    assert {t["name"] for t in figure(app, "Density against rank")["data"]} >= {"measured", "budget"}
    assert "Threshold and k-th value" not in subheaders(app)
    app = browse(variants, "features", sae="budgets", flag="under-budget", alive="false", sort="feature", desc="false")
    assert app.dataframe[0].value["feature"].tolist() == under.tolist()
    assert app.dataframe[0].value["budget_share"].tolist() == pytest.approx((100 * used[under]).tolist(), rel=1e-5)
    assert "of it used" in html(browse(variants, "feature", sae="budgets", feature="3"))
    # an SAE without budgets has no such filter, wherever the address came from
    app = browse(variants, "features", sae="mutual", flag="under-budget")
    assert not app.error and "under-budget" not in app.pills(key="flag").options and len(app.dataframe[0].value) > 100
    app = browse(variants, "feature", sae="mutual", list="flag=under-budget")
    assert not app.error


def test_posterior(browse, variants):
    app = browse(variants, "feature", sae="noisy", feature="0", view="random")
    # σ of feature 0 is 2, below which many of its codes are
    assert "its sign is not sure" in html(app) and "sign unsure on" in html(app) and "± 2.0" in html(app)
    frame = browse(variants, "features", sae="noisy", sort="feature", desc="false").dataframe[0].value
    assert frame["std_mean"].tolist()[:2] == pytest.approx([2, 2 * np.exp(-2)], rel=1e-4)
    assert (frame["kl_mean"] > 0).all()
    assert not browse(variants, "prompt", sae="noisy", text="# a comment", feature="0").error
    app = browse(variants, "prompt", "--no-model", sae="noisy", feature="0")
    assert not app.error


def test_features_filter_and_order(browse, saes):
    app = browse(saes / "plain", "features", sort="feature", desc="false")
    frame = app.dataframe[0].value
    # 256 features without the 21 that never fire
    assert frame["feature"].tolist() == [*range(19), *range(20, 236)]
    app.toggle(key="alive").set_value(False).run()
    assert len(app.dataframe[0].value) == 256
    app.pills(key="flag").set_value(["near-duplicate"]).run()
    assert {15, 16} <= set(app.dataframe[0].value["feature"])
    app.number_input(key="dmin").set_value(0.99).run()
    assert "No feature passes these filters" in words(app.info)
    wanted = {"sort": "feature", "desc": "false", "alive": "false", "flag": "near-duplicate", "dmin": "0.99"}
    assert dict(app.query_params) == wanted


def test_features_search(browse, saes):
    app = browse(saes / "plain", "features", q="self")
    found = app.dataframe[0].value
    assert found["found"].iloc[0] == "token" and "self" in found["top_text"].iloc[0]
    app.text_input(key="q").set_value("like:15").run()
    assert app.dataframe[0].value["feature"].iloc[0] == 16
    app.text_input(key="q").set_value("/^(/").run()
    assert "is not a regular expression" in words(app.error)
    app.text_input(key="q").set_value("like:999999").run()
    assert "feature 999,999 does not exist" in words(app.error)


def test_filters_order_the_walk(browse, saes):
    """J goes to the next row of page Features; a reload keeps that list, because the address carries it."""
    app = browse(saes / "plain", "feature", feature="5", list="sort=feature&desc=true")
    app.button(key="j").click().run()
    assert app.number_input(key="feature").value == 4
    app.button(key="k").click().run().button(key="k").click().run()
    assert app.number_input(key="feature").value == 6
    assert app.query_params["feature"] == "6"
    # a list parameter that makes no sense changes nothing
    app = browse(saes / "plain", "feature", feature="5", list="sort=evil&dmin=x&flag=nope&desc=maybe")
    assert (
        app.session_state["sort"] == "energy" and app.session_state["dmin"] is None and app.session_state["flag"] == []
    )


@pytest.mark.parametrize(
    ("feature", "said"),
    [
        ("19", "density below"),
        ("18", "fires 1 time only"),
        ("14", "dense: fires on"),
        ("17", "lie in the first two tokens of a sequence"),
    ],
)
def test_feature_states(browse, saes, feature, said):
    for sae in ("plain", "signed"):
        app = browse(saes, "feature", sae=sae, feature=feature)
        assert said in html(app) and not app.error
        # a feature that never fires has no examples to choose from
        for view in ("quantiles", "random", "near") if feature != "19" else ():
            app.segmented_control(key="view").set_value(view).run()
            assert not app.exception and not app.error


def test_signs_are_counted(browse, saes):
    # feature 2 has codes of both signs, feature 4 negative ones alone
    assert "1 fire with both signs." in words(browse(saes, sae="signed").caption)
    assert "both signs" not in words(browse(saes, sae="plain").caption)
    frame = browse(saes, "features", sae="signed", sort="feature", desc="false").dataframe[0].value
    share = dict(zip(frame["feature"], frame["positive"], strict=True))
    assert 0.3 < share[2] < 0.7 and share[4] == 0 and share[0] == 1


def test_feature_signed(browse, saes):
    app = browse(saes, "feature", sae="signed", feature="4")
    assert "never positive" in html(app)
    app = browse(saes, "feature", sae="signed", feature="2", sign="neg")
    assert "Strongest, negative" in html(app) and "Strongest, positive" not in html(app)
    assert "no logit weights" in html(app) or "none in this index" in html(app)


@pytest.mark.parametrize("feature", ["999999", "256", "-1", "abc", "1.5", "", "²", "1e3", "9" * 5000])
def test_bad_feature_in_the_address(browse, saes, feature):
    app = browse(saes / "plain", "feature", feature=feature)
    assert "does not exist; this SAE has 0 to 255" in words(app.warning)
    assert app.number_input(key="feature").value == 0


def test_bad_choices_in_the_address(browse, saes):
    app = browse(saes / "plain", "feature", view="nonsense", zoom="", scale="own'--", feature="3")
    assert not app.error and "Strongest" in html(app)
    app = browse(saes, sae="../../etc")
    assert "no SAE named ../../etc here" in words(app.warning)


def test_label(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    app = browse(root, "feature", feature="3")
    hostile = "<b>![x](http://example.com/x.png)</b> $x$"
    app.text_input(key="text-3-0").set_value(hostile).run()
    assert app.text_input(key="text-3-1").value == hostile
    app = browse(root, "feature", feature="3")
    assert app.text_input(key="text-3-1").value == hostile
    # never in Markdown, and escaped wherever it is HTML
    assert hostile not in html(app) and not any(hostile in m.value for m in app.markdown)
    app = browse(root, "features", label="labelled")
    assert app.dataframe[0].value["feature"].tolist() == [3]


def test_label_saved_meanwhile(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    app = browse(root, "feature", feature="3")
    open_index(root / "plain").feature(3).label = "theirs"
    app.text_input(key="text-3-0").set_value("mine").run()
    assert "theirs" in words(app.toast) and "mine" in words(app.toast)
    assert app.text_input(key="text-3-1").value == "theirs"


def test_labels_cannot_be_written(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    (root / "plain" / "labels.sqlite").mkdir()
    app = browse(root, "feature", feature="3")
    app.text_input(key="text-3-0").set_value("mine").run()
    assert "cannot be written" in words(app.toast) and not app.exception
    assert "Strongest" in html(app)


def test_a_text_of_ones_own(browse, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "sae")
    index = open_index(folder)
    number = int(index.table(sort="-n", limit=1).features[0])
    app = browse(folder, "feature", feature=str(number))
    assert "loaded when the first text is read" in words(app.caption)
    hostile = "def add(self, <b>a</b>):\n    return ![x](http://example.com/x.png)\n"
    app.text_area(key="own_text").set_value(hostile).run()
    text = index.encode(hostile)
    fires = int((text.codes_of(number) != 0).sum())
    assert fires and f"fires on {fires} of {int(text.encoded.sum())} tokens" in html(app)
    assert "<b>a</b>" not in html(app) and not any("example.com" in m.value for m in app.markdown)
    # the text stays while one goes through the features
    app.number_input(key="feature").set_value(number + 1 if number + 1 < 256 else 0).run()
    assert app.text_area(key="own_text").value == hostile and "tokens" in html(app)
    app.text_area(key="own_text").set_value("x = 1\n" * 200).run()
    assert "the SAE was trained on contexts of 128; shorten it" in words(app.error)


def test_ablate_on_an_example(browse, trained, tmp_path):
    from saekit.steering import ablate_at

    folder = shutil.copytree(trained, tmp_path / "sae")
    index = open_index(folder)
    number = int(index.table(sort="-n", limit=1).features[0])
    app = browse(folder, "feature", feature=str(number))
    assert "taken away" not in html(app)
    app = pressed(app, "Ablate")
    whole = index.window(index.feature(number).top(1)[0].position, None)
    found = ablate_at(folder, number, whole.tokens, whole.centre)
    assert f"taken away · KL {render.number(found.kl)} nats" in html(app)
    # stored in float16, and computed now from the same activation
    assert found.code == pytest.approx(index.feature(number).top(1)[0].value, rel=2e-3)
    assert "in the index its" not in html(app)
    # another example waits for the button
    app.number_input(key=f"rank-{number}-+").set_value(2).run()
    assert "taken away" not in html(app)


def test_the_panels_that_run_the_model_without_it(browse, saes, tmp_path):
    app = browse(saes, "feature", "--no-model", sae="plain", feature="3")
    line = f"saekit steer {saes / 'plain'} 3 --mode ablate --prompt TEXT"
    assert line in words(app.caption) and not any(b.label == "Ablate" for b in app.button)
    # a feature that never fires has no example
    assert not any(b.label == "Ablate" for b in browse(saes, "feature", sae="plain", feature="19").button)
    root = copied(saes, tmp_path)
    manifest = root / "plain" / "index" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["fingerprints"]["model"] = "sha256:other"
    manifest.write_text(json.dumps(content))
    app = pressed(browse(root, "feature", feature="3"), "Ablate")
    assert "has other weights than the one this index was made with" in words(app.error) and "Strongest" in html(app)


def steered(app: AppTest) -> AppTest:
    return next(b for b in app.button if b.label == "Write").click().run()


def test_steer(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    given = {"feature": "3", "text": "def f():", "doses": "-2, 3.5", "seed": "9007199254740991"}
    app = browse(root, "steer", **given)
    assert "Press Write" in words(app.caption) and "dose" not in html(app)
    app = steered(app)
    shown = html(app)
    assert all(f"<h3>{name}</h3>" in shown for name in ("baseline", "dose −2", "dose +3.5"))
    assert shown.count("next token") == 2 and "KL" in shown and dict(app.query_params) == given
    line = next(c.value for c in app.code)
    assert "steer" in line and "--dose -2 3.5" in line and "--seed 9007199254740991" in line
    # what it wrote is what the command writes
    from saekit.steering import steer

    same = steer(root / "plain", 3, "def f():", doses=(-2, 3.5), seeds=(2**53 - 1,))
    assert all(
        render.escape(run.text.strip())[:20] in shown.replace("<i>", "").replace("</i>", "") for run in same.runs
    )
    next(b for b in app.button if b.label == "Save to notes").click().run()
    assert "dose" not in open_index(root / "plain").feature(4).notes
    assert "steered, add" in open_index(root / "plain").feature(3).notes
    # other options wait for the button again
    app.segmented_control(key="mode").set_value("ablate").run()
    assert "Press Write" in words(app.caption) and app.text_input(key="doses").disabled
    assert "<h3>ablate</h3>" in html(steered(app))


def test_steer_in_every_bad_state(browse, saes):
    assert "Type the beginning of a text" in words(browse(saes, "steer").caption)
    app = browse(saes, "steer", text="x", doses="1, 2, 3, 4, 5", seed="9007199254740993")
    assert "seed 9007199254740993: it is a number from 0 to 9007199254740991" in words(app.warning)
    assert app.number_input(key="seed").value == 0 and app.text_input(key="doses").value == "-4, 4"
    app.text_input(key="doses").set_value("four").run()
    assert "doses four: up to four numbers with commas between" in words(app.error)
    app = browse(saes, "steer", "--no-model", text="x", feature="7", sae="plain")
    assert "--no-model" in words(app.error) and "saekit steer" in words(app.error) and " 7 " in words(app.error)
    # feature 19 never fires: there is nothing to measure a dose by
    assert "did not fire in the index" in words(
        steered(browse(saes, "steer", text="x", feature="19", sae="plain")).error
    )


def test_broken_index(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    codes = root / "plain" / "index" / "codes.safetensors"
    codes.write_bytes(codes.read_bytes()[:-2])
    for page in (*PAGES, "evaluate"):
        app = browse(root, page)
        assert "the manifest says" in words(app.error) and "saekit index" in words(app.error)
    # what can be said without the index is said
    assert "sae.safetensors" in browse(root, "data").dataframe[0].value["file"].tolist()


def test_index_of_another_sae(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    config = json.loads((root / "plain" / "config.json").read_text())
    (root / "plain" / "config.json").write_text(json.dumps({**config, "fingerprint": "sha256:other"}))
    assert "belongs to SAE" in words(browse(root).error)


def test_one_of_several_is_broken(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    shutil.copytree(root / "plain", root / "a-broken-one")
    shutil.rmtree(root / "a-broken-one" / "index")
    app = browse(root)
    # the good one is shown although the broken one comes first in the alphabet
    assert app.selectbox(key="sae").value == "plain"
    assert "a-broken-one: " in words(app.warning) and "has no index yet: run saekit index" in words(app.warning)


def test_links_that_leave_the_folder(browse, saes, tmp_path):
    root = tmp_path / "saes"
    shutil.copytree(saes / "plain", root / "plain")
    (root / "elsewhere").symlink_to(saes / "signed")
    app = browse(root)
    assert not app.selectbox


def test_index_rebuilt(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    app = browse(root)
    manifest = root / "plain" / "index" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "warnings": ["another build"]}))
    app.run()
    assert not app.error and "was rebuilt" in words(app.toast)


def test_empty_folder(browse, tmp_path):
    assert "holds no SAE folder" in words(browse(tmp_path).error)


def test_prompt_without_model(browse, saes):
    app = browse(saes, "prompt", "--no-model", sae="plain")
    assert app.dataframe[0].value["feature"].size > 0
    app = browse(saes, "prompt", "--no-model", sae="signed")
    assert "index without by_token" in words(app.error)


def test_prompt(browse, saes):
    app = browse(saes / "plain", "prompt", text="def add(self):\n    return 1")
    assert not app.error
    rows = app.dataframe[0].value
    best = int(rows["feature"].iloc[0])
    assert (rows["code"].abs().diff().dropna() <= 0).all()
    assert f"feature {best:,}" in html(app)
    app.text_area(key="text").set_value("x = 1\n" * 200).run()
    assert "the SAE was trained on contexts of 128; shorten it" in words(app.error)


TEXT = "def add(self, a):\n    return self.total + a"


def test_two_texts_beside_each_other(browse, saes):
    app = browse(saes / "plain", "prompt", text=TEXT, beside="import os")
    assert not app.error and app.toggle(key="two").value
    assert app.text_area(key="beside").value == "import os"
    rows = app.dataframe[0].value
    index = open_index(saes / "plain")
    for name, text in (("code", TEXT), ("beside", "import os")):
        codes = index.encode(text)
        for j, value in zip(rows["feature"], rows[name], strict=True):
            c = codes.codes_of(j)
            assert value == c[abs(c).argmax()]
    largest = rows[["code", "beside"]].abs().max(axis=1)
    assert largest.is_monotonic_decreasing and "Strongest anywhere in both texts" in words(app.caption)
    # put away, it leaves the address
    app.toggle(key="two").set_value(False).run()
    assert "beside" not in app.query_params and "beside" not in app.dataframe[0].value
    assert not app.exception and not app.error


@pytest.mark.parametrize("named", ["self", " self", "#5"])
def test_rank_by_effect_on_a_next_token(browse, saes, named):
    import torch

    from saekit.model import load_model
    from saekit.sae import SAE

    app = browse(saes / "plain", "prompt", text=TEXT, rank="effect", next=named)
    assert not app.error and dict(app.query_params)["rank"] == "effect"
    index, sae = open_index(saes / "plain"), SAE.load(saes / "plain")
    pieces = index.vocabulary
    token = 5 if named == "#5" else pieces.index(named.encode() if named.encode() in pieces else b" " + named.encode())
    W_U_VD, _ = load_model(index.manifest["model"]["id"], compute="fp32").unembedding()
    codes = index.encode(TEXT)
    effects = (sae.W_dec @ W_U_VD[token]).detach()
    wanted = {j: float(v * effects[j]) for j, v in zip(*codes.strongest(999), strict=True)}
    rows = app.dataframe[0].value
    best = sorted(wanted, key=lambda j: -abs(wanted[j]))[:16]
    assert rows["feature"].tolist() == best
    torch.testing.assert_close(torch.tensor(rows["effect"].tolist()), torch.tensor([wanted[j] for j in best]))
    assert f"(token {token:,}): code × decoder row · unembedding" in html(app)


def test_effect_before_a_soft_cap_says_so(browse, saes, tmp_path, language_model):
    """A Llama whose configuration names a cap: the same weights, so the index is its own."""
    root = copied(saes, tmp_path)
    capped = shutil.copytree(language_model, tmp_path / "capped")
    config = json.loads((capped / "config.json").read_text())
    (capped / "config.json").write_text(json.dumps({**config, "final_logit_softcapping": 30.0}))
    manifest = root / "plain" / "index" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["model"]["id"] = str(capped)
    manifest.write_text(json.dumps(content))
    app = browse(root, "prompt", text=TEXT, rank="effect", next="self")
    assert render.escape("before the model's soft cap of the logits at ±30") in html(app)


def test_effect_where_there_is_none(browse, saes):
    app = browse(saes, "prompt", "--no-model", sae="plain", rank="effect")
    assert "The effect needs the language model" in words(app.caption) and "effect" not in app.dataframe[0].value
    app = browse(saes, "prompt", sae="plain", rank="effect", text=TEXT)
    assert "Name a next token, or click a token" in words(app.caption)
    # the token that follows the clicked one
    app.session_state["token"] = 1
    app.run()
    assert "on the logit of" in html(app) and "effect" in app.dataframe[0].value
    app = browse(saes, "prompt", sae="plain", rank="effect", text=TEXT, next="no such token")
    assert "'no such token' is no single token of this vocabulary" in words(app.warning)
    assert app.dataframe[0].value["feature"].size and not app.error
    app = browse(saes, "prompt", sae="plain", rank="nonsense", hide="nothing", next="x" * 500, text=TEXT)
    assert not app.error and app.segmented_control(key="rank").value == "magnitude"


def test_dense_and_start_features_are_hidden(browse, saes):
    shown = browse(saes, "prompt", "--no-model", sae="plain").dataframe[0].value["feature"].tolist()
    app = browse(saes, "prompt", "--no-model", sae="plain", hide="dense")
    # 14 is dense
    assert 14 in shown and 14 not in app.dataframe[0].value["feature"].tolist()
    app = browse(saes, "prompt", "--no-model", sae="plain", hide="start-of-sequence")
    hidden = {j for j in range(256) if "start-of-sequence" in open_index(saes / "plain").feature(j).flags}
    assert 17 in hidden and not hidden & set(app.dataframe[0].value["feature"])


def test_error_per_token(browse, saes):
    app = browse(saes / "plain", "prompt", text=TEXT)
    share = open_index(saes / "plain").encode(TEXT).error_share
    assert f"largest {render.percent(float(share.max()))} at token {int(share.argmax())}" in html(app)


@pytest.mark.parametrize("options", [(), ("--no-model",)])
def test_a_document_of_the_index(browse, saes, options):
    app = browse(saes, "prompt", *options, sae="plain", document="1")
    index = open_index(saes / "plain")
    positions = index.document_positions(1)
    assert app.segmented_control(key="source").value == "A document of the index" and not app.error
    assert render.escape(f"{index.documents[1]['name']} · {len(positions):,} tokens in the index") in html(app)
    codes = index.passage(positions[:2000])
    j, value = (x[0] for x in codes.strongest(1))
    assert (app.dataframe[0].value["feature"][0], app.dataframe[0].value["code"][0]) == (j, value)
    # a long one in parts
    if len(positions) > 2000:
        app.number_input(key="part-1").set_value(2).run()
        assert app.dataframe[0].value["code"][0] == index.passage(positions[2000:4000]).strongest(1).values[0]
    # another source takes it out of the address
    app.segmented_control(key="source").set_value("A passage of the index").run()
    assert "document" not in app.query_params and not app.error
    for bad in ("99999", "-1", "x"):
        app = browse(saes, "prompt", *options, sae="plain", document=bad)
        assert "this index has 0 to" in words(app.warning) and not app.error


def test_a_variant_of_ones_own(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    file = tmp_path / "own.py"
    file.write_text("from saekit.variants import TopK\n\n\nclass Own(TopK):\n    name = 'own_topk'\n", encoding="utf-8")
    config = root / "plain" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "variant": "own_topk"}))
    # the index needs no variant; a text that is typed does
    assert not browse(root, "feature", feature="3").error
    assert "own_topk is not built in; pass --variant-file" in words(browse(root, "prompt", text="def add(self):").error)
    try:
        app = browse(root, "prompt", "--variant-file", str(file), text="def add(self):")
    finally:
        VARIANTS.pop("own_topk", None)
    assert not app.error and app.dataframe[0].value["feature"].size > 0


def test_model_is_gone(browse, saes, tmp_path):
    root = copied(saes, tmp_path)
    manifest = root / "plain" / "index" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["model"]["id"] = str(tmp_path / "gone")
    manifest.write_text(json.dumps(content))
    app = browse(root, "prompt", text="x")
    assert str(tmp_path / "gone") in words(app.error)
