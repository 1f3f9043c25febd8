"""Decoder rows in two dimensions: a lasso picks features, and what the picture leaves out is said."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from saekit_browser import state

from saekit.errors import SaekitError
from saekit.feature_index import render

# above, points are drawn by the graphics card where there is one
FLAT = 20_000
LISTED = 200
SCALE = "Viridis"


@state.shown
def page():
    idx = state.index()
    st.title("Map", anchor=False)
    if not idx.has_map:
        raise SaekitError(f"this index has no map; run  saekit index {idx.path.parent}")
    state.enter("map")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.segmented_control("Colour", state.COLOURS, required=True, key="color", persist_state="session")
        st.toggle("Features that fire only", True, key="map_alive", persist_state="session")
    state.leave("map")
    picked = plot(idx)
    method = (idx.manifest["build"].get("map") or {}).get("method", "pca")
    named = "the first two principal components of the decoder rows" if method == "pca" else method
    st.caption(
        f"Each point is a feature, at {named}. Most of what tells features apart lies in the other {idx.manifest['D'] - 2:,} "
        "dimensions: two points that touch may have nothing in common. The neighbours on page Feature are exact."
    )
    chosen(idx, picked)


def colours(idx, numbers: np.ndarray) -> tuple[np.ndarray, str]:
    """What the points are coloured by, and its name."""
    by = st.session_state.color
    if by == "density":
        return np.log10(idx.column("density")[numbers].clip(min=0.3 / max(1, idx.n_encoded))), "log₁₀ density"
    if by == "energy":
        return np.log10(idx.column("energy")[numbers].astype(float).clip(min=1e-9)), "log₁₀ energy"
    if by == "sign":
        n = idx.column("n")[numbers]
        return np.where(n > 0, idx.column("n_pos")[numbers] / n.clip(min=1), 0.5), "share of positive codes"
    labelled = {j for j, entry in idx.labels.all().items() if entry.label}
    return np.isin(numbers, list(labelled)).astype(float), "labelled"


def plot(idx) -> list[int]:
    """Draws it; returns the features inside the lasso, or the one that was clicked."""
    numbers = np.arange(len(idx))
    if st.session_state.map_alive:
        numbers = np.flatnonzero(idx.column("n") > 0)
    if not len(numbers):
        raise SaekitError("no feature fires in this index")
    xy = np.asarray(idx.file("map")["xy"])[numbers]
    value, name = colours(idx, numbers)
    kind = go.Scatter if len(numbers) <= FLAT else go.Scattergl
    figure = go.Figure(
        kind(
            x=xy[:, 0],
            y=xy[:, 1],
            mode="markers",
            marker={"size": 6, "opacity": 0.75, "color": value, "colorscale": SCALE, "colorbar": {"title": name}},
            text=names(idx, numbers),
            hovertemplate="%{text}<br>" + name + " %{marker.color:.2f}<extra></extra>",
        )
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, scaleanchor="x")
    figure.update_layout(height=620, margin={"l": 0, "r": 0, "t": 44, "b": 0}, dragmode="lasso")
    event = st.plotly_chart(
        figure,
        key=f"map-{idx.name}-{state.digest(idx.fingerprint, st.session_state.map_alive)}",
        on_select="rerun",
        selection_mode=("points", "box", "lasso"),
        config={"displayModeBar": True, "displaylogo": False},
        alt="Scatter of features by the first two principal components of their decoder rows",
    )
    return [int(numbers[point["point_index"]]) for point in event.selection.points]


def names(idx, numbers: np.ndarray) -> list[str]:
    """Number and label, escaped: Plotly reads a few tags in hover text."""
    labels = {j: entry.label for j, entry in idx.labels.all().items() if entry.label}
    return [render.plot_text(f"{j:,} {labels.get(j, '')}".strip()) for j in numbers.tolist()]


def chosen(idx, picked: list[int]):
    if not picked:
        st.caption("Draw a lasso around points, or click one, to see its features.")
        return
    few = picked[:LISTED]
    st.subheader(f"{len(picked):,} picked", anchor=False)
    rows = []
    for j in few:
        f = idx.feature(j)
        rows.append({"feature": j, "about": state.about(idx, j, 1), "density": 100 * f.density, "n": f.n})
    key = f"picked-{state.digest(few)}"
    event = st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        height=min(420, 40 + 33 * len(rows)),
        key=key,
        on_select="rerun",
        selection_mode="single-cell",
        column_config={
            "feature": st.column_config.NumberColumn("Feature", format="%d", width=90),
            "about": st.column_config.TextColumn("Label or top token"),
            "density": st.column_config.NumberColumn("Density %", format="%.3f", width=110),
            "n": st.column_config.NumberColumn("Firings", format="localized", width=110),
        },
        alt="Features that were picked; a row opens the feature",
    )
    if len(picked) > LISTED:
        st.caption(f"The first {LISTED} are listed.")
    if (row := state.clicked(event, "feature")) is not None:
        state.follow(state.FEATURE, feature=str(few[row]))


page()
