"""One feature: what fires it, how strongly, what it writes, what lies near; its label, tags and notes."""

import random
import shlex
from functools import partial
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import pandas as pd
import streamlit as st
from saekit_browser import state

from saekit.errors import SaekitError
from saekit.feature_index import render

NEIGHBOURS = {"decoder": ("Nearest", "cosine of decoder rows"), "together": ("Together", "NPMI"), "encoder": ("Encoder", "cosine of encoder rows")}  # fmt: skip
KEYS = (
    ("J, K", "next, previous in the list"), ("Shift+J, Shift+K", "ten on, ten back"), ("N", "random feature"),
    ("U", "next without a label"), ("L", "write the label; Enter saves"), ("B", "bookmark"), ("1, 2, 3", "stacked, snippet, full"),
    ("V", "next kind of examples"), ("S", "both signs, +, −"), ("P", "this feature on a text"), ("H", "these keys"),
)  # fmt: skip


@state.shown
def page():
    idx = state.index()
    last = len(idx) - 1
    state.restore_list()
    state.say_if_missing(last)
    state.enter("feature")
    state.own_feature(idx)
    detail(idx)


@st.fragment(key="detail")
@state.shown
def detail(idx):
    number = header(idx)
    state.leave("feature")
    f = idx.feature(number)
    where = st.container(key="numbers")
    left, right = st.columns([5, 2], gap="large")
    with left:
        examples(idx, number)
        through_the_model(idx, number)
    with right:
        st.html(rail(idx, idx.fingerprint, number))
        neighbours(idx, number)
    # drawn last, because a label may just have been saved
    line = render.state_line(f)
    tags = "".join(f'<span class="tag">{render.escape(t)}</span>' for t in (*idx.labels.get(number).tags, *f.flags))
    said = f"<p>{tags}{render.escape(line)}</p>" if line or tags else ""
    where.html(render.fragment(said, render.numbers_html(f)))
    ahead(idx, number)


# header


def header(idx) -> int:
    """Number, label, and the ways on; returns the number. The shortcuts live on these buttons."""
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small", key="head"):
        st.button("Previous", icon=":material/chevron_left:", key="k", shortcut="K", on_click=step, args=(idx, -1))
        number = st.number_input("Feature", 0, len(idx) - 1, step=1, key="feature", persist_state="session", width=110)
        st.button(
            "Next",
            icon=":material/chevron_right:",
            icon_position="right",
            key="j",
            shortcut="J",
            on_click=step,
            args=(idx, 1),
        )
        label_editor(idx, number)
        st.button("Random", icon=":material/casino:", key="n", shortcut="N", on_click=jump, args=(idx, False))
        st.page_link(state.STEER, label="Steer", icon=":material/tune:", query_params={"feature": str(number)})
        more(idx, number)
    with st.container(key="keys"):
        # shortcuts without a visible button; a shortcut exists only while its button is on the page
        for key, hop in (("Shift+J", 10), ("Shift+K", -10)):
            st.button(key, shortcut=key, on_click=step, args=(idx, hop))
        st.button("unlabelled", shortcut="U", on_click=jump, args=(idx, True))
        st.button("label", shortcut="L", on_click=focus, args=("focus",))
        st.button("bookmark", shortcut="B", on_click=bookmark, args=(idx, number))
        for key, zoom in zip("123", ("stacked", "snippet", "full")):
            st.button(f"zoom {key}", shortcut=key, on_click=choose, args=("zoom", zoom))
        if idx.signed:
            st.button("sign", shortcut="S", on_click=turn, args=("sign", state.SIGNS))
        st.button("view", shortcut="V", on_click=turn, args=("view", state.VIEWS))
        to_prompt = st.button("prompt", shortcut="P")
        helped = st.button("help", shortcut="H")
    if to_prompt:
        state.follow(state.PROMPT, feature=str(number))
    if helped:
        show_keys()
    return number


def label_editor(idx, number: int):
    """Saves on Enter and gives the keyboard back, so that L, text, Enter, J labels feature after feature."""
    entry = idx.labels.get(number)
    with st.container(key="label-editor", width="stretch"):
        st.text_input(
            "Label",
            entry.label,
            key=f"text-{number}-{entry.revision}",
            max_chars=200,
            placeholder="What is it? L to write, Enter saves",
            disabled=bool(idx.labels.read_only),
            on_change=save_label,
            args=(idx, number, entry.revision),
        )
    if wanted := st.session_state.pop("focus", None):
        # the one thing that Streamlit cannot do from Python; the script is a constant
        action, count = wanted
        st.html(
            f"<script>/* {count} */ document.querySelector('.st-key-label-editor input')?.{action}()</script>",
            unsafe_allow_javascript=True,
        )
    if failed := st.session_state.pop("failed", None):
        st.toast(state.literal(failed), icon=":material/error:", duration="long")


def more(idx, number: int):
    entry = idx.labels.get(number)
    star = ":material/star:" if entry.bookmarked else ":material/star_border:"
    st.button("", icon=star, key="star", help="Bookmark (B)", on_click=bookmark, args=(idx, number), type="tertiary")
    with (
        st.popover("", icon=":material/sticky_note_2:", help="Tags and notes", type="tertiary"),
        st.form("notes", border=False),
    ):
        key = f"{number}-{entry.revision}"
        tags = st.text_input(
            "Tags", ", ".join(entry.tags), key=f"tags-{key}", max_chars=200, placeholder="syntax, string"
        )
        notes = st.text_area("Notes", entry.notes, key=f"notes-{key}", height=140, max_chars=20_000)
        if st.form_submit_button("Save", disabled=bool(idx.labels.read_only)):
            save(idx, number, tags=tags.split(","), notes=notes, expected=entry.revision)
            st.rerun(scope="fragment")
        if entry.time:
            st.caption(f"revision {entry.revision}, {entry.time.replace('T', ' ')[:16]} UTC")
    with st.popover("", icon=":material/share:", help="Link and Python", type="tertiary"):
        st.caption("Link to this view")
        st.code(link(number), language=None, wrap_lines=True)
        st.caption("In Python")
        st.code(f"import saekit as sk\n\nsk.open_index({str(idx.path.parent)!r}).feature({number})", language="python")
    if st.button("", icon=":material/keyboard:", help="Keys (H)", type="tertiary"):
        show_keys()


@st.dialog("Keys")
def show_keys():
    rows = "".join(f'<tr><td>{key}</td><td style="text-align:left">{does}</td></tr>' for key, does in KEYS)
    st.html(render.fragment(f'<table>{rows}</table><p class="q">Keys rest while a text field has the focus.</p>'))


def link(number: int) -> str:
    """The full address of what is shown."""
    base = urlsplit(st.context.url or "http://localhost/feature")
    query = state.link("feature", sae=state.chosen().name, feature=str(number))
    return urlunsplit((base.scheme, base.netloc, "/feature", query, ""))


# what the buttons do


def step(idx, hop: int):
    """`hop` places along the list of page Features; a feature that is not in it goes on by number."""
    number = st.session_state.feature
    order = state.found(idx, number).features
    at = np.flatnonzero(order == number)
    if len(at):
        st.session_state.feature = int(order[np.clip(at[0] + hop, 0, len(order) - 1)])
    else:
        st.session_state.feature = int(np.clip(number + hop, 0, len(idx) - 1))


def jump(idx, unlabelled: bool):
    """A random feature of the list, or the next one in it that has no label."""
    number = st.session_state.feature
    order = state.found(idx, number).features
    if unlabelled:
        named = [j for j, e in idx.labels.all().items() if e.label]
        at = np.flatnonzero(order == number)
        later = np.roll(order, -1 - int(at[0])) if len(at) else order
        free = later[~np.isin(later, named) & (later != number)]
        if not len(free):
            st.session_state.failed = "every feature in the list has a label"
            return
        st.session_state.feature = int(free[0])
    elif len(order):
        st.session_state.feature = int(random.choice(order))


def choose(key: str, value: str):
    st.session_state[key] = value


def turn(key: str, values: tuple[str, ...]):
    st.session_state[key] = values[(values.index(st.session_state[key]) + 1) % len(values)]


def focus(action: str):
    # the count makes each script a new one, or it would run once only
    st.session_state.focus_count = st.session_state.get("focus_count", 0) + 1
    st.session_state.focus = (action, st.session_state.focus_count)


def save_label(idx, number: int, revision: int):
    save(idx, number, label=st.session_state[f"text-{number}-{revision}"], expected=revision)
    focus("blur")


def bookmark(idx, number: int):
    save(idx, number, bookmarked=not idx.labels.get(number).bookmarked)


def save(idx, number: int, **fields):
    """Errors are shown in the run that follows: a read-only folder, or what somebody else saved meanwhile."""
    try:
        idx.labels.save(number, **fields)
    except SaekitError as error:
        st.session_state.failed = str(error)


# panels


@st.fragment(key="examples")
@state.shown
def examples(idx, number: int):
    f = idx.feature(number)
    if f.n == 0:
        nearest = f.neighbours("decoder", 20)
        alive = next((x for x in nearest if idx.column("n")[x.feature]), None)
        st.html(render.fragment(render.logits_html(f.logits(12), 12, f.signed)))
        if alive:
            st.caption(f"Nearest feature that fires: {alive.feature:,}, cosine {alive.value:.2f}.")
        return
    with st.container(horizontal=True, gap="medium", vertical_alignment="bottom"):
        control(
            "Examples",
            "view",
            state.VIEWS,
            "The strongest, slices of equal count from strong to weak, drawn at random, or silent on its commonest tokens",
        )
        control("Context", "zoom", state.ZOOMS)
        if idx.signed:
            control("Sign", "sign", state.SIGNS)
        control("Full colour at", "scale", state.SCALES, "The feature's own largest magnitude, or its 99th percentile")
    state.leave("feature")
    choices = list(state.remembered("feature").values())[1:]
    st.html(view(idx, idx.fingerprint, number, *choices))


# the language model


def through_the_model(idx, number: int):
    """Panels that run it; it is loaded when one of them is first used."""
    if not state.arguments().model:
        line = shlex.join(
            ["saekit", "steer", str(idx.path.parent), str(number), "--mode", "ablate", "--prompt", "TEXT"]
        )
        st.caption(
            "A text of yours and ablating need the language model, and saekit browse was started with --no-model; "
            f"in a terminal: {state.literal(line)}"
        )
        return
    with st.expander("On a text of yours", icon=":material/edit_note:", key="own-text"):
        own_text(idx, number)
    if idx.feature(number).n:
        with st.expander("Ablated on an example", icon=":material/backspace:", key="ablated"):
            ablated(idx, number)


@st.fragment(key="own-text")
@state.shown
def own_text(idx, number: int):
    """One text for all features: it stays while J and K go through them."""
    given = st.text_area(
        "A text",
        key="own_text",
        height=90,
        max_chars=state.TEXT_CHARACTERS,
        placeholder="Type or paste a text, then Ctrl+Enter",
        label_visibility="collapsed",
        persist_state="session",
    )
    if not (given or "").strip():
        st.caption("The language model is loaded when the first text is read.")
        return
    with st.spinner("Reading the text with the language model …", show_time=True):
        text = state.encoded(idx, idx.fingerprint, given)
    f, codes = idx.feature(number), text.codes_of(number)
    scale = max(f.max, float(np.abs(codes).max(initial=0)))
    line = render.tokens_html(
        text.pieces, codes.tolist(), scale, special=text.special.tolist(), encoded=text.encoded.tolist(), breaks=True
    )
    fires = int((codes != 0).sum())
    said = f"fires on {fires} of {int(text.encoded.sum())} tokens"
    if fires:
        strongest = float(codes[np.abs(codes).argmax()])
        said += (
            f", strongest {render.code(strongest, scale)}, {render.percent(abs(strongest) / scale)} of the full colour"
        )
    legend = render.legend_html(scale, idx.signed, "the largest magnitude in the index or here")
    st.html(render.fragment(f'<div class="t">{line}</div><p class="q">{render.escape(said)}</p>{legend}'))


@st.fragment(key="ablated")
@state.shown
def ablated(idx, number: int):
    """What the model's next token behind one of the strongest examples loses when the feature is taken away there."""
    f = idx.feature(number)
    signs = [s for s, n in (("+", "n_pos"), ("-", "n_neg")) if f.column(n) and (s == "+" or idx.signed)]
    wanted = {"pos": "+", "neg": "-"}.get(st.session_state.sign)
    sign = wanted if wanted in signs else signs[0]
    found = strongest(idx, idx.fingerprint, number, sign)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        rank = st.number_input(
            "Strongest example, negative" if sign == "-" else "Strongest example",
            1,
            len(found),
            1,
            key=f"rank-{number}-{sign}",
            width=190,
            help="1 is the strongest of all",
        )
        pressed = st.button("Ablate", icon=":material/backspace:", key="ablate")
    example = found[int(rank) - 1]
    key = state.digest(idx.fingerprint, number, example.position)
    if pressed:
        st.session_state.ablated_here = key
    if st.session_state.get("ablated_here") != key:
        st.html(render.fragment(render.example_html(example, f.max)))
        st.caption("Ablate reads the text up to there twice, and takes the feature's part away at that token once.")
        return
    with st.spinner("Reading the example with the language model …", show_time=True):
        result = ablation(idx, idx.fingerprint, number, example.position)
    from saekit.feature_index.render_steering import ablation_html

    st.html(render.fragment(ablation_html(result, example, f.max)))


@st.cache_resource(show_spinner=False, max_entries=64)
def strongest(_idx, fingerprint: str, number: int, sign: str) -> list:
    return _idx.feature(number).top(20, sign)


@st.cache_resource(show_spinner=False, max_entries=64)
def ablation(_idx, fingerprint: str, number: int, position: int):
    from saekit.steering import ablate_at

    whole = _idx.window(position, None)
    return ablate_at(state.own_sae(_idx), number, whole.tokens, whole.centre, model=state.own_model(_idx))


# panels of tables


def control(label: str, key: str, values: tuple[str, ...], explained: str | None = None):
    st.segmented_control(label, values, required=True, key=key, persist_state="session", help=explained)


def neighbours(idx, number: int):
    f = idx.feature(number)
    kinds = [k for k in NEIGHBOURS if idx.has_neighbours or k == "together"]
    if not idx.has_neighbours:
        st.caption("No neighbours by cosine in this index; saekit index on a GPU makes them.")
    for tab, kind in zip(st.tabs([NEIGHBOURS[k][0] for k in kinds]), kinds, strict=True):
        with tab:
            rows = f.neighbours(kind, 12)
            if not rows:
                st.caption(
                    "Index without by_token: rebuild it to see this."
                    if kind == "together" and not idx.has_by_token
                    else "None."
                )
                continue
            features = [x.feature for x in rows]
            key = f"near-{kind}-{number}"
            columns = {
                "rank": range(1, len(rows) + 1),
                "feature": features,
                "value": [x.value for x in rows],
                **({"agree": [x.agree for x in rows]} if idx.signed else {}),
                "text": named(idx, rows),
            }
            st.dataframe(
                pd.DataFrame(columns),
                hide_index=True,
                height="content",
                key=key,
                on_select=partial(open_near, key, features),
                selection_mode="single-cell",
                column_config={
                    "rank": st.column_config.NumberColumn("", width=28),
                    "feature": st.column_config.NumberColumn("Feature", format="%d", width=64),
                    "value": st.column_config.NumberColumn(NEIGHBOURS[kind][1].split()[0], format="%.2f", width=58),
                    "agree": st.column_config.NumberColumn(
                        "same sign", format="percent", width=72, help="Of the tokens on which both fire"
                    ),
                    "text": st.column_config.TextColumn("Label or top token"),
                },
                alt=f"Features near this one by {NEIGHBOURS[kind][1]}; a row opens the feature",
            )


def open_near(key: str, features: list[int]):
    if (row := state.clicked(st.session_state[key], "rank")) is not None:
        st.session_state.feature = features[row]


def named(idx, rows) -> list[str]:
    """What stands for a feature in a short list: its label, else the token it fires on most."""
    tops = [idx.feature(x.feature).tokens(1) for x in rows]
    return [x.label or (top[0].text if top else "silent") for x, top in zip(rows, tops, strict=True)]


@st.cache_data(show_spinner=False, max_entries=256)
def view(_idx, fingerprint: str, number: int, view: str, zoom: str, sign: str, scale: str) -> str:
    return render.fragment(render.view_html(_idx.feature(number), view, zoom, sign, scale))


@st.cache_data(show_spinner=False, max_entries=256)
def rail(_idx, fingerprint: str, number: int) -> str:
    f = _idx.feature(number)
    if f.n == 0:
        return render.fragment(render.histogram_html(f.histogram))
    quantiles = [f.column(q) for q in ("q05", "q25", "q50", "q75", "q95")]
    panels = (
        render.histogram_html(f.histogram, quantiles),
        render.token_table_html(f.tokens(8), 8),
        render.logits_html(f.logits(8), 8, f.signed),
    )
    return render.fragment(f'<div class="cols">{"".join(panels)}</div>')


def ahead(idx, number: int):
    """The HTML of the features on both sides in the list, so that J and K find it in the cache."""
    order = state.found(idx, number).features
    at = np.flatnonzero(order == number)
    if len(at):
        choices = list(state.remembered("feature").values())[1:]
        for j in order[max(0, at[0] - 1) : at[0] + 2].tolist():
            if j != number:
                view(idx, idx.fingerprint, j, *choices)
                rail(idx, idx.fingerprint, j)


page()
