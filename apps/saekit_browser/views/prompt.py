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

ROWS = 16
LINES = 8
TYPED, PASSAGE, DOCUMENT = "Your text", "A passage of the index", "A document of the index"
# tokens of a document that are shown at once
PART = 2_000

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
    state.say_if_missing(idx.n_documents - 1, "document", "index")
    state.enter("prompt")
    if (st.session_state.document or 0) >= idx.n_documents:
        st.session_state.document = None
    if st.session_state.document is not None:
        st.session_state.setdefault("source", DOCUMENT)
    if (st.session_state.feature or 0) >= len(idx):
        st.session_state.feature = None
    prompt(idx)


@st.fragment(key="prompt")
@state.shown
def prompt(idx):
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        chosen, two = source(idx), wants_two()
    if chosen != DOCUMENT:
        st.session_state.document = None
    places = st.columns(2 if two else 1, gap="medium")
    with places[0]:
        text = {PASSAGE: passage, DOCUMENT: document, TYPED: typed}[chosen](idx)
    with places[-1]:
        other = beside(idx) if two else None
    if text is None:
        return
    texts = [text] if other is None else [text, other]
    left, right = st.columns([5, 3], gap="large")
    with right, st.container(horizontal=True, vertical_alignment="bottom"):
        st.segmented_control(
            "Rank by",
            state.RANKS,
            required=True,
            key="rank",
            persist_state="session",
            help="rarity = magnitude × −log density; effect = code × decoder row · unembedding of a next token",
        )
        st.pills("Hide", state.HIDE, selection_mode="multi", key="hide", persist_state="session")
    with right:
        effects = towards(idx, texts) if st.session_state.rank == "effect" else None
    with left:
        feature = colour(idx, texts, effects)
        state.leave("prompt")
        for side, place in enumerate(st.columns(len(texts), gap="medium")):
            with place:
                tokens(idx, texts, side, feature)
                strip(idx, texts[side])
                errors(texts[side])
                small_multiples(idx, texts[side], effects)
    with right:
        ranking(idx, texts, effects)


# where the text comes from


def source(idx) -> str:
    stored = [] if not idx.has_by_token else [PASSAGE, *([DOCUMENT] if idx.n_documents else [])]
    with_model = state.arguments().model
    if not with_model:
        if not idx.has_by_token:
            raise SaekitError(
                f"no language model (--no-model) and an index without by_token; run  saekit index {idx.path.parent}"
            )
        st.caption("Typed text needs the language model, and saekit browse was started with --no-model.")
    allowed = [TYPED, *stored] if with_model else stored
    if st.session_state.get("source") not in allowed:
        st.session_state.source = allowed[0]
    chosen = st.segmented_control(
        "Source",
        allowed,
        required=True,
        key="source",
        persist_state="session",
        label_visibility="collapsed",
    )
    assert chosen is not None
    return chosen


def typed(idx) -> EncodedText | None:
    long = len(st.session_state.get("text") or "") > state.URL_CHARACTERS
    given = st.text_area(
        "Text",
        key="text",
        height=120,
        max_chars=state.TEXT_CHARACTERS,
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
        return state.encoded(idx, idx.fingerprint, given)


def passage(idx) -> EncodedText:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        number = st.number_input("Sequence", 0, idx.n_sequences - 1, key="sequence", persist_state="session", width=160)
        st.button("Another", icon=":material/casino:", on_click=another, args=(idx.n_sequences,), shortcut="N")
    starts = idx.file("tokens")["seq_start"]
    return idx.passage(np.arange(int(starts[number]), int(starts[number + 1])))


def document(idx) -> EncodedText | None:
    """A document as the store holds it, its name shown and never part of a label."""
    if st.session_state.document is None:
        st.session_state.document = 0
    with st.container(horizontal=True, vertical_alignment="bottom"):
        number = st.number_input(
            "Document", 0, idx.n_documents - 1, step=1, key="document", persist_state="session", width=160
        )
        positions = idx.document_positions(number)
        parts = max(1, -(-len(positions) // PART))
        part = 1
        if parts > 1:
            part = st.number_input(f"Part of {parts}", 1, parts, 1, key=f"part-{number}", width=160)
        name = idx.documents[number].get("name", "") if number < len(idx.documents) else ""
        said = f"{name or 'no name'} · {len(positions):,} tokens in the index"
        st.html(render.fragment(f'<p class="q">{render.escape(said)}</p>'), width="content")
    if not len(positions):
        st.caption("This document is not in the part of the store that was indexed.")
        return None
    return idx.passage(positions[(part - 1) * PART : part * PART])


def wants_two() -> bool:
    """Whether there is a second text, which only the model can read."""
    if not state.arguments().model:
        return False
    if st.session_state.beside:
        st.session_state.setdefault("two", True)
    return st.toggle("Another text beside it", key="two", persist_state="session", on_change=drop_beside)


def beside(idx) -> EncodedText | None:
    given = st.text_area(
        "Text beside it",
        key="beside",
        height=120,
        max_chars=state.TEXT_CHARACTERS,
        placeholder="Type or paste another text, then Ctrl+Enter",
        label_visibility="collapsed",
        persist_state="session",
    )
    if not given.strip():
        return None
    with st.spinner("Reading the text with the language model …", show_time=True):
        return state.encoded(idx, idx.fingerprint, given)


def drop_beside():
    """A text that is not shown does not stand in the address."""
    if not st.session_state.two:
        st.session_state.beside = ""
    st.session_state.pop("token", None)


def another(sequences: int):
    st.session_state.sequence = int(np.random.default_rng().integers(sequences))
    st.session_state.pop("token", None)


# panels


def towards(idx, texts: list[EncodedText]) -> state.Effects | None:
    """Of each feature on the logit of the next token that is named, else of the one that follows the chosen token; None, with
    the reason, where there is none."""
    given = st.text_input(
        "Next token",
        key="next",
        max_chars=100,
        persist_state="session",
        placeholder="the one that follows the chosen token",
        help="A token as it is, with its space; #17 is token 17",
        width=260,
    )
    why = " Ranked by magnitude instead."
    if not state.arguments().model:
        st.caption("The effect needs the language model, and saekit browse was started with --no-model." + why)
        return None
    side, t = chosen_token(texts) or (0, len(texts[0]))
    if not given and t + 1 >= len(texts[side]):
        st.caption("Name a next token, or click a token that another one follows." + why)
        return None
    try:
        token = idx.token_named(given) if given else int(texts[side].tokens[t + 1])
        with st.spinner("Reading the unembedding of the language model …", show_time=True):
            effects = state.effects(idx, idx.fingerprint, token)
    except SaekitError as error:
        st.warning(state.literal(f"{error}.{why}"), icon=":material/search_off:")
        return None
    said = f"on the logit of {idx.token_text(token)} (token {token:,}): code × decoder row · unembedding, before the final norm's division"
    said += f"; {effects.note}" if effects.note else ""
    st.html(render.fragment(f'<p class="q">{render.escape(said)}</p>'))
    return effects


def colour(idx, texts: list[EncodedText], effects: state.Effects | None) -> int | None:
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
        best = ranked(idx, texts, chosen_token(texts), effects)
        feature = asked if asked is not None else best[0][0] if best else None
        if feature is not None:
            st.page_link(
                state.FEATURE,
                label=f"Feature {feature:,}",
                icon=":material/lens_blur:",
                query_params={"feature": str(feature)},
            )
    return feature


def tokens(idx, texts: list[EncodedText], side: int, feature: int | None):
    text = texts[side]
    all_codes = [t.codes_of(feature) if feature is not None else np.zeros(len(t), np.float32) for t in texts]
    codes = all_codes[side]
    scale = idx.feature(feature).max if feature is not None else 0.0
    scale = max(scale, *(float(np.abs(c).max(initial=0)) for c in all_codes))
    std = idx.feature(feature).std if feature is not None else None
    error, units = text.error_share, []
    for a, b in render.units(text.pieces):
        at = a + int(np.abs(codes[a:b]).argmax())
        code = float(codes[at])
        step = render.step(code, scale) if code else ""
        # white space is laid out as it is, with a mark where a line ends
        shown = render.visible(b"".join(text.pieces[a:b])).replace("␣", " ").replace("↵", "↵\n")
        spread = f" ± {render.number(std)}" if std is not None else ""
        title = (
            f"token {a:,}"
            + (f" · {render.number(code)}{spread}" if code else "")
            + f" · {int(text.l0[a])} features · error {render.percent(float(error[a]))}"
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
    at = chosen_token(texts)
    chosen = at[1] if at is not None and at[0] == side else None
    with st.container(border=True):
        event = token_view()(
            key=f"tokens-{side}" if side else "tokens",
            data={"units": units, "chosen": -1 if chosen is None else chosen},
            on_token_change=lambda: None,
        )
    if event.token is not None and event.token != chosen:
        st.session_state.token, st.session_state.side = int(event.token), side
        st.rerun(scope="fragment")
    if feature is None:
        st.caption("Nothing fires on this text.")
        return
    said = f"feature {feature:,}, {state.about(idx, feature)}: fires on {int((codes != 0).sum())} of {len(text)} tokens"
    legend = render.legend_html(scale, idx.signed, "its largest magnitude in the index")
    st.html(render.fragment(f"<p>{render.escape(said)}</p>{legend}"))


def errors(text: EncodedText):
    """The share of each token that the SAE leaves out."""
    share = text.error_share
    at = int(share.argmax())
    with st.expander("Error per token", icon=":material/blur_on:"):
        mean = float(share[text.encoded].mean()) if text.encoded.any() else 0.0
        said = f"‖x − x̂‖² as a share of ‖x‖²: mean {render.percent(mean)}, largest {render.percent(float(share[at]))} at token {at:,}"
        line = render.tokens_html(
            text.pieces, share.tolist(), float(share[at]), special=text.special.tolist(), encoded=text.encoded.tolist(), breaks=True
        )  # fmt: skip
        legend = render.legend_html(float(share[at]), False, "largest here")
        st.html(
            render.fragment(f'<p class="q">{render.escape(said)}</p>{legend}<div class="t">{line}</div>'),
        )


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


def chosen_token(texts: list[EncodedText]) -> tuple[int, int] | None:
    """Which text, and the token in it that was clicked; None if none was."""
    t, side = st.session_state.get("token"), st.session_state.get("side", 0)
    return (side, t) if t is not None and side < len(texts) and t < len(texts[side]) else None


def ranked(
    idx, texts: list[EncodedText], at: tuple[int, int] | None, effects: state.Effects | None
) -> list[tuple[int, float]]:
    """(feature, code) on one token, or at its strongest anywhere in the texts, by the chosen rank."""
    if at is not None:
        features, values = texts[at[0]].at(at[1])
    else:
        parts = [text.strongest(len(text.features)) for text in texts]
        features, values = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.lexsort((-np.abs(values), features))
        features, first = np.unique(features[order], return_index=True)
        values = values[order][first]
    hidden = sum(FLAGS[name] for name in st.session_state.get("hide") or ())
    keep = idx.column("flags")[features] & hidden == 0
    features, values = features[keep], values[keep]
    score = np.abs(values)
    if st.session_state.get("rank") == "rarity":
        score = score * -np.log(idx.column("density")[features].clip(min=1 / max(1, idx.n_encoded)))
    elif effects is not None:
        score = np.abs(values * effects.per_code_F[features])
    order = np.lexsort((features, -score))[:ROWS]
    return list(zip(features[order].tolist(), values[order].tolist(), strict=True))


def ranking(idx, texts: list[EncodedText], effects: state.Effects | None):
    at = chosen_token(texts)
    if at is None:
        where = "both texts" if len(texts) > 1 else f"{len(texts[0])} tokens"
        st.caption(
            f"Strongest anywhere in {where}. Click a token to see what fires on it, a row to colour the text by it."
        )
    else:
        text, token = texts[at[0]], at[1]
        said = f"On token {token}, {render.visible(text.pieces[token])} : {int(text.l0[token])} features"
        said += (
            f", error {render.percent(float(text.error_share[token]))} of ‖x‖²" if text.encoded[token] else ", no code"
        )
        with st.container(horizontal=True, vertical_alignment="center"):
            st.html(render.fragment(f'<p class="q">{render.escape(said)}</p>'), width="content")
            st.button(
                "Both texts" if len(texts) > 1 else "Whole text",
                on_click=lambda: st.session_state.pop("token", None),
                type="tertiary",
                icon=":material/close:",
            )
    rows = ranked(idx, texts, at, effects)
    if not rows:
        st.caption("Nothing fires here.")
        return
    features = [j for j, _ in rows]
    columns = {"rank": range(1, len(rows) + 1), "feature": features, "code": [v for _, v in rows]}
    if at is None and len(texts) > 1:
        for name, text in zip(("code", "beside"), texts, strict=True):
            codes = [text.codes_of(j) for j in features]
            columns[name] = [float(c[np.abs(c).argmax()]) for c in codes]
    if effects is not None:
        columns["effect"] = [float(v * effects.per_code_F[j]) for j, v in rows]
    columns["of max"] = [abs(v) / max(idx.feature(j).max, abs(v), 1e-30) for j, v in rows]
    columns["about"] = [state.about(idx, j) for j in features]
    key = f"ranking-{state.digest(features, at)}"
    st.dataframe(
        pd.DataFrame(columns),
        hide_index=True,
        height="content",
        key=key,
        on_select=lambda: pick(key, features),
        selection_mode="single-cell",
        column_config={
            "rank": st.column_config.NumberColumn("", width=28),
            "feature": st.column_config.NumberColumn("Feature", format="%d", width=70),
            "code": st.column_config.NumberColumn("Code", format="%.2f", width=60),
            "beside": st.column_config.NumberColumn("beside", format="%.2f", width=60),
            "effect": st.column_config.NumberColumn("Effect", format="%.3f", width=66),
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


def small_multiples(idx, text: EncodedText, effects: state.Effects | None):
    """The same text once per feature: where each of the strongest fires."""
    rows = ranked(idx, [text], None, effects)[:LINES]
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
