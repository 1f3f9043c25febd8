"""Two SAEs: what was measured of both, and which features of one are which of the other."""

import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st
from saekit_browser import jobs, state

from saekit.errors import SaekitError
from saekit.feature_index import render
from saekit.feature_index.matching import MATCHED, RELATED, Matching, agreement, same_tokens

LISTED = 500
KINDS = {"matched": "Matched", "split": "Split", "merged": "Merged", "first": "Only in A", "second": "Only in B"}


@state.shown
def page():
    st.title("Compare", anchor=False)
    good = [folder.name for folder in state.folders() if folder.problem is None]
    if len(good) < 2:
        raise SaekitError(
            f"{state.arguments().path} holds one SAE that can be shown; browse a folder that holds several: saekit browse {state.arguments().path.parent}"
        )
    state.enter("compare")
    if st.session_state.a not in good:
        st.session_state.a = state.chosen().name if state.chosen().name in good else good[0]
    if st.session_state.b not in good or st.session_state.b == st.session_state.a:
        st.session_state.b = next(name for name in good if name != st.session_state.a)
    with st.container(horizontal=True):
        st.selectbox("A", good, key="a", persist_state="session", width=320)
        st.selectbox("B", good, key="b", persist_state="session", width=320)
    if st.session_state.a == st.session_state.b:
        st.info("A and B are the same SAE.", icon=":material/content_copy:")
    comparison()


@state.shown
def comparison():
    a, b = (state.named_index(st.session_state[key]) for key in ("a", "b"))
    measured(a, b)
    st.subheader("Features", anchor=False)
    found = matching(a, b)
    if found is None:
        state.leave("compare")
        return
    features(a, b, found)


@st.fragment(key="compare")
@state.shown
def features(a, b, found):
    st.html(render.fragment(f"<p>{render.escape(found.summary())}</p>"))
    st.caption(
        f"S is the cosine of decoder rows, of signed codes its size. Matched: each is the other's nearest and S ≥ {MATCHED}. Split and "
        f"merged: several of one have the same nearest in the other, S ≥ {RELATED}."
    )
    kind = st.segmented_control(
        "Show", list(KINDS), format_func=lambda name: KINDS[name], required=True, key="kind", persist_state="session"
    )
    state.leave("compare")
    assert kind is not None
    rows = listed(found, kind)
    if not rows:
        st.caption("None.")
        return
    table(a, b, kind, rows)


def matching(a, b) -> Matching | None:
    """Which features are which: at once where that is quick, else from the file that a job leaves; None until then."""
    own = [idx.manifest["fingerprints"]["sae"] for idx in (a, b)]
    D = a.decoder().shape[1]
    if len(a) * len(b) * D <= jobs.LARGE:
        return quick(a, b, *own)
    folder, kind = a.path.parent, f"match-{state.digest(own)}"
    file = jobs.place(folder, kind, ".safetensors")
    if file.is_file() and jobs.result(folder, kind) is not None:
        return kept(str(file), file.stat().st_mtime_ns)
    st.caption(f"{len(a):,} by {len(b):,} cosines of {D:,} numbers take a while; they are computed once and kept.")
    line = shlex.join(["saekit", "compare", str(folder), str(b.path.parent), "--features"])
    jobs.panel(folder, jobs.Task(kind, "Match the features", line, partial(match_and_keep, a, b, file)))
    return None


def match_and_keep(a, b, file) -> dict:
    found = a.compare(b)
    found.save(file)
    return {"summary": found.summary()}


@st.cache_resource(show_spinner="Comparing decoder rows …", max_entries=4)
def quick(_a, _b, first: str, second: str) -> Matching:
    return _a.compare(_b)


@st.cache_resource(show_spinner=False, max_entries=4)
def kept(file: str, changed: int) -> Matching:
    return Matching.load(Path(file))


@st.cache_data(show_spinner=False, max_entries=1024)
def correlation(_a, _b, first: str, second: str, i: int, j: int) -> float | None:
    return agreement(_a, _b, i, j)


def measured(a, b):
    """Stored metrics of both, each with its interval; a difference inside the intervals is said to be none."""
    from saekit.evaluation.comparison import COLUMNS
    from saekit.evaluation.report import load_evaluation

    try:
        both = [load_evaluation(idx.path.parent) for idx in (a, b)]
    except SaekitError as error:
        st.caption(state.literal(str(error)))
        return
    data = [{k: e.content["data"].get(k) for k in ("store", "split", "site", "model")} for e in both]
    if data[0] != data[1]:
        st.warning("They were measured on different stores, splits or sites: the numbers do not compare.")
    rows = []
    for name in COLUMNS:
        one, two = (e.metrics().get(name) for e in both)
        if not one or not two or one["value"] is None or two["value"] is None:
            continue
        halves = [(m["ci95"][1] - m["ci95"][0]) / 2 if m["ci95"] else 0.0 for m in (one, two)]
        difference = two["value"] - one["value"]
        rows.append(
            {
                "metric": name,
                "A": with_half(one["value"], halves[0]),
                "B": with_half(two["value"], halves[1]),
                "B − A": render.number(difference, 3),
                "": "inside the intervals" if halves[0] and abs(difference) <= sum(halves) else "",
                "better": {"lower": "lower", "higher": "higher"}.get(one["better"], ""),
            }
        )
    st.dataframe(pd.DataFrame(rows), hide_index=True, height="content", key="measured", alt="Metrics of both SAEs")


def with_half(value: float, half: float) -> str:
    """A number and half of its interval, where that shows in the digits."""
    return render.number(value, 4) + (f" ± {render.number(half, 2)}" if half > 1e-4 * abs(value) else "")


def listed(found, kind: str) -> list[tuple[list[int], list[int], float]]:
    """(features of A, features of B, S) of each line, strongest or least similar first."""
    if kind == "matched":
        return [([i], [j], float(found.similarity_F[i])) for i, j in found.matched[:LISTED].tolist()]
    if kind == "split":
        return [([i], js, float(np.mean(found.similarity_G[js]))) for i, js in list(found.split.items())[:LISTED]]
    if kind == "merged":
        return [(js, [i], float(np.mean(found.similarity_F[js]))) for i, js in list(found.merged.items())[:LISTED]]
    if kind == "first":
        return [
            ([i], [int(found.nearest_F[i])], float(found.similarity_F[i])) for i in found.only_first[:LISTED].tolist()
        ]
    return [([int(found.nearest_G[j])], [j], float(found.similarity_G[j])) for j in found.only_second[:LISTED].tolist()]


def table(a, b, kind: str, rows):
    frame = pd.DataFrame(
        {
            "rank": range(1, len(rows) + 1),
            "a": [", ".join(map(str, left)) for left, _, _ in rows],
            "about a": [state.about(a, left[0], 2) for left, _, _ in rows],
            "S": [s for _, _, s in rows],
            "b": [", ".join(map(str, right)) for _, right, _ in rows],
            "about b": [state.about(b, right[0], 2) for _, right, _ in rows],
        }
    )
    event = st.dataframe(
        frame,
        hide_index=True,
        height=min(430, 40 + 33 * len(frame)),
        key=f"pairs-{kind}-{a.name}-{b.name}",
        on_select="rerun",
        selection_mode="single-cell",
        column_config={
            "rank": st.column_config.NumberColumn("", width=40),
            "a": st.column_config.TextColumn("Feature of A", width=140),
            "about a": st.column_config.TextColumn("Label or top tokens"),
            "S": st.column_config.NumberColumn("S", format="%.3f", width=70),
            "b": st.column_config.TextColumn("Feature of B", width=140),
            "about b": st.column_config.TextColumn("Label or top tokens"),
        },
        alt="Features of both SAEs; a row shows the two side by side",
    )
    row = state.clicked(event, "rank")
    left, right, _ = rows[row or 0]
    pair(a, b, left[0], right[0])


def pair(a, b, i: int, j: int):
    """Both features on their own examples, and how their codes go together where the tokens are the same."""
    r = correlation(a, b, a.fingerprint, b.fingerprint, i, j)
    if r is not None:
        st.caption(f"Correlation of the codes on the same {a.n_encoded:,} tokens: {r:.3f}")
    elif not same_tokens(a, b):
        st.caption("The two indexes hold different tokens, so their codes cannot be compared; decoder rows alone are.")
    for column, idx, number, name in zip(st.columns(2, gap="large"), (a, b), (i, j), "AB"):
        with column:
            st.page_link(
                state.FEATURE,
                label=f"Feature {number:,} of {name}, {idx.name}",
                icon=":material/lens_blur:",
                query_params={"sae": idx.name, "feature": str(number)},
            )
            st.html(shown(idx, idx.fingerprint, number))


@st.cache_data(show_spinner=False, max_entries=128)
def shown(_idx, fingerprint: str, number: int) -> str:
    f = _idx.feature(number)
    return render.fragment(render.numbers_html(f), render.view_html(f, "top", "snippet"))


page()
