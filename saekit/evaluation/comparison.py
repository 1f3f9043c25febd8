"""SAEs side by side: the stored evaluations of several, as tables and as one HTML file with plots.

    print(compare(["saes/topk", "saes/abs-topk"]))

Numbers stand in one table only where they mean the same: store, split, site and model, and the definition of each metric.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from saekit.errors import SaekitError
from saekit.evaluation.report import load_evaluation, number
from saekit.provenance import short

COLUMNS = ("l0", "fvu", "ce_added", "kl", "ce_recovered_mean", "alive", "dense_10")
# a front takes so many values of L0
FRONT = 3
# SAEs are compared at one L0 where theirs differ by at most this share
SAME_L0 = 0.1


class Cell(NamedTuple):
    """One metric of one SAE, or its mean over seeds."""

    value: float | None
    half: float | None
    """Half of the 95 % interval; over seeds half of the range."""
    best: bool = False
    """Better than every other of its L0 by more than the two intervals."""


@dataclass(frozen=True)
class Row:
    """One SAE, or the seeds of one recipe."""

    name: str
    variant: str
    features: int
    seeds: int
    cells: dict[str, Cell]
    recipe: str
    """Training options as JSON."""


@dataclass(frozen=True)
class Table:
    """SAEs that were measured on the same thing."""

    on: str
    """Store, split, site and model."""
    rows: tuple[Row, ...]
    baselines: dict[str, tuple[tuple[float, float], ...]]
    """`pca_l0`, `random`: (L0, FVU) of each SAE's baselines, by L0."""


@dataclass(frozen=True)
class Comparison:
    """Tables of SAEs. `str()` prints them; `html()` is one file with the plots, nothing loaded."""

    tables: tuple[Table, ...]

    def __str__(self) -> str:
        return "\n\n".join(_table_text(table) for table in self.tables)

    def to_csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            ["on", "sae", "variant", "features", "seeds", *(f"{c}{s}" for c in COLUMNS for s in ("", "_half"))]
        )
        for table in self.tables:
            for row in table.rows:
                values = [v for c in COLUMNS for v in (row.cells[c].value, row.cells[c].half)]
                writer.writerow([table.on, _plain_cell(row.name), row.variant, row.features, row.seeds, *values])
        return out.getvalue()

    def to_dict(self) -> dict:
        """As JSON can hold it."""

        def row(r: Row) -> dict:
            return {**vars(r), "cells": {column: cell._asdict() for column, cell in r.cells.items()}}

        return {"tables": [{"on": table.on, "rows": [row(r) for r in table.rows]} for table in self.tables]}

    def html(self) -> str:
        """L0 against FVU and added loss, plotly inlined."""
        import plotly.io

        parts = [
            plotly.io.to_html(figure(table), include_plotlyjs=i == 0, full_html=False)
            for i, table in enumerate(self.tables)
        ]
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>SAEs compared</title></head>'
            f"<body>{''.join(parts)}</body></html>\n"
        )


def compare(folders: Sequence[str | Path]) -> Comparison:
    """The stored evaluations of SAE folders, seeds of one recipe as one row.

    Raises SaekitError for a folder without an evaluation, or with one that is not its own.
    """
    if not folders:
        raise SaekitError("no SAE named; for example  saekit compare saes/*")
    groups: dict[tuple, list] = defaultdict(list)
    for folder in map(Path, folders):
        evaluation = load_evaluation(folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        on = tuple(str(evaluation.content["data"].get(key)) for key in ("store", "split", "site", "model"))
        groups[on].append((folder, config, evaluation.metrics()))
    return Comparison(tuple(_table(on, part) for on, saes in groups.items() for part in _of_one_definition(saes)))


def _of_one_definition(saes: list) -> list[list]:
    """Split where a metric is defined in two ways; an SAE that lacks one stays with the others."""
    known = {c: {metrics[c]["formula"] for _, _, metrics in saes if c in metrics} for c in COLUMNS}
    disputed = [c for c in COLUMNS if len(known[c]) > 1]
    parts: dict[tuple, list] = defaultdict(list)
    for sae in saes:
        parts[tuple(sae[2].get(c, {}).get("formula") for c in disputed)].append(sae)
    return list(parts.values())


def _table(on: tuple[str, ...], saes: list) -> Table:
    recipes = defaultdict(list)
    for folder, config, metrics in saes:
        recipes[config["variant"], config["d_sae"], _recipe(config)].append((folder, config, metrics))
    rows = []
    for (variant, features, recipe), members in sorted(recipes.items(), key=lambda item: item[0]):
        seeds = {(config.get("provenance") or {}).get("seed") for _, config, _ in members}
        # equal seeds are no seeds of one recipe: something else tells them apart
        parts = [members] if len(seeds) == len(members) else [[member] for member in members]
        for part in parts:
            name = part[0][0].name if len(part) == 1 else f"{part[0][0].name} and {len(part) - 1} more"
            rows.append(Row(name, variant, features, len(part), {c: _cell(c, part) for c in COLUMNS}, recipe))
    better = {c: m["better"] for c in COLUMNS for _, _, metrics in saes if (m := metrics.get(c))}
    rows = _marked(rows, better)
    baselines: dict[str, list] = defaultdict(list)
    for _, _, metrics in saes:
        for name, value in (metrics.get("fvu") or {"baselines": {}})["baselines"].items():
            if name in ("pca_l0", "random") and metrics.get("l0", {}).get("value") is not None:
                baselines[name].append((metrics["l0"]["value"], value))
    store, split, site, model = on
    words = f"{site} of {Path(model).name}, {split} rows of store {short(store)}"
    return Table(words, tuple(rows), {name: tuple(sorted(points)) for name, points in baselines.items()})


def _recipe(config: dict) -> str:
    """How it was trained, but for the seed: as JSON. Of an SAE that was not trained here its options."""
    training = (config.get("provenance") or {}).get("training")
    # the scale is measured on the data
    known = config["options"] if training is None else {k: v for k, v in training.items() if k != "input_scale"}
    return json.dumps(known, sort_keys=True)


def _cell(column: str, members: list) -> Cell:
    found = [metrics[column] for _, _, metrics in members if column in metrics and metrics[column]["value"] is not None]
    if len(found) < len(members) or not found:
        return Cell(None, None)
    if len(found) == 1:
        ci = found[0]["ci95"]
        return Cell(found[0]["value"], None if not ci else (ci[1] - ci[0]) / 2)
    values = [m["value"] for m in found]
    return Cell(sum(values) / len(values), (max(values) - min(values)) / 2)


def _marked(rows: list[Row], better: dict[str, str]) -> list[Row]:
    """The best of each column among SAEs of its L0, where it can be told from the next."""
    marked = []
    for row in rows:
        peers = [other for other in rows if other is not row and _as_sparse(row, other)]
        cells = {c: cell._replace(best=_beats(c, row, peers, better.get(c))) for c, cell in row.cells.items()}
        marked.append(replace(row, cells=cells))
    return marked


def _as_sparse(one: Row, other: Row) -> bool:
    a, b = one.cells["l0"].value, other.cells["l0"].value
    return a is not None and b is not None and abs(a - b) <= SAME_L0 * max(a, b)


def _beats(column: str, row: Row, peers: list[Row], direction: str | None) -> bool:
    mine = row.cells[column]
    if direction not in ("lower", "higher") or not peers or mine.value is None or mine.half is None:
        return False
    for peer in peers:
        value, half, _ = peer.cells[column]
        if value is None or half is None:
            return False
        ahead = mine.value - value if direction == "higher" else value - mine.value
        if ahead <= mine.half + half:
            return False
    return True


def _plain_cell(text: str) -> str:
    """A spreadsheet runs what begins with one of these."""
    return f"'{text}" if text[:1] in "=+-@" else text


def _shown(cell: Cell) -> str:
    if cell.value is None:
        return "–"
    spread = f" ± {cell.half:.2g}" if cell.half else ""
    return f"{number(cell.value)}{spread}{'*' if cell.best else ''}"


def _table_text(table: Table) -> str:
    shown = [c for c in COLUMNS if any(row.cells[c].value is not None for row in table.rows)]
    lines = [("SAE", "variant", "features", *shown)]
    for row in table.rows:
        cells = [_shown(row.cells[c]) for c in shown]
        lines.append((row.name, row.variant, f"{row.features:,}", *cells))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(f"{word:<{w}}" for word, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    notes = []
    if any(row.seeds > 1 for row in table.rows):
        notes.append("± over seeds: half of the range; else half of the 95 % interval")
    if any(cell.best for row in table.rows for cell in row.cells.values()):
        notes.append(
            f"* best of its column among those of its L0 (within {SAME_L0:.0%}), by more than the two intervals"
        )
    rule = "─" * max(map(len, text))
    return "\n".join([f"on {table.on}", text[0], rule, *text[1:], *notes])


def figure(table: Table):
    """A plotly figure: L0 (logarithmic) against FVU and against added loss. Filled points are not dominated."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = [c for c in ("fvu", "ce_added") if any(row.cells[c].value is not None for row in table.rows)]
    found = make_subplots(
        1, max(1, len(panels)), subplot_titles=[{"fvu": "FVU", "ce_added": "CE added, nats"}[c] for c in panels]
    )
    palette = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"]
    variants = sorted({row.variant for row in table.rows})
    fronts = True
    for at, column in enumerate(panels, 1):
        points = [
            (x, y, row.cells[column].half or 0.0, row)
            for row in table.rows
            if (x := row.cells["l0"].value) is not None and (y := row.cells[column].value) is not None
        ]
        for i, variant in enumerate(variants):
            mine = sorted((p for p in points if p[3].variant == variant), key=lambda p: p[0])
            if not mine:
                continue
            front = len({round(x, 1) for x, *_ in mine}) >= FRONT
            fronts &= front
            hollow = [any(x2 <= x and y2 < y for x2, y2, *_ in points) for x, y, *_ in mine]
            found.add_trace(
                go.Scatter(
                    x=[x for x, *_ in mine],
                    y=[y for _, y, *_ in mine],
                    error_y={"type": "data", "array": [half for *_, half, _ in mine]},
                    mode="lines+markers" if front else "markers",
                    name=variant,
                    legendgroup=variant,
                    showlegend=at == 1,
                    text=[f"{row.name}, {row.features:,} features" for *_, row in mine],
                    hovertemplate="%{text}<br>L0 %{x:.1f}, %{y:.4f}<extra></extra>",
                    line={"color": palette[i % len(palette)]},
                    marker={"size": 9, "symbol": ["circle-open" if h else "circle" for h in hollow]},
                ),
                row=1,
                col=at,
            )
        if column == "fvu":
            for name, line in table.baselines.items():
                x, y = zip(*line, strict=True)
                style = {"dash": "dot", "color": "#888888"}
                found.add_trace(go.Scatter(x=x, y=y, mode="lines", name=name, line=style), row=1, col=at)
        found.update_xaxes(type="log", title="L0", row=1, col=at)
    said = "" if fronts else f"<br><sup>points, not fronts: a front takes {FRONT} values of L0 of a variant</sup>"
    found.update_layout(template="plotly_white", title=f"{table.on}{said}", height=460)
    return found
