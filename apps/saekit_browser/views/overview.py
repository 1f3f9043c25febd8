"""The SAE at a glance: how well it does, how its features are spread, and where to begin looking."""

import json

import numpy as np
import plotly.graph_objects as go
import streamlit as st
from saekit_browser import panels, state

from saekit.errors import SaekitError
from saekit.feature_index import render

CARDS = 12
COLOUR = render.ORANGE
# density of the spectrum's bins: eight to a decade, from 10⁻⁷ to 1
EDGES = np.array([float(f"{10.0**e:.3g}") for e in np.arange(-7, 0.01, 0.125)])


@state.shown
def page():
    folder = state.chosen()
    if folder.problem:
        st.title(state.literal(folder.name), anchor=False)
        st.error(state.literal(folder.problem), icon=":material/error:")
        others()
        return
    idx = state.index()
    st.title(state.literal(idx.name), anchor=False)
    # filled last: reading the evaluation imports more than the rest of the page needs
    top = st.container()
    left, right = st.columns([3, 2], gap="large")
    with left:
        spectrum(idx)
    with right:
        panels.crowd(idx)
    worth_a_look(idx)
    panels.variant(idx)
    with top:
        health(idx)
    provenance(idx)
    others()


def health(idx):
    """One sentence with the losses themselves, warnings in words, and the same numbers as cards."""
    try:
        from saekit.evaluation.report import load_evaluation

        evaluation = load_evaluation(idx.path.parent)
    except SaekitError as error:
        st.info(state.literal(str(error)), icon=":material/straighten:")
        silent = int((idx.column("n") == 0).sum())
        cards(
            ("Features per token", f"{idx.manifest['Z'] / max(1, idx.n_encoded):.1f}", None, "L0: features that fire on a token, mean over the index"),
            ("Silent", render.percent(silent / len(idx)), f"{silent:,} of {len(idx):,}", f"No firing on {idx.n_encoded:,} tokens"),
        )  # fmt: skip
        return
    st.html(render.fragment(f'<p class="lead">{render.escape(evaluation.health())}</p>'))
    for warning in evaluation.warnings():
        st.warning(state.literal(warning), icon=":material/warning:")
    m = evaluation.metrics()

    def value(key: str, style: str = "{:.3f}") -> str:
        return "–" if m[key]["value"] is None else style.format(m[key]["value"])

    def spread(key: str) -> str | None:
        ci = m[key]["ci95"]
        return f"± {render.number((ci[1] - ci[0]) / 2, 2)}" if ci else None

    shown = []
    if "fvu" in m:
        pca = m["fvu"]["baselines"].get("pca_l0")
        beside = f" PCA with as many components: {pca:.3f}." if pca is not None else ""
        shown.append(("Unexplained variance", value("fvu"), spread("fvu"), f"FVU = Σ‖x−x̂‖² / Σ‖x−μ‖²; 0 is perfect, 1 is predicting the mean.{beside}"))  # fmt: skip
    if "l0" in m:
        shown.append(("Features per token", value("l0", "{:.1f}"), spread("l0"), f"L0. {m['l0']['note']}"))
    if "alive" in m:
        silent = 1 - m["alive"]["value"]
        shown.append(("Silent", render.percent(silent), f"{round(silent * len(idx)):,} of {len(idx):,}", f"No firing on {m['alive']['n']:,} tokens"))  # fmt: skip
    if "ce_added" in m:
        losses = f"{value('ce_clean', '{:.2f}')} → {value('ce_sae', '{:.2f}')} nats per token with the reconstruction in place"
        shown.append(("Loss added", f"{value('ce_added')} nats", spread("ce_added"), losses))
    if m.get("ce_recovered_mean", {}).get("value") is not None:
        parts = f"Of the loss between the mean at the site ({value('ce_mean', '{:.2f}')}) and the clean model ({value('ce_clean', '{:.2f}')} nats)"
        shown.append(("Recovered", render.percent(m["ce_recovered_mean"]["value"]), "against the mean", parts))
    cards(*shown)


def cards(*rows: tuple[str, str, str | None, str]):
    with st.container(horizontal=True, gap="small", key="cards"):
        for name, value, beside, explained in rows:
            st.metric(
                name,
                value,
                beside,
                delta_color="off",
                delta_arrow="off",
                help=explained,
                border=True,
                width=210,
                height="stretch",
            )


def spectrum(idx):
    st.subheader("How often features fire", anchor=False)
    density = idx.column("density")
    counts, _ = np.histogram(density[density > 0], EDGES)
    first, last = np.flatnonzero(counts)[[0, -1]] if counts.any() else (0, 1)
    shown = slice(max(0, first - 2), last + 3)
    low, high = EDGES[:-1][shown], EDGES[1:][shown]
    names = [f"{render.percent(a)} to {render.percent(b)}" for a, b in zip(low, high, strict=True)]
    figure = go.Figure(
        go.Bar(
            x=np.sqrt(low * high),
            y=counts[shown],
            width=(high - low) * 0.92,
            marker_color=COLOUR,
            hovertext=names,
            hovertemplate="%{y:,} features<br>fire on %{hovertext} of tokens<extra></extra>",
        )
    )
    figure.update_xaxes(type="log", title="share of tokens", tickformat=".0%", dtick=1, tickvals=10.0 ** np.arange(-7, 1), ticktext=["10⁻⁷", "10⁻⁶", "0.001 %", "0.01 %", "0.1 %", "1 %", "10 %", "100 %"])  # fmt: skip
    figure.update_yaxes(title="features")
    figure.update_layout(height=290, margin={"l": 0, "r": 0, "t": 8, "b": 0}, clickmode="event+select", bargap=0)
    event = st.plotly_chart(
        figure,
        key=f"spectrum-{idx.name}",
        on_select="rerun",
        selection_mode="points",
        config={"displayModeBar": False},
        alt="Histogram of feature densities; the numbers follow below",
    )
    silent = int((density == 0).sum())
    dense = int((density > 0.1).sum())
    both = int(((idx.column("n_pos") > 0) & (idx.column("n_neg") > 0)).sum())
    signs = f" {both:,} fire with both signs." if idx.signed else ""
    st.caption(
        f"{silent:,} silent feature{' is' if silent == 1 else 's are'} left out; {dense:,} fire on more than 10 % of tokens.{signs} "
        "A bar opens its features."
    )
    with st.expander("Numbers"):
        st.dataframe({"share of tokens": names, "features": counts[shown]}, hide_index=True, height=220)
    if event.selection.points:
        point = event.selection.points[0]["point_index"]
        state.follow(state.FEATURES, dmin=repr(float(low[point])), dmax=repr(float(high[point])))


# where to begin


def worth_a_look(idx):
    st.subheader("Worth a look", anchor=False)
    with st.container(key="strip"):
        for number, html in strip(idx, idx.fingerprint):
            with st.container(border=True, key=f"card-{number}", gap="xsmall"):
                st.page_link(state.FEATURE, label=f"Feature {number:,}", icon="", query_params={"feature": str(number)})
                st.html(html)


@st.cache_data(show_spinner=False, max_entries=16)
def strip(_idx, fingerprint: str) -> list[tuple[int, str]]:
    cards = []
    for number, reason in picks(_idx):
        f = _idx.feature(number)
        signs = "+-" if f.signed and f.column("n_neg") and f.column("n_pos") else "+" if f.column("n_pos") else "-"
        examples = [e for s in signs for e in f.top(3 if len(signs) == 1 else 2, s, zoom="stacked")]
        tops = "".join(f'<span class="tag">{render.escape(t.text)}</span>' for t in f.tokens(3))
        head = f'<p>{render.escape(f.label) or tops}</p><p class="q">{render.escape(reason)}</p>'
        lines = "".join(render.example_html(e, f.max, "stacked") for e in examples)
        cards.append((number, render.fragment(head, lines)))
    return cards


def picks(idx) -> list[tuple[int, str]]:
    """(feature, why) of up to twelve different features, the same ones for the same index."""
    n = idx.column("n")
    often = n >= min(20, max(1, n.max(initial=0)))
    chosen: dict[int, str] = {}

    def take(score: np.ndarray, allowed: np.ndarray, count: int, reason: str):
        score = np.where(allowed & np.isfinite(score), score, -np.inf)
        for j in np.argsort(-score, kind="stable")[: count + len(chosen)].tolist():
            if score[j] > -np.inf and j not in chosen and count > 0:
                chosen[j] = reason.format(score[j])
                count -= 1

    sparse = often & (idx.column("density") < 0.05)
    take(idx.column("token_f1").astype(float), sparse, 3, "one token explains it, F1 {:.2f}")
    if idx.has_logits:
        take(idx.column("logit_kurtosis").astype(float), sparse, 3, "raises few tokens strongly")
    if idx.signed:
        rarer = np.minimum(idx.column("n_pos"), idx.column("n_neg")) / n.clip(min=1)
        take(rarer, often & (rarer > 0.05), 2, "two-sided, {:.0%} on the rarer side")
    take(idx.column("token_entropy").astype(float), sparse, 2, "many different tokens, {:.1f} bits")
    take(idx.column("density"), often, 1, "fires on {:.1%} of tokens")
    cosine = idx.column("max_dec_cos").astype(float)
    take(np.abs(cosine) if idx.signed else cosine, often, 1, "nearest decoder row at cosine {:.2f}")
    draw = np.random.default_rng(int(idx.fingerprint[7:23], 16)).random(len(idx))
    take(draw, n > 0, CARDS - len(chosen), "drawn at random")
    return list(chosen.items())


# below


def provenance(idx):
    with st.expander("Provenance"):
        config = idx.path.parent / "config.json"
        st.caption("SAE")
        st.code(
            config.read_text(encoding="utf-8") if config.is_file() else "no config.json", language="json", height=260
        )
        st.caption("Index")
        rest = {k: v for k, v in idx.manifest.items() if k != "files"}
        st.code(json.dumps(rest, indent=1, ensure_ascii=False), language="json", height=260)


def others():
    """SAEs of the folder that cannot be shown, each with its reason."""
    for folder in state.folders():
        if folder.problem and folder != state.chosen():
            st.warning(state.literal(f"{folder.name}: {folder.problem}"), icon=":material/folder_off:")


page()
