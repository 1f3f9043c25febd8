"""Navigation of the browser: which pages there are, which SAE is looked at. `saekit browse` runs this file with Streamlit."""

from pathlib import Path

import streamlit as st

from saekit.errors import SaekitError
from saekit_browser import state

HERE = Path(__file__).parent
MARK = (HERE / "mark.svg").read_text(encoding="utf-8")

st.set_page_config(page_title="saekit", page_icon=MARK, layout="wide")
st.logo(MARK, size="medium")
st.html(HERE / "style.css")

page = st.navigation(
    [
        st.Page(state.OVERVIEW, title="Overview", icon=":material/dashboard:", default=True),
        st.Page(state.FEATURES, title="Features", icon=":material/table_rows:", url_path="features"),
        st.Page(state.FEATURE, title="Feature", icon=":material/lens_blur:", url_path="feature"),
        st.Page(state.PROMPT, title="Prompt", icon=":material/edit_note:", url_path="prompt"),
        st.Page(state.COMPARE, title="Compare", icon=":material/compare_arrows:", url_path="compare"),
        st.Page(state.STEER, title="Steer", icon=":material/tune:", url_path="steer"),
        st.Page(state.MAP, title="Map", icon=":material/scatter_plot:", url_path="map"),
        st.Page(state.EVALUATE, title="Evaluate", icon=":material/straighten:", url_path="evaluate"),
        st.Page(state.DATA, title="Data", icon=":material/database:", url_path="data"),
    ],
    position="top",
)


def choose_sae():
    """The selector, where there is something to select, and what the SAE is; a name in the URL that is not there is said."""
    known = state.folders()
    names = [f.name for f in known]
    asked = st.query_params.get("sae")
    if asked is not None and asked not in names:
        st.warning(state.literal(f"no SAE named {asked} here; shown is {state.first_good(known).name}"))
    with st.container(horizontal=True, vertical_alignment="center", gap="medium", key="context"):
        if len(known) > 1:
            st.selectbox(
                "SAE",
                names,
                index=names.index(state.first_good(known).name),
                key="sae",
                bind="query-params",
                label_visibility="collapsed",
                width=260,
            )
        folder = state.chosen()
        if folder.problem is None:
            say_if_rebuilt(folder)
            st.html(state.facts(state.index(), named=len(known) == 1))


def say_if_rebuilt(folder: state.Folder):
    """A new manifest is opened by itself; whoever was looking at the old one is told."""
    key, now = f"stamp-{folder.name}", state.stamp(folder.path)
    if st.session_state.setdefault(key, now) != now:
        st.session_state[key] = now
        st.toast(
            state.literal(f"the index of {folder.name} was rebuilt; this is the new one"), icon=":material/refresh:"
        )


try:
    choose_sae()
except SaekitError as error:
    st.error(state.literal(str(error)))
    st.stop()
page.run()
