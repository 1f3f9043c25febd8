"""Every feature as a row: search, filter, sort; a click opens the feature."""

import streamlit as st
from saekit_browser import state

from saekit.feature_index.table import FeatureTable

# Streamlit loads longer tables piecewise, and such tables can neither be searched nor clicked
MOST_ROWS = 20_000
SORT_HELP = """energy: share of Σ a²‖d‖² · density: share of tokens · n: firings · token_f1: how well one token explains it ·
top_token_share: firings on its commonest token · token_entropy: variety of its tokens · logit_kurtosis: peaked logit
weights · max_dec_cos: nearest decoder row · q95: strong firings · feature: number"""


@state.shown
def page():
    idx = state.index()
    state.enter("features")
    st.title("Features", anchor=False)
    # another SAE may have no budgets
    st.session_state.flag = [name for name in st.session_state.flag or () if name in state.flags(idx)]
    controls(idx)
    state.leave("features")
    rows(idx)


def controls(idx):
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.text_input(
            "Search",
            key="q",
            persist_state="session",
            type="search",
            max_chars=200,
            placeholder="a word, /regex/ on tokens, or like:123",
            help="Looks in labels and notes, then exact tokens, then the text. A regular expression between slashes matches "
            "token strings; like:123 finds decoder rows near feature 123.",
        )
        st.selectbox("Sort by", state.SORTS, key="sort", persist_state="session", help=SORT_HELP, width=200)
        st.toggle("Largest first", key="desc", persist_state="session")
        st.toggle("Hide silent", key="alive", persist_state="session")
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium", key="filters"):
        st.pills("Only", state.flags(idx), selection_mode="multi", key="flag", persist_state="session")
        st.segmented_control("Labels", state.LABELLED, required=True, key="label", persist_state="session")
        for key, label in (("dmin", "Density from"), ("dmax", "to")):
            st.number_input(
                label,
                0.0,
                1.0,
                None,
                0.001,
                key=key,
                persist_state="session",
                format="%.3g",
                placeholder="any",
                width=96,
            )


def rows(idx):
    features, hits = state.found(idx)
    few = features[:MOST_ROWS] if len(features) > 150_000 else features
    table = FeatureTable(idx, few, columns(idx), idx.labels.all())
    with st.container(horizontal=True, vertical_alignment="center"):
        cut = f"; the first {MOST_ROWS:,} are shown" if len(few) < len(features) else ""
        st.caption(
            f"{len(features):,} of {len(idx):,} features{cut}. Click a row to open it; by keyboard, down to it and right.",
            width="content",
        )
        st.download_button(
            "Save as CSV",
            lambda: FeatureTable(
                idx, features, tuple(c for c in columns(idx) if c != "bar"), idx.labels.all()
            ).to_csv(),
            file_name=f"{idx.name}-features.csv",
            mime="text/csv",
            icon=":material/download:",
            type="tertiary",
        )
    if not len(few):
        st.info("No feature passes these filters.", icon=":material/filter_alt_off:")
        return
    frame = table.to_pandas()
    frame["bookmarked"] = ["★" if marked else "" for marked in frame["bookmarked"]]
    if idx.signed:
        n_pos = idx.column("n_pos")[few] / idx.column("n")[few].clip(min=1)
        frame.insert(list(frame.columns).index("n") + 1, "positive", n_pos)
    frame["density"] *= 100
    frame["energy"] *= 100
    if idx.has_budgets:
        frame["budget_share"] *= 100
    if hits:
        found = [hits[j] for j in few.tolist()]
        frame.insert(3, "found", [h.where for h in found])
        frame.insert(4, "match", [h.score for h in found])
    event = st.dataframe(
        frame,
        hide_index=True,
        height="content" if len(frame) < 20 else 720,
        column_config=configuration(),
        placeholder="",
        # a selection belongs to the rows it was made in: other rows are another table
        key=f"table-{state.digest(idx.fingerprint, state.remembered('features'))}",
        on_select="rerun",
        selection_mode="single-cell",
        alt="Table of features; each row opens the feature",
    )
    if (row := state.clicked(event, "bookmarked")) is not None:
        listing = state.link("features")
        state.follow(state.FEATURE, feature=str(few[row]), **({"list": listing} if listing else {}))


def columns(idx) -> tuple[str, ...]:
    logits = ("up", "down") if idx.has_logits else ()
    own = (*(("budget_share",) if idx.has_budgets else ()), *(("std_mean", "kl_mean") if idx.has_std else ()))
    return (
        "bookmarked", "feature", "label", "density", "n", *own, "bar", "top_text", "top_token_share", *logits,
        "token_entropy", "energy", "max_dec_cos", "flags_text",
    )  # fmt: skip


def configuration() -> dict:
    c = st.column_config
    return {
        "bookmarked": c.TextColumn("★", width=34, pinned=True, help="Bookmarked"),
        "feature": c.NumberColumn("Feature", format="%d", pinned=True, width=80),
        "label": c.TextColumn("Label", width="medium"),
        "found": c.TextColumn("Found in", width="small"),
        "match": c.NumberColumn(
            "Match", format="%.2f", width="small", help="F1 of “fires iff found here”; cosine for like:"
        ),
        "density": c.NumberColumn("Density %", format="%.3f", help="Share of encoded tokens it fires on", width=90),
        "n": c.NumberColumn("Firings", format="localized", width=90),
        "positive": c.ProgressColumn(
            "Positive",
            format="percent",
            min_value=0,
            max_value=1,
            width=100,
            help="Share of the firings with a positive code",
        ),
        "bar": c.BarChartColumn("Codes", y_min=0, y_max=1, width=110, help="Histogram of the codes, 16 bins"),
        "top_text": c.TextColumn("Top token", width=110),
        "top_token_share": c.ProgressColumn(
            "of its firings", format="percent", min_value=0, max_value=1, width=120, color="primary"
        ),
        "up": c.TextColumn("Raises", width=110, help="Token whose logit its decoder row raises most"),
        "down": c.TextColumn("Lowers", width=110, help="The one it lowers most; a negative code swaps the two"),
        "token_entropy": c.NumberColumn(
            "Entropy, bits", format="%.1f", width=100, help="Variety of the tokens it fires on"
        ),
        "energy": c.NumberColumn("Energy %", format="%.2f", width=90, help="Share of Σ a²‖d‖² over all features"),
        "max_dec_cos": c.NumberColumn(
            "Nearest", format="%.2f", width=80, help="Largest cosine with another decoder row, of signed codes by size"
        ),
        "budget_share": c.NumberColumn("Budget used %", format="%.0f", width=110, help="Density / budget"),
        "std_mean": c.NumberColumn(
            "Std", format="%.3g", width=70, help="Standard deviation of the posterior of its code"
        ),
        "kl_mean": c.NumberColumn(
            "KL, nats", format="%.2f", width=80, help="Of the posterior from the prior, mean per firing"
        ),
        "flags_text": c.TextColumn("Flags", width="medium"),
    }


page()
