"""Steering drawn with the pieces of the one renderer: data in, a string out.

steering_text(found, ansi=True)             # for the terminal
fragment(steering_html(found))              # notebook and browser
"""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saekit.feature_index.render import (
    _bar_rows,
    _plain,
    _quoted,
    _shown,
    code,
    escape,
    example_html,
    number,
    percent,
)

if TYPE_CHECKING:
    from saekit.steering import Ablation, Change, Run, Steering

WIDTH = 96
STORED_AND_NOW = 0.05
"""A code that was stored from an activation in bf16 may differ by so much from the one that is computed now."""
DOES = {
    "add": "adds dose · {unit} of the feature's direction",
    "set": "clamps the feature's code to dose · {unit}",
    "ablate": "takes the feature's part away where it fires",
    "project": "leaves nothing of the feature's direction",
}


def what_it_does(found: "Steering") -> str:
    """`adds dose · 3.21 of the feature's direction`."""
    return DOES[found.mode].format(unit=number(found.unit) if found.unit is not None else "")


def cost(run: "Run") -> str:
    """What a run costs, in words."""
    kl = "" if run.baseline else f"KL {number(run.kl)} nats per token · "
    return f"{kl}perplexity {number(run.perplexity)}"


def _name(found: "Steering", run: "Run") -> str:
    seeds = len({r.seed for r in found.runs}) > 1
    name = "baseline" if run.baseline else f"dose {run.name}" if run.name else found.mode
    return f"{name}, seed {run.seed}" if seeds else name


def _change(change: "Change") -> str:
    return f"{_quoted(change.text)} {percent(change.before)} → {percent(change.after)}"


def steering_text(found: "Steering", ansi: bool = False) -> str:
    """Baseline and doses one below the other, each with its cost and the next tokens that it changes most."""
    bold = (lambda s: f"\x1b[1m{s}\x1b[0m") if ansi else (lambda s: s)
    label = f" · {_shown(found.label)}" if found.label else ""
    lines = [
        bold(f"Feature {found.feature:,}") + f" · {_shown(found.sae)}{label} · {found.mode}: {what_it_does(found)}"
    ]
    lines += ["prompt  " + _quoted(_shown(found.prompt)), ""]
    for run in found.runs:
        lines.append(bold(_name(found, run)) + f"  {cost(run)}")
        # the lines of the text itself stay lines
        for line in run.text.split("\n"):
            lines += textwrap.wrap(_shown(line), WIDTH, initial_indent="    ", subsequent_indent="    ") or ["    "]
        if run.next_tokens:
            lines.append("    next  " + "  ".join(map(_change, run.next_tokens)))
        lines.append("")
    return "\n".join(lines)


def _changes_html(changes: "Sequence[Change]") -> str:
    if not changes:
        return ""
    top = max(max(c.before, c.after) for c in changes)
    rows = _bar_rows([(c.text, c.after, [percent(c.before), percent(c.after)]) for c in changes], top)
    return f"<table><tr><th>next token</th><th></th><th>before</th><th>after</th></tr>{rows}</table>"


def ablation_html(found: "Ablation", example, scale: float) -> str:
    """An example of the index, and what the model's next token behind it loses with the feature: inner markup for
    `fragment`."""
    if found.code == 0:
        said = "The feature is silent there when the model reads it now, so nothing changes."
    else:
        said = f"code {code(found.code, scale)} taken away · KL {number(found.kl)} nats at the next token"
    drawn = example_html(example, scale)
    stored, apart = example.value, abs(found.code - example.value)
    if apart > STORED_AND_NOW * max(abs(stored), abs(found.code)):
        said += (
            f" · in the index its code is {code(stored, scale)}: the model was run otherwise when the store was made"
        )
    changes = _changes_html(found.next_tokens) if found.code else ""
    return f'<div>{drawn}<p class="q">{escape(said)}</p>{changes}</div>'


def _run_html(found: "Steering", run: "Run") -> str:
    table = _changes_html(run.next_tokens)
    return (
        f'<div><h3>{escape(_name(found, run))}</h3><p class="q">{escape(cost(run))}</p>'
        f'<div class="t"><span class="q">{_plain(found.prompt, True)}</span>{_plain(run.text, True)}</div>{table}</div>'
    )


def steering_html(found: "Steering") -> str:
    """Baseline and doses side by side: inner markup for `fragment`."""
    label = f'<p class="lead">{escape(found.label)}</p>' if found.label else ""
    runs = "".join(_run_html(found, run) for run in found.runs)
    return (
        f"<h2>Feature {found.feature:,}</h2>{label}"
        f'<p class="q">{escape(found.sae)} · {found.mode}: {escape(what_it_does(found))}</p><div class="cols">{runs}</div>'
    )
