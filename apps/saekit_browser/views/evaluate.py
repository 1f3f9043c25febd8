"""What was measured: every number with its interval, tokens, baselines and definition, and the command that measures again."""

import json
from functools import partial
from pathlib import Path

import pandas as pd
import streamlit as st
from saekit_browser import jobs, state

from saekit.feature_index import render

TIERS = {"1": "Held-out activations", "2": "The language model with the SAE in place"}


@state.shown
def page():
    idx = state.index()
    st.title("Evaluate", anchor=False)
    folder = idx.path.parent
    state.enter("evaluate")
    st.segmented_control(
        "Tier",
        state.TIERS,
        format_func=lambda tier: "both" if tier == "all" else tier,
        required=True,
        key="tier",
        persist_state="session",
        help="Which are shown below, and which the button measures: 1 = held-out activations, 2 = the language model",
    )
    state.leave("evaluate")
    measuring(folder, (1, 2) if st.session_state.tier == "all" else (int(st.session_state.tier),))
    # what it imports takes longer than the rest of the page
    from saekit.evaluation.report import load_evaluation

    evaluation = load_evaluation(folder)
    st.html(render.fragment(f'<p class="lead">{render.escape(evaluation.health())}</p>'))
    for warning in evaluation.warnings():
        st.warning(state.literal(warning), icon=":material/warning:")
    for tier, entry in sorted(evaluation.content["tiers"].items()):
        if st.session_state.tier not in ("all", tier):
            continue
        st.subheader(f"{TIERS.get(tier, 'Tier')} (tier {tier})", anchor=False)
        st.dataframe(
            table(entry["metrics"]),
            hide_index=True,
            height="content",
            key=f"tier-{tier}",
            column_config={
                "value": st.column_config.TextColumn("value", width=90),
                "± 95 %": st.column_config.TextColumn(width=80),
                "tokens": st.column_config.NumberColumn("tokens", format="localized", width=100),
            },
            alt=f"Metrics of tier {tier}",
        )
    history(folder)
    with st.expander("On what"):
        st.json({key: evaluation.content.get(key) for key in ("sae", "data", "environment", "saekit_version")})


def measuring(folder: Path, tiers: tuple[int, ...]):
    """The job that does what the command does; each tier is stored as soon as it is done, so one that is cancelled keeps the
    tiers before."""
    words = [] if tiers == (1, 2) else ["--tiers", *map(str, tiers)]
    refused = None
    if 2 in tiers and not state.arguments().model:
        refused = "Tier 2 needs the language model, and saekit browse was started with --no-model."
    task = jobs.Task("evaluate", "Measure", state.command("evaluate", folder, *words), partial(measure, folder, tiers))
    jobs.panel(folder, task, refused=refused)
    found = jobs.result(folder, "evaluate")
    if found is not None and not jobs.running(folder):
        st.caption(f"Last measured here {jobs.when(found)}.")


def measure(folder: Path, tiers: tuple[int, ...]) -> dict:
    from saekit.evaluation import evaluate

    state.know_variant()
    evaluation = evaluate(folder, tiers=tiers)
    return {"tiers": list(tiers), "health": evaluation.health()}


def table(metrics: dict[str, dict]) -> pd.DataFrame:
    rows = []
    for name, m in metrics.items():
        ci = m["ci95"]
        rows.append(
            {
                "metric": name,
                "value": "–" if m["value"] is None else render.number(m["value"], 4),
                "± 95 %": render.number((ci[1] - ci[0]) / 2, 2) if ci else "",
                "unit": m["unit"],
                "better": {"lower": "lower", "higher": "higher"}.get(m["better"], ""),
                "tokens": m["n"],
                "beside it": ", ".join(f"{k} {render.number(v)}" for k, v in m["baselines"].items()),
                "note": m["note"],
                "definition": m["formula"],
            }
        )
    return pd.DataFrame(rows)


def history(folder):
    """Earlier evaluations, newest first."""
    path = folder / "evaluation.history.jsonl"
    if not path.is_file():
        return
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 2:
        return
    st.subheader("History", anchor=False)
    keys = [k for k in ("fvu", "l0", "alive", "ce_added", "kl") if any(k in line["metrics"] for line in lines)]
    rows = [
        {"date": line["date"], "tiers": ", ".join(line["tiers"]), "seconds": sum(line["seconds"].values())}
        | {k: line["metrics"].get(k) for k in keys}
        for line in reversed(lines)
    ]
    st.dataframe(pd.DataFrame(rows), hide_index=True, height="content", key="history", alt="Earlier evaluations")


page()
