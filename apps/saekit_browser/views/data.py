"""Where all of it comes from: manifests, fingerprints, sizes, and whether the files are what they say."""

import json
from functools import partial
from pathlib import Path

import pandas as pd
import streamlit as st
from saekit_browser import jobs, state

from saekit.feature_index import render

NAMES = {
    "config.json": "options, model, site, fingerprint",
    "sae.safetensors": "weights",
    "run.json": "how it was trained",
    "metrics.jsonl": "the log of its training",
    "evaluation.json": "what was measured",
    "evaluation.history.jsonl": "what was measured before",
    "jobs/check.json": "what the last check found",
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


def recorded_store(path: Path) -> dict | None:
    """What `run.json` says of the store that the SAE was trained on."""
    run = path / "run.json"
    return json.loads(run.read_text(encoding="utf-8"))["store"] if run.is_file() else None


def store_at_hand(path: Path) -> Path | None:
    """The folder of that store, if it is still there."""
    recorded = recorded_store(path) or {}
    places = [Path(recorded[key]) for key in ("absolute", "path") if recorded.get(key)]
    return next((place for place in places if (place / "manifest.json").is_file()), None)


def about_store(path: Path) -> dict[str, str]:
    """The store that the SAE was trained on, as far as it is known and there."""
    recorded = recorded_store(path)
    if recorded is None:
        return {"store": "not known: this SAE was not trained here"}
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


def integrity(folder: state.Folder):
    """What the last check found, and the button that reads every file again: of the SAE, the index, and the store if it is
    at hand."""
    st.subheader("Integrity", anchor=False)
    store = store_at_hand(folder.path)
    if not jobs.running(folder.path) and (found := jobs.result(folder.path, "check")) is not None:
        for problem in found["problems"]:
            st.error(state.literal(problem), icon=":material/error:")
        if not found["problems"]:
            st.success(
                f"{listed(found['checked'])} are what their manifests say, {jobs.when(found)}.", icon=":material/check:"
            )
        if found["stamp"] != state.stamp(folder.path):
            st.caption("The index has changed since.")
    lines = [state.command("check", folder.path)]
    lines += [] if folder.problem else [state.command("check", folder.path / "index")]
    lines += [] if store is None else [state.command("check", store)]
    task = jobs.Task("check", "Check every file", "\n".join(lines), partial(check, folder, store))
    jobs.panel(folder.path, task)


def check(folder: state.Folder, store: Path | None) -> dict:
    from saekit.feature_index import open_index
    from saekit.sae import check_sae
    from saekit.store import check as check_store

    # the variant of a file must be known before its SAE can be read
    state.know_variant()
    checked, problems = ["SAE", "evaluation", "index"], check_sae(folder.path)
    problems += [folder.problem] if folder.problem else open_index(folder.path).check()
    if store is not None:
        checked.append("store")
        problems += [f"{store}: {problem}" for problem in check_store(store)]
    return {"checked": checked, "problems": problems}


def listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def commands(path: Path):
    st.subheader("Commands", anchor=False)
    st.code("\n".join(state.command(verb, path) for verb in ("index", "evaluate")), language="shell")


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
        column_config={"bytes": st.column_config.NumberColumn("bytes", format="localized")},
        alt="Files of the SAE folder",
    )


page()
