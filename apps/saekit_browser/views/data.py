"""Where all of it comes from: manifests, fingerprints, sizes, and whether the files are what they say."""

import json
from pathlib import Path

import pandas as pd
import streamlit as st
from saekit_browser import state

from saekit.feature_index import render

NAMES = {
    "config.json": "options, model, site, fingerprint",
    "sae.safetensors": "weights",
    "run.json": "how it was trained",
    "metrics.jsonl": "the log of its training",
    "evaluation.json": "what was measured",
    "evaluation.history.jsonl": "what was measured before",
    "labels.sqlite": "labels, tags, notes, bookmarks",
}


@state.shown
def page():
    """Opens for a folder that the other pages refuse, and says why they do."""
    folder = state.chosen()
    st.title("Data", anchor=False)
    if folder.problem:
        st.error(state.literal(folder.problem), icon=":material/error:")
    left, right = st.columns([1, 1], gap="large")
    with left:
        facts("SAE", about_sae(folder.path))
        if not folder.problem:
            facts("Index", about_index(state.index()))
    with right:
        facts("Store", about_store(folder.path))
        integrity(folder)
        commands(folder.path)
    files(folder.path)


def facts(title: str, rows: dict[str, str]):
    st.subheader(title, anchor=False)
    body = "".join(
        f'<tr><td>{render.escape(name)}</td><td style="text-align:left;overflow-wrap:anywhere">{render.escape(value)}</td></tr>'
        for name, value in rows.items()
    )
    st.html(render.fragment(f"<table>{body}</table>"))


def about_sae(path: Path) -> dict[str, str]:
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    model, tokenizer = config.get("model") or {}, config.get("tokenizer") or {}
    options = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in config["options"].items())
    provenance = config.get("provenance") or {}
    return {
        "folder": str(path),
        "variant": f"{config['variant']}{' (signed)' if config['signed'] else ''}",
        "options": options or "none",
        "shape": f"D = {config['d_in']:,}, F = {config['d_sae']:,}, {config['dtype']}",
        "site": str(config.get("site") or "not said"),
        "model": model.get("id") or "not said",
        "weights of the model": model.get("weights_fingerprint") or "not said",
        "tokenizer": tokenizer.get("id") or "not said",
        "fingerprint": config["fingerprint"],
        "made by": str(provenance.get("created_by") or "not said"),
        "seed": str(provenance.get("seed", "not said")),
    }


def about_index(idx) -> dict[str, str]:
    m = idx.manifest
    return {
        "tokens": f"{m['E']:,} encoded, of {m['N']:,}" if "N" in m else f"{m['E']:,} encoded",
        "firings": f"{m['Z']:,}",
        "features": f"{m['F']:,}",
        "format": f"{m['format']} {m['format_version']}, by saekit {m['saekit_version']}",
        "fingerprint": idx.fingerprint,
        "without": ", ".join(
            name for name, there in (("by_token", idx.has_by_token), ("neighbours", idx.has_neighbours)) if not there
        )
        or "nothing",
    }


def about_store(path: Path) -> dict[str, str]:
    """The store that the SAE was trained on, as far as it is known and there."""
    run = path / "run.json"
    if not run.is_file():
        return {"store": "not known: this SAE was not trained here"}
    recorded = json.loads(run.read_text(encoding="utf-8"))["store"]
    rows = {"store": recorded.get("absolute") or recorded.get("path") or "a stream"}
    rows["fingerprint"] = str(recorded.get("fingerprint") or "not said")
    manifest = Path(rows["store"]) / "manifest.json"
    if not manifest.is_file():
        return {**rows, "there": "no: the folder is not at this place"}
    found = json.loads(manifest.read_text(encoding="utf-8"))
    text = found.get("text") or {}
    return {
        **rows,
        "rows": f"{found['rows']:,} of {found['tokens']:,} tokens" if "rows" in found else "not said",
        "text": str(text.get("source") or "not said"),
        "licence of the text": str(text.get("licence") or "not said; the text is the user's own"),
        "arithmetic": str((found.get("model") or {}).get("compute") or "not said"),
        "there": "yes" if found.get("fingerprint") == recorded.get("fingerprint") else "another one is at this place",
    }


@st.fragment(key="integrity")
@state.shown
def integrity(folder: state.Folder):
    """Reads every file; takes as long as that."""
    st.subheader("Integrity", anchor=False)
    if st.button("Check every file", icon=":material/fact_check:"):
        with st.spinner("Reading all of it …", show_time=True):
            problems = check(folder)
        for problem in problems:
            st.error(state.literal(problem), icon=":material/error:")
        if not problems:
            st.success("Weights, evaluation and index are what their manifests say.", icon=":material/check:")


def check(folder: state.Folder) -> list[str]:
    from saekit.sae import check_sae

    # the variant of a file must be known before its SAE can be read
    state.sae(str(folder.path.resolve()), state.stamp(folder.path))
    return check_sae(folder.path) + ([folder.problem] if folder.problem else state.index().check())


def commands(path: Path):
    st.subheader("Commands", anchor=False)
    st.code(f"saekit index    {path}\nsaekit evaluate {path}\nsaekit check    {path}", language="shell")


def files(path: Path):
    st.subheader("Files", anchor=False)
    rows = []
    for file in sorted(p for p in path.rglob("*") if p.is_file() and "checkpoints" not in p.parts):
        name = str(file.relative_to(path))
        rows.append({"file": name, "bytes": file.stat().st_size, "holds": NAMES.get(name, "")})
    st.dataframe(
        pd.DataFrame(rows, columns=["file", "bytes", "holds"]),
        hide_index=True,
        height="content",
        key="files",
        column_config={"bytes": st.column_config.NumberColumn("Bytes", format="localized")},
        alt="Files of the SAE folder",
    )


page()
