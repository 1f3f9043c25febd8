"""What all pages share: the folder that is browsed, the SAE that is looked at, and what stands in the URL.

Every shareable choice is a URL parameter and a bound widget of the same name; what people write goes to SQLite;
`st.session_state` holds widget values only. Page and parameter names are public and never change inside a major version.
"""

import argparse
import functools
import logging
import re
import secrets
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import streamlit as st

from saekit.browse import find_saes
from saekit.errors import SaekitError
from saekit.feature_index import FeatureIndex, open_index
from saekit.sae import read_config

VIEWS = Path(__file__).parent / "views"
OVERVIEW, FEATURES, FEATURE, PROMPT = (str(VIEWS / f"{name}.py") for name in ("overview", "features", "feature", "prompt"))
# the choices of page Features; they also set the order in which J and K walk
LIST_KEYS = ("q", "sort", "desc", "alive", "dmin", "dmax", "flag", "label")
SORTS = {
    "energy": "energy",
    "density": "density",
    "token_f1": "one token explains it",
    "top_token_share": "share of its top token",
    "token_entropy": "variety of tokens",
    "logit_kurtosis": "peaked logit weights",
    "max_dec_cos": "nearest decoder row",
    "n": "firings",
    "feature": "number",
}
FLAGS = ("dense", "near-duplicate", "one-sided", "start-of-sequence", "capped", "dead")
LABELLED = ("all", "labelled", "unlabelled")
SEARCH_LIMIT = 500

log = logging.getLogger("saekit_browser")


@dataclass(frozen=True)
class Arguments:
    path: Path
    """Folder that is browsed: one SAE, or a folder of them."""
    model: bool
    """Whether the language model may be loaded."""


@functools.cache
def arguments() -> Arguments:
    parser = argparse.ArgumentParser(prog="saekit browse")
    parser.add_argument("path", type=Path)
    parser.add_argument("--no-model", action="store_true")
    given = parser.parse_args(sys.argv[1:])
    return Arguments(given.path.resolve(), not given.no_model)


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
            read_config(path)
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

    return SAE.load(path)


@st.cache_resource(show_spinner=False, max_entries=1)
def model(name: str):
    """The language model, one at a time, loaded when a panel first needs it."""
    from saekit.model import load_model

    return load_model(name)


# words


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
            st.error(f"This panel failed; error {number} in the output of saekit browse says why.", icon=":material/error:")

    return inner


# the list of page Features


def remembered() -> dict:
    """The choices of page Features as they were left, whichever page is shown."""
    defaults = {"q": "", "sort": "energy", "desc": True, "alive": True, "dmin": None, "dmax": None, "flag": [], "label": "all"}
    given = {k: st.session_state[k] for k in LIST_KEYS if k in st.session_state}
    return {**defaults, **given}


def to_link() -> str:
    """The choices that differ from their defaults, as one URL parameter `list` of page Feature."""
    known = remembered()
    parts = [("q", known["q"])] if known["q"] else []
    parts += [("sort", known["sort"])] if known["sort"] != "energy" else []
    parts += [(k, "false") for k in ("desc", "alive") if not known[k]]
    parts += [(k, repr(known[k])) for k in ("dmin", "dmax") if known[k] is not None]
    parts += [("flag", f) for f in known["flag"]]
    parts += [("label", known["label"])] if known["label"] != "all" else []
    return urlencode(parts)


def from_link(text: str):
    """Puts the choices of a `list` parameter back where page Features will find them; what it does not know it leaves out."""
    flags = []
    for key, value in parse_qsl(text):
        if key == "q":
            st.session_state.q = value[:200]
        elif (key == "sort" and value in SORTS) or (key == "label" and value in LABELLED):
            st.session_state[key] = value
        elif key in ("desc", "alive"):
            st.session_state[key] = value != "false"
        elif key in ("dmin", "dmax") and re.fullmatch(r"[\d.e+-]+", value):
            st.session_state[key] = min(1.0, max(0.0, _number(value)))
        elif key == "flag" and value in FLAGS:
            flags.append(value)
    if flags:
        st.session_state.flag = flags


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def listed(idx: FeatureIndex):
    """(rows of page Features as a FeatureTable in their order, the hits behind a query or None)."""
    known = remembered()
    query, hits = known["q"].strip(), None
    if query:
        hits = search(idx, query)
    labelled = {"all": None, "labelled": True, "unlabelled": False}[known["label"]]
    table = idx.table(
        ("-" if known["desc"] else "") + known["sort"],
        alive=True if known["alive"] else None,
        flag=known["flag"],
        labelled=labelled,
        density=(known["dmin"], known["dmax"]),
    )
    if hits is not None:
        # found features stay in the order of how well they match
        allowed = set(table.features.tolist())
        table.features = _array([h.feature for h in hits if h.feature in allowed])
    return table, hits


def search(idx: FeatureIndex, query: str):
    """`/regex/` on token strings, `like:123` by decoder direction, a number, else text in labels, tokens and corpus."""
    if len(query) > 2 and query.startswith("/") and query.endswith("/"):
        return idx.search(regex=query[1:-1], limit=SEARCH_LIMIT)
    if match := re.fullmatch(r"like:\s*([\d,]{1,12})", query):
        return idx.search(like=int(match[1].replace(",", "")), limit=SEARCH_LIMIT)
    return idx.search(query, limit=SEARCH_LIMIT)


def _array(numbers: list[int]):
    import numpy as np

    return np.array(numbers, dtype=np.int64)
