"""What all pages share: the folder that is browsed, the SAE that is looked at, and what stands in the URL.

Every shareable choice is a URL parameter and a widget of the same name (`enter` and `leave` keep them equal); what people
write goes to SQLite. Page and parameter names are public and never change inside a major version.
"""

import argparse
import functools
import logging
import re
import secrets
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, get_args
from urllib.parse import parse_qs, urlencode

import numpy as np
import streamlit as st

from saekit.browse import find_saes
from saekit.config import LARGEST_SEED, SteerMode
from saekit.errors import SaekitError
from saekit.feature_index import FeatureIndex, open_index, render
from saekit.feature_index.encoded import EncodedText

VIEWS = Path(__file__).parent / "views"
OVERVIEW, FEATURES, FEATURE, PROMPT, COMPARE, STEER, MAP, EVALUATE, DATA = (
    str(VIEWS / f"{name}.py")
    for name in ("overview", "features", "feature", "prompt", "compare", "steer", "map", "evaluate", "data")
)
SEARCH_LIMIT = 500

CLICK = """<script>
(function open(tries) {
  const link = document.querySelector(".st-key-follow a")
  if (link) link.click()
  else if (tries) setTimeout(() => open(tries - 1), 20)
})(100)
</script>"""

log = logging.getLogger("saekit_browser")


@dataclass(frozen=True)
class Arguments:
    path: Path
    """Folder that is browsed: one SAE, or a folder of them."""
    model: bool
    """Whether the language model may be loaded."""
    variant_file: Path | None
    """Python file that defines the variant of an SAE."""


@functools.cache
def arguments() -> Arguments:
    parser = argparse.ArgumentParser(prog="saekit browse")
    parser.add_argument("path", type=Path)
    parser.add_argument("--no-model", action="store_true")
    parser.add_argument("--variant-file", type=Path)
    given = parser.parse_args(sys.argv[1:])
    return Arguments(given.path.resolve(), not given.no_model, given.variant_file)


# SAEs


@dataclass(frozen=True)
class Folder:
    """An SAE in the browsed folder."""

    name: str
    """As in the URL: the folder's name, never a path."""
    path: Path
    problem: str | None
    """Why it cannot be shown, in one line with the command that helps."""


def folders() -> list[Folder]:
    """The SAEs at the browsed path, in order of their names. SaekitError if there is none."""
    root = arguments().path
    found = []
    for path in find_saes(root):
        if not path.resolve().is_relative_to(root):
            continue
        try:
            _reader(path)
            problem = None
        except SaekitError as error:
            problem = str(error)
        found.append(Folder(path.name, path, problem))
    return found


def chosen() -> Folder:
    """The SAE that the selector of the page, or the URL, names; else the first that can be shown."""
    known = folders()
    by_name = {f.name: f for f in known}
    name = st.session_state.get("sae", st.query_params.get("sae"))
    return by_name.get(name) or first_good(known)


def first_good(known: Iterable[Folder]) -> Folder:
    known = list(known)
    return next((f for f in known if f.problem is None), known[0])


def index() -> FeatureIndex:
    """The index of the chosen SAE. SaekitError, in one line with the command, if it cannot be shown."""
    folder = chosen()
    if folder.problem:
        raise SaekitError(folder.problem)
    return _reader(folder.path)


def named_index(name: str) -> FeatureIndex:
    """The index of the SAE of that name among the browsed ones. SaekitError if there is none, or it cannot be shown."""
    folder = next((f for f in folders() if f.name == name), None)
    if folder is None:
        raise SaekitError(f"no SAE named {name} here")
    if folder.problem:
        raise SaekitError(folder.problem)
    return _reader(folder.path)


def _reader(path: Path) -> FeatureIndex:
    return _open(str(path.resolve()), stamp(path))


def stamp(path: Path) -> str:
    """Changes when the index in an SAE folder is another one, or is cut short."""
    manifest = path / "index" / "manifest.json"
    if not manifest.is_file():
        return ""
    sizes = [(p.name, p.stat().st_size) for p in sorted(manifest.parent.iterdir())]
    return sha256(manifest.read_bytes() + repr(sizes).encode()).hexdigest()


@st.cache_resource(show_spinner=False, max_entries=64)
def _open(path: str, stamp: str) -> FeatureIndex:
    return open_index(path)


@st.cache_resource(show_spinner=False, max_entries=4)
def sae(path: str, stamp: str):
    from saekit.sae import SAE

    know_variant()
    return SAE.load(path)


def know_variant():
    """Before an SAE is loaded whose variant a file defines."""
    from saekit.variants.files import load_variant_file

    if (file := arguments().variant_file) is not None:
        load_variant_file(file)


def command(verb: str, path: Path, *more: str) -> str:
    """A line for a terminal."""
    file = arguments().variant_file
    return shlex.join(["saekit", verb, str(path), *more, *(["--variant-file", str(file)] if file else [])])


@st.cache_resource(show_spinner=False, max_entries=1)
def model(name: str):
    """The language model, one at a time, loaded when a panel first needs it; in fp32, as the command line steers."""
    from saekit.model import load_model

    return load_model(name, compute="fp32")


def own_model(idx: FeatureIndex):
    """The language model of an index. SaekitError if it cannot be had, or has other weights now."""
    lm = model((idx.manifest.get("model") or {}).get("id") or "")
    expected = idx.manifest["fingerprints"]["model"]
    if expected and lm.weights_fingerprint != expected:
        raise SaekitError(
            f"the model {lm.id} has other weights than the one this index was made with; its codes would mean nothing"
        )
    return lm


def own_sae(idx: FeatureIndex):
    folder = idx.path.parent
    return sae(str(folder.resolve()), stamp(folder))


class Effects(NamedTuple):
    """What a code of 1 of each feature adds to the logit of one token."""

    per_code_F: np.ndarray
    note: str
    """What the number leaves out, in words; empty if nothing."""


@st.cache_resource(show_spinner=False, max_entries=64)
def effects(_idx: FeatureIndex, fingerprint: str, token: int) -> Effects:
    W_U_VD, note = own_model(_idx).unembedding([token])
    return Effects(_idx.effects_on(W_U_VD[0].detach().cpu().numpy()), note)


@st.cache_resource(show_spinner=False, max_entries=16)
def encoded(_idx: FeatureIndex, fingerprint: str, text: str) -> EncodedText:
    """A text that was typed, through the language model."""
    return _idx.encode(text, sae=own_sae(_idx), lm=own_model(_idx))


def digest(*parts) -> str:
    """A short name for values, such as the key of a widget that belongs to them."""
    return sha256(repr(parts).encode()).hexdigest()[:16]


def clicked(event, quiet: str) -> int | None:
    """Row of the selected cell of a table, None if there is none or if it lies in column `quiet`, the table's first.

    A table that gets the focus selects its first cell by itself, by Tab and sometimes by a click on a header; that must not
    open anything. With the keyboard: down to a row, then right.
    """
    cells = event.selection.cells
    return cells[0][0] if cells and cells[0][1] != quiet else None


def follow(page: str, **parameters: str):
    """Opens a page the way a click on a link does.

    `st.switch_page` with parameters first writes them to the address of the page that is left, twice: Back then ends at an
    address of that page without its filters. The script is a constant; it may run before the link is drawn.
    """
    with st.container(key="follow"):
        st.page_link(page, label="open", query_params=parameters)
    st.html(CLICK, unsafe_allow_javascript=True)


# words


def facts(idx: FeatureIndex, *, named: bool) -> str:
    """One line of HTML: which SAE this is."""
    m = idx.manifest
    model = (m.get("model") or {}).get("id") or "a model without a name"
    parts = (m["variant"], f"{m['F']:,} features", f"{m['site']} of {Path(model).name}", f"{m['E']:,} tokens")
    name = f"<b>{render.escape(idx.name)}</b> · " if named else ""
    return render.fragment(f'<p class="q">{name}{render.escape(" · ".join(parts))}</p>')


def literal(text: str) -> str:
    """Text that Streamlit's Markdown shows as it is, on one line: errors quote folder names and labels."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$:^=])", r"\\\1", " ".join(text.split()))


def shown(view: Callable) -> Callable:
    """Decorates a page or fragment: a SaekitError becomes one line, anything else a number that stands in the log."""

    @functools.wraps(view)
    def inner(*args, **kwargs):
        try:
            return view(*args, **kwargs)
        except SaekitError as error:
            st.error(literal(str(error)), icon=":material/error:")
        except Exception:
            number = secrets.token_hex(2)
            log.exception("error %s", number)
            st.error(
                f"This panel failed; error {number} in the output of saekit browse says why.", icon=":material/error:"
            )

    return inner


# the address


class Choice(NamedTuple):
    """One choice of a page: a widget key and a URL parameter of the same name."""

    default: Any
    read: Callable[[list[str]], Any]
    """From the strings in the URL; None if they make no sense."""


def _one_of(*values: str) -> Choice:
    return Choice(values[0], lambda given: given[-1] if given[-1] in values else None)


def _some_of(*values: str) -> Choice:
    return Choice([], lambda given: [v for v in given if v in values])


def _yes(default: bool) -> Choice:
    return Choice(default, lambda given: {"true": True, "false": False}.get(given[-1]))


def _share(given: list[str]) -> float | None:
    try:
        return min(1.0, max(0.0, float(given[-1])))
    except ValueError:
        return None


def _number(given: list[str]) -> int | None:
    return int(given[-1]) if re.fullmatch(r"[0-9]{1,12}", given[-1]) else None


def _seed(given: list[str]) -> int | None:
    return int(given[-1]) if re.fullmatch(r"[0-9]{1,16}", given[-1]) and int(given[-1]) <= LARGEST_SEED else None


def own_feature(idx: FeatureIndex):
    """Another SAE may have fewer features, and page Prompt may have none chosen: then it is feature 0."""
    if st.session_state.feature is None or not 0 <= st.session_state.feature < len(idx):
        st.session_state.feature = 0


def about(idx: FeatureIndex, feature: int, tokens: int = 3) -> str:
    """A feature in a few words: its label, else the tokens it fires on most."""
    f = idx.feature(feature)
    return f.label or "  ".join(t.text.strip() or t.text for t in f.tokens(tokens)) or "silent in the index"


def doses(text: str) -> tuple[float, ...] | None:
    """Up to four numbers with commas between; None if it is anything else."""
    words = [word.strip().replace("−", "-") for word in text.split(",")]
    if not 1 <= len(words) <= 4 or not all(
        re.fullmatch(r"[+-]?([0-9]{1,6}(\.[0-9]{0,6})?|\.[0-9]{1,6})", w) for w in words
    ):
        return None
    return tuple(float(word) for word in words)


SORTS = (
    "energy", "density", "n", "token_f1", "top_token_share", "token_entropy", "logit_kurtosis", "max_dec_cos", "q95", "feature",
)  # fmt: skip
FLAGS = ("dense", "near-duplicate", "one-sided", "start-of-sequence", "capped", "dead", "under-budget")
LABELLED = ("all", "labelled", "unlabelled")
VIEWS, ZOOMS, SIGNS, SCALES = ("top", "quantiles", "random", "near"), ("snippet", "stacked", "full"), ("both", "pos", "neg"), ("own", "p99")  # fmt: skip
RANKS, HIDE = ("magnitude", "rarity", "effect"), ("dense", "start-of-sequence")
TIERS = ("all", "1", "2")
COLOURS = ("density", "energy", "sign", "label")
URL_CHARACTERS = 2_000
TEXT_CHARACTERS = 20_000
"""Of a text that is typed, at most."""

CHOICES: dict[str, dict[str, Choice]] = {
    "features": {
        "q": Choice("", lambda given: given[-1][:200]),
        "sort": _one_of(*SORTS),
        "desc": _yes(True),
        "alive": _yes(True),
        "dmin": Choice(None, _share),
        "dmax": Choice(None, _share),
        "flag": _some_of(*FLAGS),
        "label": _one_of(*LABELLED),
    },
    "feature": {
        "feature": Choice(0, _number),
        "view": _one_of(*VIEWS),
        "zoom": _one_of(*ZOOMS),
        "sign": _one_of(*SIGNS),
        "scale": _one_of(*SCALES),
    },
    "steer": {
        "feature": Choice(0, _number),
        "mode": _one_of(*get_args(SteerMode)),
        "doses": Choice("-4, 4", lambda given: given[-1][:60] if doses(given[-1][:60]) else None),
        "seed": Choice(0, _seed),
        "text": Choice("", lambda given: given[-1][:URL_CHARACTERS]),
    },
    "map": {"color": _one_of(*COLOURS)},
    "compare": {
        # names are looked up among the folders, and never part of a path
        "a": Choice("", lambda given: given[-1][:200]),
        "b": Choice("", lambda given: given[-1][:200]),
        "kind": _one_of("matched", "split", "merged", "first", "second"),
    },
    "evaluate": {"tier": _one_of(*TIERS)},
    "prompt": {
        "text": Choice("", lambda given: given[-1][:URL_CHARACTERS]),
        "feature": Choice(None, _number),
        "rank": _one_of(*RANKS),
        "hide": _some_of(*HIDE),
        "beside": Choice("", lambda given: given[-1][:URL_CHARACTERS]),
        "next": Choice("", lambda given: given[-1][:100]),
        "document": Choice(None, _number),
    },
}


def enter(page: str):
    """Before the widgets of a page: an address that is not the one this page wrote last sets them, else they are as left.

    Streamlit's own `bind="query-params"` does half of this, but on every change of page it writes an address of the old
    page without its parameters into the history, so that Back resets the filters and the feature number.
    """
    given = _in_address(page)
    if given and given != st.session_state.get(f"written-{page}"):
        # one filter in a link means that the others are off; the way a feature is looked at is kept
        _apply(page, given, reset=page == "features")
    for key, choice in CHOICES[page].items():
        st.session_state.setdefault(key, choice.default)


def leave(page: str):
    """After the widgets of a page, or of a fragment of it: the address says what they say."""
    wanted = _as_strings(page)
    given = _in_address(page)
    for key in given.keys() - wanted.keys():
        del st.query_params[key]
    if changed := {k: v for k, v in wanted.items() if given.get(k) != v}:
        st.query_params.update(changed)
    st.session_state[f"written-{page}"] = wanted


def say_if_missing(last: int, what: str = "feature", whose: str = "SAE"):
    """A number in the address that is none, or above the last one."""
    asked = st.query_params.get(what)
    number = None if asked is None else _number([asked])
    if asked is not None and (number is None or number > last):
        shown = asked[:40] if number is None else f"{number:,}"
        said = f"{what} {shown} does not exist; this {whose} has " + (f"0 to {last:,}" if last >= 0 else "none")
        st.warning(literal(said), icon=":material/search_off:")


def say_if_no_seed():
    """A seed in the address that is none, or is above what a browser's numbers hold."""
    asked = st.query_params.get("seed")
    if asked is not None and _seed([asked]) is None:
        st.warning(literal(f"seed {asked[:40]}: it is a number from 0 to {LARGEST_SEED}"), icon=":material/search_off:")


def _in_address(page: str) -> dict[str, list[str]]:
    return {k: st.query_params.get_all(k) for k in CHOICES[page] if k in st.query_params}


def _apply(page: str, given: dict[str, list[str]], *, reset: bool):
    for key, choice in CHOICES[page].items():
        value = choice.read(given[key]) if key in given else None
        if value is not None:
            st.session_state[key] = value
        elif reset or key in given:
            st.session_state[key] = choice.default


def _as_strings(page: str) -> dict[str, list[str]]:
    """Parameters of the choices that differ from their defaults."""
    out = {}
    for key, value in remembered(page).items():
        if value != CHOICES[page][key].default:
            many = value if isinstance(value, list | tuple) else [value]
            out[key] = [str(v).lower() if isinstance(v, bool) else str(v) for v in many]
    for key in ("text", "beside"):
        if len(out.get(key, [""])[0]) > URL_CHARACTERS:
            del out[key]
    return out


def remembered(page: str) -> dict:
    """The choices of a page as they were left, whichever page is shown."""
    return {k: st.session_state.get(k, c.default) for k, c in CHOICES[page].items()}


def link(page: str, **more: str) -> str:
    """The query string of the choices of a page, `more` first."""
    return urlencode({**more, **_as_strings(page)}, doseq=True)


def restore_list():
    """On a page opened from page Features: its parameter `list` holds the filters, so that a reload keeps them."""
    if "list" in st.query_params and not any(k in st.session_state for k in CHOICES["features"]):
        _apply("features", parse_qs(st.query_params["list"]), reset=True)


# the list of page Features


class Found(NamedTuple):
    features: np.ndarray
    """Feature numbers in the order of page Features (int64)."""
    hits: dict
    """Hit of each found feature where a query was typed, else empty."""


def found(idx: FeatureIndex, keep: int | None = None) -> Found:
    """What page Features lists now, and `keep` even if a label that was just written would drop it from the list."""
    known = remembered("features")
    # labels are searched too, so a query is asked again when they change
    hits = _hits(idx, idx.fingerprint, _age(idx.labels.path), known["q"].strip())
    choices = (known["sort"], known["desc"], known["alive"], known["dmin"], known["dmax"], tuple(known["flag"]))
    features = _filtered(idx, idx.fingerprint, choices)
    if known["q"].strip():
        # what a query found stays in the order of how well it matches
        matched = np.fromiter(hits, np.int64, len(hits))
        features = matched[np.isin(matched, features)]
    if known["label"] != "all":
        named = [j for j, e in idx.labels.all().items() if e.label]
        keep_F = np.isin(features, named) == (known["label"] == "labelled")
        features = features[keep_F | (features == keep)]
    return Found(features, hits)


def _age(path: Path) -> int:
    """Changes when a label is written: of the database or of its write-ahead log."""
    return sum(p.stat().st_mtime_ns for p in (path, path.with_name(path.name + "-wal")) if p.is_file())


def flags(idx: FeatureIndex) -> tuple[str, ...]:
    """Those that features of this index can carry."""
    return FLAGS if idx.has_budgets else FLAGS[:-1]


@st.cache_resource(show_spinner=False, max_entries=16)
def _filtered(_idx: FeatureIndex, fingerprint: str, choices: tuple) -> np.ndarray:
    sort, desc, alive, dmin, dmax, flag = choices
    # page Features drops a flag that this SAE does not have; other pages may come first
    flag = [name for name in flag if name in flags(_idx)]
    order = ("-" if desc else "") + sort
    return _idx.table(order, alive=True if alive else None, flag=flag, density=(dmin, dmax)).features


@st.cache_resource(show_spinner=False, max_entries=64)
def _hits(_idx: FeatureIndex, fingerprint: str, age: int, query: str) -> dict:
    return {h.feature: h for h in search(_idx, query)} if query else {}


def search(idx: FeatureIndex, query: str):
    """`/regex/` on token strings, `like:123` by decoder direction, else text in labels, tokens and corpus."""
    if len(query) > 2 and query.startswith("/") and query.endswith("/"):
        return idx.search(regex=query[1:-1], limit=SEARCH_LIMIT)
    if match := re.fullmatch(r"like:\s*([\d,]{1,12})", query):
        return idx.search(like=int(match[1].replace(",", "")), limit=SEARCH_LIMIT)
    return idx.search(query, limit=SEARCH_LIMIT)
