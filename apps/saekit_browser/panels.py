"""Panels of Overview that go beyond counting: norms, features per token, and what a variant was trained for.

Each reads one answer of the index, draws it, and says the same in words and numbers. A panel whose question an SAE does not
raise (one fixed count per token, no budgets) is left out.
"""

from typing import Literal

import numpy as np
import plotly.graph_objects as go
import streamlit as st

from saekit.feature_index import FeatureIndex, aims, per_token, render
from saekit_browser import state

COLOUR, OTHER, QUIET = render.ORANGE, render.BLUE, "#888888"
HEIGHT = 320


def draw(figure: go.Figure, name: str, alt: str, height: int = HEIGHT, **layout):
    """The same margins and words for all; the figure answers to hovering alone."""
    layout = {"legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, "bargap": 0, **layout}
    figure.update_layout(height=height, margin={"l": 0, "r": 0, "t": 8, "b": 0}, **layout)
    st.plotly_chart(figure, key=name, config={"displayModeBar": False}, alt=alt)


def numbers(rows: dict, height: int | Literal["content"] = "content"):
    with st.expander("Numbers"):
        st.dataframe(rows, hide_index=True, height=height)


# norms


@st.cache_resource(show_spinner=False, max_entries=8)
def _norms(_idx: FeatureIndex, fingerprint: str) -> tuple[per_token.Norms, list[str]]:
    found = _idx.norms()
    return found, [render.hover_text(*parts) for parts in _idx.snippets(found.positions)]


def norms(idx: FeatureIndex):
    """The ZF plot (arXiv 2503.24277)."""
    st.subheader("Norm of the code against the norm of x", anchor=False)
    found, texts = _norms(idx, idx.fingerprint)
    if not len(found.x):
        st.caption("No token has both an activation and a code that are not zero.")
        return
    ends = np.array([float(found.x.min()), float(found.x.max())])
    figure = go.Figure()
    for delta, strong in ((0.25, 0.28), (0.5, 0.16)):
        low, high = ends / (1 + delta) ** 0.5, ends / (1 - delta) ** 0.5
        figure.add_scatter(
            x=[*ends, *ends[::-1]],
            y=[*low, *high[::-1]],
            fill="toself",
            fillcolor=f"rgba(136, 136, 136, {strong})",
            line_width=0,
            mode="lines",
            hoverinfo="skip",
            name=f"δ = {delta}",
        )
    figure.add_scatter(x=ends, y=ends / 2**0.5, mode="lines", line={"color": QUIET, "dash": "dot"}, name="δ = 1", hoverinfo="skip")  # fmt: skip
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": QUIET}, name="y = x", hoverinfo="skip")
    figure.add_scatter(
        x=found.x,
        y=found.code,
        mode="markers",
        marker={"size": 4, "opacity": 0.4, "color": COLOUR},
        text=texts,
        hovertemplate="%{text}<br>‖x‖ %{x:.3s}, ‖f‖ %{y:.3s}<extra></extra>",
        name="token",
    )
    figure.update_xaxes(title="‖x‖")
    figure.update_yaxes(title="‖f‖")
    within = {delta: render.percent(share) for delta, share in found.inside.items()}
    said = f"mean of ‖f‖ / ‖x‖ {found.ratio:.3f}; within δ = 0.25, 0.5, 1: {', '.join(within.values())}"
    draw(figure, f"norms-{idx.name}", f"Scatter of ‖f‖ against ‖x‖ of {len(found.x):,} tokens: {said}", height=380)
    st.caption(
        f"ZF plot of {len(found.x):,} tokens, drawn evenly; {said}. f = (a₁‖d₁‖, …, ‖b_dec‖); a band holds ‖x‖² within (1 ± δ)‖f‖². "
        "A code of the right length need not be the right code."
    )
    if found.constant:
        st.caption(
            "‖x‖ is the same for all tokens, as where inputs are normalised per token: only the height says something."
        )
    numbers(
        {
            "number": ["tokens", *(f"within δ = {d}" for d in within), "‖f‖ < ‖x‖", "mean ‖f‖ / ‖x‖", "median ‖f‖ / ‖x‖", "median ε_LBO", "left out (a norm of 0)"],
            "value": [f"{len(found.x):,}", *within.values(), render.percent(found.under), f"{found.ratio:.4f}", f"{found.median:.4f}", render.number(found.eps_lbo), f"{found.undefined:,}"],
        }
    )  # fmt: skip


# features per token


@st.cache_resource(show_spinner=False, max_entries=8)
def _crowd(_idx: FeatureIndex, fingerprint: str) -> per_token.Crowd:
    return _idx.crowd()


def crowd(idx: FeatureIndex):
    """How many features fire on a token, and whether that is what the SAE was trained for."""
    st.subheader("Features per token", anchor=False)
    found = _crowd(idx, idx.fingerprint)
    width = max(1, -(-len(found.counts) // 64))
    binned = np.add.reduceat(found.counts, np.arange(0, len(found.counts), width))
    figure = go.Figure(
        go.Bar(
            x=np.arange(len(binned)) * width + (width - 1) / 2,
            y=binned,
            width=width * 0.92,
            marker_color=COLOUR,
            hovertemplate="%{y:,} tokens with %{x:.0f} features<extra></extra>",
        )
    )
    figure.update_xaxes(title="features that fire", rangemode="tozero")
    figure.update_yaxes(title="tokens")
    draw(figure, f"crowd-{idx.name}", f"Histogram of features per token, mean {found.mean:.1f}", height=290)
    aim = idx.aim()
    trained = f" {state.literal(str(aim))}" if aim else ""
    st.caption(f"Mean {found.mean:.1f} over {int(found.counts.sum()):,} tokens.{trained}")
    if aim and aim.warning:
        st.warning(state.literal(aim.warning), icon=":material/warning:")


def error(idx: FeatureIndex):
    """L0 against the error, where tokens differ in L0."""
    st.subheader("Error by features per token", anchor=False)
    groups = _crowd(idx, idx.fingerprint).error
    figure = go.Figure()
    at = [(g.low + g.high) / 2 for g in groups]
    figure.add_scatter(x=[*at, *at[::-1]], y=[*(g.q25 for g in groups), *(g.q75 for g in groups[::-1])], fill="toself", fillcolor="rgba(136, 136, 136, .25)", line_width=0, mode="lines", hoverinfo="skip", name="half of the tokens")  # fmt: skip
    names = [f"{g.low:,} to {g.high:,}" if g.low < g.high else f"{g.low:,}" for g in groups]
    figure.add_scatter(
        x=at,
        y=[g.median for g in groups],
        mode="lines+markers",
        line={"color": COLOUR},
        text=names,
        customdata=[g.tokens for g in groups],
        hovertemplate="%{text} features: %{y:.3f}, %{customdata:,} tokens<extra></extra>",
        name="median",
    )
    figure.update_xaxes(title="features that fire", rangemode="tozero")
    figure.update_yaxes(title="‖x − x̂‖² / ‖x‖²", rangemode="tozero")
    ends = f"{groups[0].median:.3f} at {names[0]}, {groups[-1].median:.3f} at {names[-1]} features"
    draw(figure, f"error-{idx.name}", f"Median relative error by features per token: {ends}", height=380)
    st.caption(f"Share of ‖x‖² that the reconstruction misses, median and quartiles of equal groups: {ends}.")
    numbers({"features": names, "tokens": [g.tokens for g in groups], "25 %": [g.q25 for g in groups], "median": [g.median for g in groups], "75 %": [g.q75 for g in groups]}, 220)  # fmt: skip


def ends(idx: FeatureIndex):
    """The tokens with the most and the fewest features, in their text."""
    found = _crowd(idx, idx.fingerprint)
    most = len(found.counts) - 1
    columns = render.counted_html(found.most, most, title="Tokens with the most features")
    columns += render.counted_html(found.fewest, most, title="Tokens with the fewest")
    legend = render.legend_html(most, False, "most features on a token")
    st.html(render.fragment(f'{legend}<div class="cols wide">{columns}</div>'))


# thresholds and budgets


@st.cache_resource(show_spinner=False, max_entries=8)
def _kth_values(_idx: FeatureIndex, fingerprint: str, k: int) -> per_token.KthValues:
    return _idx.kth_values(k)


def threshold(idx: FeatureIndex, aim: aims.Aim):
    """One threshold for all tokens beside the code that each token's own k-th place would cut at."""
    st.subheader("Threshold and k-th value", anchor=False)
    if not idx.has_by_token:
        st.caption(state.literal(f"This index has no by_token; run saekit index {idx.path.parent}"))
        return
    k = round(aim.wanted)
    found = _kth_values(idx, idx.fingerprint, k)
    if not len(found.values):
        st.caption(f"No token has {k} features.")
        return
    counts, edges = np.histogram(found.values, 48)
    figure = go.Figure(
        go.Bar(
            x=(edges[:-1] + edges[1:]) / 2,
            y=counts,
            width=np.diff(edges) * 0.92,
            marker_color=COLOUR,
            hovertemplate="%{y:,} tokens at %{x:.3s}<extra></extra>",
        )
    )
    figure.add_vline(aim.threshold, line={"color": OTHER, "width": 2}, annotation_text="θ")
    figure.update_xaxes(title=f"code number {k} of a token, by size", rangemode="tozero")
    figure.update_yaxes(title="tokens")
    middle = render.number(float(np.median(found.values)))
    said = f"θ = {render.number(aim.threshold or 0)}; the {k}-th largest code is {middle} in the middle"
    draw(figure, f"threshold-{idx.name}", f"Histogram of the {k}-th largest code per token: {said}")
    st.caption(
        f"{said}. On {render.percent(found.short)} of tokens fewer than {k} features pass θ, and their {k}-th value lies below "
        "it; the others keep what a fixed k would have cut."
    )


@st.cache_resource(show_spinner=False, max_entries=8)
def _law(_idx: FeatureIndex, fingerprint: str) -> aims.RankLaw:
    return _idx.law()


def law(idx: FeatureIndex):
    """Density against rank: measured, meant, and the law through the measured ones."""
    st.subheader("Density against rank", anchor=False)
    found = _law(idx, idx.fingerprint)
    lines = {
        "measured": (found.density, {"color": COLOUR, "width": 3}),
        "budget": (found.budget, {"color": OTHER, "dash": "dash"}),
        "fitted": (found.fitted, {"color": QUIET, "dash": "dot"}),
    }
    figure = go.Figure()
    for name, (y, line) in lines.items():
        if y is not None:
            figure.add_scatter(x=found.rank, y=y, mode="lines", line=line, name=name, hovertemplate="rank %{x:,}: %{y:.2%}<extra>" + name + "</extra>")  # fmt: skip
    figure.update_xaxes(type="log", title="rank", dtick=1)
    figure.update_yaxes(type="log", title="share of tokens", tickformat=".3~%", dtick=1)
    fitted = "Too few features fire for a fit of Zipf's law."
    if found.law is not None:
        fitted = f"Fitted: p ∝ (rank + {found.law[2]:g})^−{found.law[1]:.2f}."
    under = "No budgets are kept in this SAE."
    if found.budget is not None:
        under = f"{found.under:,} of {len(idx):,} features fire less than half of their budget."
    draw(figure, f"law-{idx.name}", f"Density against rank on logarithmic axes. {fitted} {under}")
    st.caption(f"{state.literal(fitted)} {under} Each line is ranked by itself.")
    if found.under:
        st.page_link(
            state.FEATURES,
            label="Features under half of their budget",
            icon=":material/filter_alt:",
            query_params={"flag": "under-budget"},
        )
    shown = {name: y for name, (y, _) in lines.items() if y is not None}
    numbers({"rank": found.rank, **shown}, 220)


def variant(idx: FeatureIndex):
    """What only some SAEs raise: errors where counts differ, thresholds, budgets."""
    left, right = st.columns([3, 2], gap="large")
    with left:
        norms(idx)
    with right:
        if idx.adaptive:
            error(idx)
    if idx.adaptive:
        ends(idx)
    aim = idx.aim()
    parts = []
    if aim is not None and aim.threshold is not None:
        parts.append(lambda: threshold(idx, aim))
    if idx.has_budgets or idx.manifest["variant"] == "feature_choice":
        parts.append(lambda: law(idx))
    if parts:
        for column, part in zip(st.columns([3, 2], gap="large"), parts, strict=False):
            with column:
                part()
