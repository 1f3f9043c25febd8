"""SAEs side by side: tables of stored evaluations, marks, seeds; features matched by their decoder rows."""

import csv
import io
import json

import numpy as np
import pytest

import saekit as sk
from saekit import cli
from saekit.errors import SaekitError
from saekit.evaluation.comparison import COLUMNS, compare
from saekit.feature_index.matching import Matching, agreement, match

DATA = {"store": "sha256:1", "split": "heldout", "site": "blocks.0.hook_resid_post", "model": "m"}


def measured(folder, *, variant="topk", k=32, seed=0, data=DATA, F=64, **values):
    """An SAE folder as far as a comparison reads it; a value is (value, half of its interval)."""
    folder.mkdir()
    fingerprint = f"sha256:{folder.name}"
    metrics = {
        name: {
            "value": value, "unit": "", "better": {"l0": "none", "alive": "higher"}.get(name, "lower"), "n": 1000,
            "ci95": None if half is None else [value - half, value + half], "formula": f"{name}/1",
            "baselines": {"pca_l0": 0.4, "random": 0.9} if name == "fvu" else {}, "note": "",
        }
        for name, (value, half) in values.items()
    }  # fmt: skip
    training = {"k": k, "lr": 1e-3, "input_scale": 0.1 + 0.001 * seed}
    config = {
        "format": "saekit-sae", "format_version": 1, "variant": variant, "options": {"k": k}, "d_in": 8, "d_sae": F,
        "fingerprint": fingerprint, "provenance": {"seed": seed, "training": training}, "signed": False,
    }  # fmt: skip
    content = {
        "format": "saekit-evaluation", "format_version": 1, "sae": {"fingerprint": fingerprint, "F": F}, "data": data,
        "tiers": {"1": {"metrics": metrics, "warnings": []}},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evaluation.json").write_text(json.dumps(content))
    return folder


def test_the_best_is_marked_only_where_it_can_be_told_from_the_next(tmp_path):
    a = measured(tmp_path / "a", l0=(32, 0.1), fvu=(0.20, 0.01), alive=(0.9, None))
    b = measured(tmp_path / "b", variant="abs_topk", l0=(32, 0.1), fvu=(0.25, 0.01), alive=(0.8, None))
    (table,) = compare([a, b]).tables
    by_name = {row.name: row for row in table.rows}
    assert by_name["a"].cells["fvu"].best and not by_name["b"].cells["fvu"].best
    # no interval, no mark; and no direction, no mark
    assert not any(row.cells[c].best for row in table.rows for c in ("alive", "l0"))
    c = measured(tmp_path / "c", variant="gated", l0=(32, 0.1), fvu=(0.215, 0.006), alive=(0.8, None))
    (table,) = compare([a, b, c]).tables
    assert not any(row.cells["fvu"].best for row in table.rows)
    text = str(compare([a, b]))
    assert "0.2 ± 0.01*" in text and "heldout rows of store sha256:1" in text and "ce_added" not in text
    # at another L0 nothing is compared: more features always explain more
    d = measured(tmp_path / "d", l0=(64, 0.1), fvu=(0.1, 0.01), k=64)
    (table,) = compare([a, b, d]).tables
    assert {row.name: row.cells["fvu"].best for row in table.rows} == {"a": True, "b": False, "d": False}


def test_seeds_of_one_recipe_are_one_row(tmp_path):
    seeds = [measured(tmp_path / f"s{i}", seed=i, l0=(32, 0.1), fvu=(0.2 + 0.01 * i, 0.001)) for i in range(3)]
    other = measured(tmp_path / "other", k=16, l0=(16, 0.1), fvu=(0.3, 0.001))
    (table,) = compare([*seeds, other]).tables
    assert [(row.name, row.seeds) for row in table.rows] == [("other", 1), ("s0 and 2 more", 3)]
    cell = table.rows[1].cells["fvu"]
    assert cell.value == pytest.approx(0.21) and cell.half == pytest.approx(0.01)
    # twice the same seed: two rows, something else tells them apart
    again = measured(tmp_path / "again", seed=0, l0=(32, 0.1), fvu=(0.2, 0.001))
    (table,) = compare([seeds[0], again]).tables
    assert [row.seeds for row in table.rows] == [1, 1]


def test_what_was_measured_on_something_else_stands_in_another_table(tmp_path):
    a = measured(tmp_path / "a", l0=(32, 0.1), fvu=(0.2, 0.01))
    b = measured(tmp_path / "b", l0=(32, 0.1), fvu=(0.2, 0.01), data={**DATA, "store": "sha256:2"})
    found = compare([a, b])
    assert [len(table.rows) for table in found.tables] == [1, 1]
    assert [len(part["rows"]) for part in found.to_dict()["tables"]] == [1, 1]


def test_csv_and_html(tmp_path, capsys):
    folders = [
        measured(tmp_path / name, k=k, l0=(k, 0.1), fvu=(1 / k, 0.001), ce_added=(2 / k, 0.001))
        for name, k in (("=cmd", 16), ("b", 32), ("c", 64))
    ]
    words = ["compare", *map(str, folders)]
    assert cli.main([*words, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["sae"] for row in rows] == ["'=cmd", "b", "c"] and rows[1]["fvu"] == str(1 / 32)
    assert set(COLUMNS) <= set(rows[0])
    assert cli.main([*words, "--html", str(tmp_path / "p.html")]) == 0
    page = (tmp_path / "p.html").read_text()
    assert "3 SAEs in" in capsys.readouterr().out and "Plotly.newPlot" in page and "points, not fronts" not in page
    assert "<script src=" not in page and "pca_l0" in page
    assert "points, not fronts" in compare(folders[:2]).html()
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"][0]["rows"][0]["cells"]["l0"]["value"] == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "no SAE named"), (["nowhere"], "nowhere has no evaluation yet: run  saekit evaluate nowhere")],
)
def test_what_a_user_can_get_wrong_is_one_line(words, message, capsys):
    assert cli.main(["compare", *words]) == 2
    assert capsys.readouterr().err.startswith(f"saekit: {message}")


# Features


class Rows:
    """As much of an index as its decoder rows."""

    def __init__(self, name, W_FD, signed=False):
        self.name, self.signed, self.W = name, signed, np.asarray(W_FD, np.float32)

    def decoder(self):
        return self.W


def test_pairs_splits_and_strangers_by_hand():
    e = np.eye(6)
    first = [e[0], e[1], e[2], e[3]]
    # 0 as it is; 1 in two halves; 2 turned round; 3 is nowhere; one of its own
    second = [e[0], e[1] + 0.5 * e[4], e[1] - 0.5 * e[4], -e[2], e[5]]
    found = match(Rows("a", first), Rows("b", second))
    assert found.matched.tolist() == [[0, 0], [1, 1]]
    assert found.split == {1: [1, 2]} and found.merged == {}
    assert set(found.only_first.tolist()) == {2, 3} and set(found.only_second.tolist()) == {3, 4}
    assert "2 pairs" in found.summary()
    # of signed codes the direction does not matter
    signed = match(Rows("a", first, signed=True), Rows("b", second))
    assert [2, 3] in signed.matched.tolist() and signed.only_first.tolist() == [3]
    back = match(Rows("b", second), Rows("a", first))
    assert back.merged == found.split and back.only_second.tolist() == found.only_first.tolist()
    with pytest.raises(SaekitError, match=r"a has D = 6, c has 4; only SAEs of one width"):
        match(Rows("a", first), Rows("c", np.eye(4)))


def test_blocks_change_nothing(monkeypatch):
    from saekit.feature_index import matching

    generator = np.random.default_rng(0)
    a, b = (Rows(n, generator.standard_normal((F, 16))) for n, F in (("a", 70), ("b", 50)))
    whole = match(a, b)
    monkeypatch.setattr(matching, "BLOCK", 50 * 7)
    parts = match(a, b)
    unit = [r.W / np.linalg.norm(r.W, axis=1, keepdims=True) for r in (a, b)]
    S = unit[0] @ unit[1].T
    for found in (whole, parts):
        assert isinstance(found, Matching)
        assert np.array_equal(found.nearest_F, S.argmax(1)) and np.array_equal(found.nearest_G, S.argmax(0))
        assert np.allclose(found.similarity_F, S.max(1), atol=1e-6) and np.allclose(
            found.similarity_G, S.max(0), atol=1e-6
        )


def test_two_seeds_and_the_codes_of_a_pair(tiny_model, tiny_text, tmp_path, capsys):
    site = "blocks.0.hook_resid_post"
    store = sk.collect(tiny_model, site=site, text=tiny_text, out=tmp_path / "acts", context=64)
    saes = [
        sk.train(sk.TopK(k=4, d_sae=128), store, out=tmp_path / f"seed{seed}", epochs=8, batch=512, seed=seed)
        for seed in (0, 1)
    ]
    a, b = (sk.build_index(sae, store) for sae in saes)
    found = a.compare(b)
    assert len(found.matched) > 5
    itself = a.compare(a)
    assert itself.matched.tolist() == [[i, i] for i in range(128)] or len(itself.matched) > 120
    # the correlation is that of the dense codes
    rows = np.flatnonzero(store.row_positions() < a.manifest["N"])
    x = store.read(site, int(rows[0]), int(rows[-1]) + 1).float()
    codes = [sae.encode(x).dense().double().numpy() for sae in saes]
    i, j = next((i, j) for i, j in found.matched.tolist() if a.feature(i).n > 20 and b.feature(j).n > 20)
    assert agreement(a, b, i, j) == pytest.approx(np.corrcoef(codes[0][:, i], codes[1][:, j])[0, 1], abs=2e-3)
    assert agreement(a, a, i, i) == pytest.approx(1, abs=1e-6)
    dead = next((f for f in range(128) if a.feature(f).n == 0), None)
    assert dead is None or agreement(a, b, dead, j) is None
    # one line on the command line, or JSON; the file that a matching leaves is all of it
    words = ["compare", str(saes[0].path), str(saes[1].path), "--features"]
    assert cli.main(words) == 0 and capsys.readouterr().out == found.summary() + "\n"
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))
    found.save(tmp_path / "found.safetensors")
    assert Matching.load(tmp_path / "found.safetensors").to_dict() == found.to_dict()
    for extra, message in (
        (["--csv"], "--features prints one line"),
        (["--html", "x.html"], "without it --html and --csv"),
    ):
        assert cli.main([*words, *extra]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(words[:2] + words[3:]) == 2
    assert "--features matches two SAEs, 1 named" in capsys.readouterr().err
