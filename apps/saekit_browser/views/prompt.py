"""A text, token by token: what fires on it, and where one feature fires. The text is typed, or a passage of the index."""

import numpy as np
import pandas as pd
import streamlit as st
from saekit_browser import state
from streamlit.components.v2 import component

from saekit.errors import SaekitError
from saekit.feature_index import render
from saekit.feature_index.encoded import EncodedText
from saekit.feature_index.format import FLAGS

TEXT_CHARACTERS = 20_000
ROWS = 16
LINES = 8
TYPED, PASSAGE = "Your text", "A passage of the index"

# Builds its nodes with textContent only: tokens are whatever the text holds. Arrays in, the clicked token out.
TOKENS_JS = """
export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector("#tokens")
  root.replaceChildren()
  for (const u of data.units) {
    const span = document.createElement("span")
    span.textContent = u.text
    span.title = u.title
    span.dataset.token = u.token
    if (u.step) {
      span.style.background = `rgb(${u.step > 0 ? "230 97 1" : "67 147 195"} / ${Math.abs(u.step) / 10})`
      span.className = "on"
    }
    if (u.unsure) span.style.backgroundImage = "repeating-linear-gradient(135deg, #0000 0 3px, #8886 3px 5px)"
    if (u.faint) span.className = "faint"
    if (u.token <= data.chosen && data.chosen < u.end) span.className += " chosen"
    span.setAttribute("role", "button")
    span.tabIndex = 0
    span.onclick = () => setTriggerValue("token", u.token)
    span.onkeydown = (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); setTriggerValue("token", u.token) } }
    root.appendChild(span)
  }
}
"""
TOKENS_CSS = """
#tokens { font: 15px/2 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--st-text-color);
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 460px; overflow-y: auto; padding: 2px; }
span { unicode-bidi: isolate; cursor: pointer; border-radius: 3px; padding: 2px 0; }
span:hover { box-shadow: 0 0 0 1px color-mix(in srgb, currentColor 45%, transparent); }
span:focus-visible { outline: 2px solid var(--st-primary-color); }
.faint { opacity: .76; }
.chosen { box-shadow: 0 0 0 2px currentColor; }
"""


@st.cache_resource(show_spinner=False)
def token_view():
    return component("saekit.tokens", html='<div id="tokens"></div>', css=TOKENS_CSS, js=TOKENS_JS)


@state.shown
def page():
    idx = state.index()
    st.title("Prompt", anchor=False)
    state.say_if_missing(len(idx) - 1)
    state.enter("prompt")
    if (st.session_state.feature or 0) >= len(idx):
        st.session_state.feature = None
    prompt(idx)


@st.fragment(key="prompt")
@state.shown
def prompt(idx):
    text = passage(idx) if source(idx) == PASSAGE else typed(idx)
    if text is None:
        return
    left, right = st.columns([5, 3], gap="large")
    with right, st.container(horizontal=True, vertical_alignment="bottom"):
        st.segmented_control(
            "Rank by",
            state.RANKS,
            required=True,
            key="rank",
            persist_state="session",
            help="rarity = magnitude × −log density",
        )
        st.pills("Hide", state.HIDE, selection_mode="multi", key="hide", persist_state="session")
    with left:
        feature = colour(idx, text)
        state.leave("prompt")
        tokens(idx, text, feature)
        strip(idx, text)
        small_multiples(idx, text)
    with right:
        ranking(idx, text)


# where the text comes from


def source(idx) -> str:
    allowed = [TYPED] if not idx.has_by_token else [TYPED, PASSAGE]
    if not state.arguments().model:
        if not idx.has_by_token:
            raise SaekitError(
                f"no language model (--no-model) and an index without by_token; run  saekit index {idx.path.parent}"
            )
        st.caption("Typed text needs the language model, and saekit browse was started with --no-model.")
        return PASSAGE
    return st.segmented_control(
        "Source",
        allowed,
        default=TYPED,
        required=True,
        key="source",
        persist_state="session",
        label_visibility="collapsed",
    )


def typed(idx) -> EncodedText | None:
    long = len(st.session_state.get("text") or "") > state.URL_CHARACTERS
    given = st.text_area(
        "Text",
        key="text",
        height=120,
        max_chars=TEXT_CHARACTERS,
        placeholder="Type or paste a text, then Ctrl+Enter",
        label_visibility="collapsed",
        persist_state="session",
    )
    if long:
        st.caption(f"Over {state.URL_CHARACTERS:,} characters: the text is not part of the link.")
    if not given.strip():
        st.caption("The language model is loaded when the first text is read.")
        return None
    with st.spinner("Reading the text with the language model …", show_time=True):
        return encoded(idx, idx.fingerprint, given)


@st.cache_resource(show_spinner=False, max_entries=16)
def encoded(_idx, fingerprint: str, text: str) -> EncodedText:
    lm = state.model((_idx.manifest.get("model") or {}).get("id") or "")
    expected = _idx.manifest["fingerprints"]["model"]
    if expected and lm.weights_fingerprint != expected:
        raise SaekitError(
            f"the model {lm.id} has other weights than the one this index was made with; its codes would mean nothing"
        )
    folder = _idx.path.parent
    return _idx.encode(text, sae=state.sae(str(folder.resolve()), state.stamp(folder)), lm=lm)


def passage(idx) -> EncodedText:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        number = st.number_input("Sequence", 0, idx.n_sequences - 1, key="sequence", persist_state="session", width=160)
        st.button("Another", icon=":material/casino:", on_click=another, args=(idx.n_sequences,), shortcut="N")
    starts, table, per_token = idx.file("tokens")["seq_start"], idx.file("by_token"), idx.file("per_token")
    lo, hi = int(starts[number]), int(starts[number + 1])
    whole = idx.window(lo, None)
    a, b = int(table["start"][lo]), int(table["start"][hi])
    return EncodedText(
        tokens=whole.tokens,
        pieces=whole.pieces,
        special=whole.special,
        encoded=whole.encoded,
        start=table["start"][lo : hi + 1] - a,
        features=table["feature"][a:b].astype(np.int64),
        values=table["value"][a:b].astype(np.float32) * np.float32(idx.scale),
        norm_x=per_token["norm_x"][lo:hi],
        error=per_token["error"][lo:hi],
    )


def another(sequences: int):
    st.session_state.sequence = int(np.random.default_rng().integers(sequences))
    st.session_state.pop("token", None)


# panels


def colour(idx, text: EncodedText) -> int | None:
    """The feature the tokens are coloured by: the one asked for, else the strongest on the chosen token or anywhere."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        asked = st.number_input(
            "Colour by feature",
            0,
            len(idx) - 1,
            None,
            step=1,
            key="feature",
            persist_state="session",
            placeholder="strongest",
            width=160,
        )
        best = ranked(idx, text, chosen_token(text))
        feature = asked if asked is not None else best[0][0] if best else None
        if feature is not None:
            st.page_link(
                state.FEATURE,
                label=f"Feature {feature:,}",
                icon=":material/lens_blur:",
                query_params={"feature": str(feature)},
            )
    return feature


def tokens(idx, text: EncodedText, feature: int | None):
    codes = text.codes_of(feature) if feature is not None else np.zeros(len(text), np.float32)
    scale = idx.feature(feature).max if feature is not None else 0.0
    scale = max(scale, float(np.abs(codes).max(initial=0)))
    std = idx.feature(feature).std if feature is not None else None
    units = []
    for a, b in render.units(text.pieces):
        at = a + int(np.abs(codes[a:b]).argmax())
        code = float(codes[at])
        step = render.step(code, scale) if code else ""
        # white space is laid out as it is, with a mark where a line ends
        shown = render.visible(b"".join(text.pieces[a:b])).replace("␣", " ").replace("↵", "↵\n")
        spread = f" ± {render.number(std)}" if std is not None else ""
        title = (
            f"token {a:,}" + (f" · {render.number(code)}{spread}" if code else "") + f" · {int(text.l0[a])} features"
        )
        units.append(
            {
                "text": shown,
                "title": title if text.encoded[a] else f"token {a:,} · no code",
                "token": a,
                "end": b,
                "step": int(step[1:]) * (1 if step[0] == "p" else -1) if step else 0,
                "unsure": bool(code and std is not None and abs(code) < std),
                "faint": bool(text.special[a] or not text.encoded[a]),
            }
        )
    chosen = chosen_token(text)
    with st.container(border=True):
        event = token_view()(
            key="tokens",
            data={"units": units, "chosen": -1 if chosen is None else chosen},
            on_token_change=lambda: None,
        )
    if event.token is not None and event.token != chosen:
        st.session_state.token = int(event.token)
        st.rerun(scope="fragment")
    if feature is None:
        st.caption("Nothing fires on this text.")
        return
    said = f"feature {feature:,}, {state.about(idx, feature)}: fires on {int((codes != 0).sum())} of {len(text)} tokens"
    legend = render.legend_html(scale, idx.signed, "its largest magnitude in the index")
    st.html(render.fragment(f"<p>{render.escape(said)}</p>{legend}"))


def strip(idx, text: EncodedText):
    """How many features fire on each token, where that differs from token to token."""
    if not idx.adaptive:
        return
    most = int(text.l0[text.encoded].max(initial=0))
    st.subheader("Features per token", anchor=False)
    shown = render.counts_html(text.pieces, text.l0.tolist(), most, special=text.special.tolist(), encoded=text.encoded.tolist(), breaks=True)  # fmt: skip
    legend = render.legend_html(most, False, "most on a token of this text")
    mean = float(text.l0[text.encoded].mean()) if text.encoded.any() else 0.0
    said = f'<p class="q">mean {mean:.1f}; the text comes to {int(text.l0.sum()):,} firings</p>'
    st.html(render.fragment(f'<div class="t">{shown}</div>{legend}{said}'))


def chosen_token(text: EncodedText) -> int | None:
    t = st.session_state.get("token")
    return t if t is not None and t < len(text) else None


def ranked(idx, text: EncodedText, token: int | None) -> list[tuple[int, float]]:
    """(feature, code) on one token, or at its strongest anywhere in the text, by the chosen rank."""
    firings = text.at(token) if token is not None else text.strongest(len(text.features))
    hidden = sum(FLAGS[name] for name in st.session_state.get("hide") or ())
    keep = idx.column("flags")[firings.features] & hidden == 0
    features, values = firings.features[keep], firings.values[keep]
    score = np.abs(values)
    if st.session_state.get("rank") == "rarity":
        score = score * -np.log(idx.column("density")[features].clip(min=1 / max(1, idx.n_encoded)))
    order = np.lexsort((features, -score))[:ROWS]
    return list(zip(features[order].tolist(), values[order].tolist(), strict=True))


def ranking(idx, text: EncodedText):
    token = chosen_token(text)
    if token is None:
        st.caption(
            f"Strongest anywhere in {len(text)} tokens. Click a token to see what fires on it, a row to colour the text by it."
        )
    else:
        said = f"On token {token}, {render.visible(text.pieces[token])} : {int(text.l0[token])} features, error {render.number(float(text.error[token]) / max(1e-30, float(text.norm_x[token]) ** 2), 2)} of ‖x‖²"
        with st.container(horizontal=True, vertical_alignment="center"):
            st.html(render.fragment(f'<p class="q">{render.escape(said)}</p>'), width="content")
            st.button(
                "Whole text",
                on_click=lambda: st.session_state.pop("token", None),
                type="tertiary",
                icon=":material/close:",
            )
    rows = ranked(idx, text, token)
    if not rows:
        st.caption("Nothing fires here.")
        return
    features = [j for j, _ in rows]
    frame = pd.DataFrame(
        {
            "rank": range(1, len(rows) + 1),
            "feature": features,
            "code": [v for _, v in rows],
            "of max": [abs(v) / max(idx.feature(j).max, abs(v), 1e-30) for j, v in rows],
            "about": [state.about(idx, j) for j in features],
        }
    )
    key = f"ranking-{state.digest(features, token)}"
    st.dataframe(
        frame,
        hide_index=True,
        height="content",
        key=key,
        on_select=lambda: pick(key, features),
        selection_mode="single-cell",
        column_config={
            "rank": st.column_config.NumberColumn("", width=28),
            "feature": st.column_config.NumberColumn("Feature", format="%d", width=70),
            "code": st.column_config.NumberColumn("Code", format="%.2f", width=60),
            "of max": st.column_config.ProgressColumn(
                "of its max", format="percent", min_value=0, max_value=1, width=100
            ),
            "about": st.column_config.TextColumn("Label or top tokens"),
        },
        alt="Features that fire; a row colours the text by its feature",
    )


def pick(key: str, features: list[int]):
    if (row := state.clicked(st.session_state[key], "rank")) is not None:
        st.session_state.feature = features[row]


def small_multiples(idx, text: EncodedText):
    """The same text once per feature: where each of the strongest fires."""
    rows = ranked(idx, text, None)[:LINES]
    if not rows:
        return
    st.subheader("Where the strongest fire", anchor=False)
    lines = []
    for j, _ in rows:
        codes = text.codes_of(j)
        at = int(np.abs(codes).argmax())
        lo, hi = (0, len(text)) if len(text) <= 60 else (max(0, at - 40), min(len(text), at + 20))
        std = idx.feature(j).std
        line = render.tokens_html(
            text.pieces[lo:hi], codes[lo:hi].tolist(), max(idx.feature(j).max, float(np.abs(codes).max())), special=text.special[lo:hi].tolist(), encoded=text.encoded[lo:hi].tolist(), std=None if std is None else [std] * (hi - lo)
        )  # fmt: skip
        lines.append(
            f'<div class="x"><i>{j:,}</i><div>{line}<p class="q">{render.escape(state.about(idx, j))}</p></div></div>'
        )
    st.html(render.fragment(*lines))


page()
