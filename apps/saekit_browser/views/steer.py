"""What the language model writes with doses of one feature: baseline and doses side by side, and what a dose costs."""

import shlex

import streamlit as st
from saekit_browser import state

from saekit.config import DOSED, LARGEST_SEED
from saekit.errors import SaekitError
from saekit.feature_index import render
from saekit.feature_index.render_steering import cost, steering_html, what_it_does

MODES = {"add": "Add", "set": "Clamp", "ablate": "Ablate", "project": "Project out"}


@state.shown
def page():
    idx = state.index()
    st.title("Steer", anchor=False)
    state.say_if_missing(len(idx) - 1)
    state.say_if_no_seed()
    state.enter("steer")
    state.own_feature(idx)
    steering(idx)


@st.fragment(key="steer")
@state.shown
def steering(idx):
    number = controls(idx)
    state.leave("steer")
    options = asked(idx)
    line = command(idx, number, options)
    if not state.arguments().model:
        raise SaekitError(
            f"saekit browse was started with --no-model, and steering needs the model; here is the command: {line}"
        )
    key = state.digest(idx.fingerprint, number, options)
    with st.container(horizontal=True, vertical_alignment="center"):
        pressed = st.button(
            "Write", type="primary", icon=":material/play_arrow:", disabled=not options["prompt"].strip()
        )
        with st.popover("As a command", icon=":material/terminal:", type="tertiary"):
            st.code(line, language="shell", wrap_lines=True)
    if pressed:
        st.session_state.steered = key
    if not options["prompt"].strip():
        st.caption("Type the beginning of a text. The language model is loaded when the first one is written on.")
        return
    if st.session_state.get("steered") != key:
        st.caption("Press Write to see what the model makes of it.")
        return
    with st.spinner("Writing …", show_time=True):
        found = written(idx, idx.fingerprint, number, **options)
    assert not isinstance(found, list)
    st.html(render.fragment(steering_html(found)))
    keep(idx, found)


def controls(idx) -> int:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        number = st.number_input("Feature", 0, len(idx) - 1, step=1, key="feature", persist_state="session", width=120)
        st.segmented_control(
            "Mode",
            list(MODES),
            format_func=lambda name: MODES[name],
            required=True,
            key="mode",
            persist_state="session",
            help="Add its direction at every token; clamp its code; take its part away where it fires; leave nothing of its direction",
        )
        st.text_input(
            "Doses",
            key="doses",
            persist_state="session",
            width=180,
            max_chars=60,
            disabled=st.session_state.mode not in DOSED,
            help="Up to four, in units of the feature: 1 is the 95th percentile of its magnitudes",
        )
        st.number_input("Seed", 0, LARGEST_SEED, step=1, key="seed", persist_state="session", width=150)
        st.number_input(
            "Seeds",
            1,
            4,
            1,
            key="seeds",
            persist_state="session",
            width=100,
            help="Continuations of each, from this seed on",
        )
        st.number_input("Tokens", 1, 200, 40, key="new_tokens", persist_state="session", width=110)
        st.number_input(
            "Temperature",
            0.0,
            5.0,
            0.8,
            0.1,
            key="temperature",
            persist_state="session",
            width=120,
            help="0 takes the most probable token",
        )
        st.page_link(
            state.FEATURE,
            label=f"Feature {number:,}",
            icon=":material/lens_blur:",
            query_params={"feature": str(number)},
        )
    st.text_area(
        "Prompt",
        key="text",
        height=90,
        max_chars=state.URL_CHARACTERS,
        placeholder="The beginning of a text",
        label_visibility="collapsed",
        persist_state="session",
    )
    return number


def asked(idx) -> dict:
    """The options of `steer`, from the widgets."""
    s = st.session_state
    doses = state.doses(s.doses) if s.mode in DOSED else ()
    if doses is None:
        raise SaekitError(f"doses {s.doses}: up to four numbers with commas between, such as -4, 4")
    seeds = tuple(range(int(s.seed), int(s.seed) + int(s.seeds)))
    return {
        "prompt": s.text,
        "mode": s.mode,
        "doses": doses,
        "seeds": seeds,
        "new_tokens": int(s.new_tokens),
        "temperature": float(s.temperature),
    }


def command(idx, number: int, options: dict) -> str:
    """The line that prints the same in a terminal."""
    words = [
        "saekit",
        "steer",
        str(idx.path.parent),
        str(number),
        "--prompt",
        options["prompt"] or "…",
        "--mode",
        options["mode"],
    ]
    if options["doses"]:
        words += ["--dose", *(f"{dose:g}" for dose in options["doses"])]
    words += ["--seed", str(options["seeds"][0]), "--seeds", str(len(options["seeds"]))]
    words += ["--new-tokens", str(options["new_tokens"]), "--temperature", f"{options['temperature']:g}"]
    return shlex.join(words)


@st.cache_resource(show_spinner=False, max_entries=32)
def written(_idx, fingerprint: str, number: int, **options):
    from saekit.steering import steer

    return steer(state.own_sae(_idx), number, model=state.own_model(_idx), **options)


def keep(idx, found):
    """The costs, as a line of the feature's notes."""
    entry = idx.labels.get(found.feature)
    if not st.button("Save to notes", icon=":material/note_add:", disabled=bool(idx.labels.read_only)):
        return
    runs = "; ".join(f"{run.name or found.mode}: {cost(run)}" for run in found.runs)
    line = f"steered, {found.mode} ({what_it_does(found)}), {found.prompt!r}: {runs}"
    idx.labels.save(found.feature, notes=f"{entry.notes}\n{line}".strip(), expected=entry.revision)
    st.toast("saved to the notes of the feature", icon=":material/check:")


page()
