"""The builder against a dense reference that is computed the slow, obvious way."""

import fcntl
import importlib.util
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saekit.errors import SaekitError
from saekit.feature_index import build, geometry, open_index, segments, tables
from saekit.feature_index.build import IndexBuilder
from saekit.feature_index.format import exponent_of, quantise
from saekit.feature_index.geometry import logit_weights
from saekit.feature_index.vocabulary import vocab_bytes
from saekit.store.format import read_header

ABSENT = 0xFFFFFFFF


def helpers():
    spec = importlib.util.spec_from_file_location("index_conftest", Path(__file__).with_name("conftest.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stored(made) -> np.ndarray:
    """The codes as float16 times 2^e, (N, F) float64: what the index may say."""
    bits, over = quantise(made.dense_NF.reshape(-1), made.index.manifest["value_exponent"])
    assert not over
    value = bits.view(np.float16).astype(np.float64).reshape(made.dense_NF.shape) * made.index.scale
    return np.where(made.dense_NF != 0, value, 0)


def strength_order(codes_N: np.ndarray, sign: int) -> np.ndarray:
    at = np.flatnonzero(codes_N * sign > 0)
    return at[np.lexsort((at, -np.abs(codes_N[at])))]


def test_codes_by_feature_and_by_token(random_index):
    made, idx = random_index, random_index.index
    want = stored(made)
    assert np.abs(want - made.dense_NF).max() <= 2**-11 * np.abs(made.dense_NF).max()
    for j in range(len(idx)):
        f = idx.feature(j)
        assert f.positions.tolist() == np.flatnonzero(made.dense_NF[:, j]).tolist()
        assert np.array_equal(f.values, want[f.positions, j].astype(np.float32))
    for p in range(idx.n_tokens):
        features, values = idx.at(p)
        fired = np.flatnonzero(want[p])
        order = fired[np.lexsort((fired, -np.abs(want[p, fired])))]
        assert features.tolist() == order.tolist()
        assert np.array_equal(values, want[p, order].astype(np.float32))
    assert idx.manifest["Z"] == (made.dense_NF != 0).sum() and idx.manifest["ragged"]


def test_per_token(random_index):
    made, table = random_index, random_index.index.file("per_token")
    norms = torch.linalg.vector_norm(made.sae.W_dec, dim=1).numpy().astype(np.float64)
    on = made.encoded_N
    assert np.array_equal(table["l0"], (made.dense_NF != 0).sum(1))
    assert np.allclose(table["norm_code"], np.sqrt(((made.dense_NF * norms) ** 2).sum(1)), rtol=1e-6)
    assert np.allclose(table["norm_x"][on], np.linalg.norm(made.x_ND[on], axis=1), rtol=1e-6)
    assert np.allclose(table["error"][on], ((made.x_ND - made.xhat_ND)[on] ** 2).sum(1), rtol=1e-5)
    assert not table["norm_x"][~on].any() and not table["error"][~on].any()
    assert np.array_equal(made.index.file("tokens")["encoded"], on)


def test_columns(random_index):
    made, idx = random_index, random_index.index
    want, E = stored(made), int(made.encoded_N.sum())
    l0 = (want != 0).sum(1)
    norms = torch.linalg.vector_norm(made.sae.W_dec, dim=1).numpy().astype(np.float64)
    energy = (want**2).sum(0) * norms**2
    early = np.zeros(len(want), bool)
    for s in np.unique(made.seq_N):
        early[np.flatnonzero((made.seq_N == s) & made.encoded_N)[:2]] = True
    occurrences = Counter(made.token_N[made.encoded_N].tolist())
    for j in range(len(idx)):
        f = idx.feature(j)
        v = want[want[:, j] != 0, j]
        at = np.flatnonzero(want[:, j])
        assert (f.n, f.column("n_pos"), f.column("n_neg")) == (len(v), (v > 0).sum(), (v < 0).sum())
        per_seq = np.array(list(Counter(made.seq_N[at].tolist()).values()), float)
        assert f.column("n_seq") == len(per_seq) and f.column("seq_sq") == (per_seq**2).sum()
        assert f.density == len(v) / E
        if len(v) == 0:
            assert np.isnan(f.column("mean")) and np.isnan(f.column("q50")) and f.column("top_token") == ABSENT
            assert f.column("max_pos") == f.column("max_neg") == f.column("energy") == 0
            assert f.density_interval == (0.0, min(1.0, 3 / E))
            continue

        def close(name, value, f=f):
            np.testing.assert_allclose(f.column(name), value, rtol=2e-5, atol=1e-6, err_msg=name)

        close("mean", v.mean())
        close("mean_abs", np.abs(v).mean())
        close("mean_sq", (v**2).mean())
        close("max_pos", max(v.max(), 0))
        close("max_neg", min(v.min(), 0))
        for q in (5, 25, 50, 75, 95, 99):
            close(f"q{q:02d}", np.quantile(np.abs(v), q / 100))
        close("energy", energy[j] / energy.sum())
        close("crowd", l0[at].mean())
        close("start_share", early[at].mean())
        if len(v) > 2:
            z = (v - v.mean()) / v.std()
            close("skew", (z**3).mean())
            close("kurtosis", (z**4).mean() - 3)
        tokens = Counter(made.token_N[at].tolist())
        p = np.array(list(tokens.values())) / len(v)
        close("token_entropy", -(p * np.log2(p)).sum())
        ranked = sorted(tokens.items(), key=lambda kv: (-kv[1], kv[0]))
        assert f.column("top_token") == ranked[0][0]
        close("top_token_share", ranked[0][1] / len(v))
        close("token_f1", max(2 * c / (len(v) + occurrences[t]) for t, c in tokens.items()))
        assert [(t.token, t.count) for t in f.tokens()] == ranked[:16]
        assert f.tokens()[0].precision == ranked[0][1] / occurrences[ranked[0][0]]
        flags = {
            "dense": len(v) > 0.1 * E,
            "near-duplicate": (abs(f.column("max_dec_cos")) if idx.signed else f.column("max_dec_cos")) > 0.9,
            "one-sided": idx.signed and ((v > 0).all() or (v < 0).all()),
            "start-of-sequence": early[at].mean() > 0.5,
        }
        assert set(f.flags) == {k for k, on in flags.items() if on}


def test_histogram_is_exact(random_index):
    made, idx = random_index, random_index.index
    want = stored(made)
    for j in range(len(idx)):
        v = [Fraction(float(x)) for x in want[want[:, j] != 0, j]]
        counts = [0] * 64
        m = max((abs(x) for x in v), default=0)
        for x in v:
            # (0, m] closed above, [−m, m] with the last bin closed
            k = min(63, (x + m) * 64 // (2 * m)) if idx.signed else -(-x * 64 // m) - 1
            counts[int(k)] += 1
        assert idx.feature(j).histogram.counts.tolist() == counts


def test_top_without_repeats(random_index):
    made, idx = random_index, random_index.index
    want, starts = stored(made), idx.file("tokens")["seq_start"]
    removed = 0
    for j in range(len(idx)):
        for sign, name in ((1, "+"), (-1, "-")):
            expected, sequences, contexts = [], set(), set()
            if (want[:, j] != 0).sum() < 10:
                continue
            candidates = []
            for p in strength_order(want[:, j], sign)[:256].tolist():
                if made.seq_N[p] not in sequences:
                    sequences.add(made.seq_N[p])
                    candidates.append(p)
            for p in candidates:
                context = tuple(made.token_N[max(int(starts[made.seq_N[p]]), p - 7) : p + 1].tolist())
                if context not in contexts:
                    contexts.add(context)
                    expected.append(p)
                else:
                    removed += 1
            got = [int(e.positions[e.centre]) for e in idx.feature(j).top(64, name)]
            assert got == expected[:64]
    assert removed > 0 or idx.signed, "the text must hold repeated contexts, or this test shows nothing"


def test_repeated_contexts_are_removed(make_index):
    # three sequences of one text: the same eight tokens end at positions 8, 18, 28; the first sequence differs at position 1
    text = list(range(1, 11))
    token_N = np.array(text + text + text)
    token_N[1] = 40
    dense_NF = np.zeros((30, 2), np.float32)
    dense_NF[[8, 18, 28], 0] = [3, 2, 1]
    dense_NF[[7, 17, 27], 1] = [1, 3, 2]
    idx = make_index(dense_NF, lengths=[10, 10, 10], token_N=token_N).index
    stored = idx.file("examples")["top_position"][:, 0, :3].tolist()
    # 8 tokens up to position 8 begin at position 1, which differs in the first sequence only
    assert stored[0] == [8, 18, ABSENT]
    # 8 tokens up to position 7 hold position 1 as well
    assert stored[1] == [17, 7, ABSENT]


def test_quantile_samples(make_index):
    # feature 0 fires 25 times with strengths 25 … 1: slices of 2 and 3 hold everything; feature 1 fires 1,000 times
    rng = np.random.default_rng(1)
    dense_NF = np.zeros((1200, 2), np.float32)
    at = rng.permutation(1200)[:25]
    dense_NF[at, 0] = np.arange(25, 0, -1)
    dense_NF[:1000, 1] = rng.permutation(1000) + 1.0
    idx = make_index(dense_NF).index
    slices = idx.feature(0).quantiles(10, 8)
    assert [s.count for s in slices] == [2, 3] * 5
    assert [e.value for s in slices for e in s.examples] == list(range(25, 0, -1))
    assert (slices[0].high, slices[0].low) == (25.0, 24.0)
    # a slice of 100 ranks: one sample in each eighth of it, all with the same offset
    values = idx.file("examples")["sample_value"][1, 0].astype(float) * idx.scale
    for i in range(10):
        rank = 1000 - values[i] - 100 * i
        assert (rank > np.arange(8) * 12.5 - 1).all() and (rank < np.arange(1, 9) * 12.5).all()
        assert set(np.diff(rank)) <= {12, 13}
    # any other number of slices is drawn from the firings the same way
    four = idx.feature(1).quantiles(4, 2)
    assert [(s.low, s.high) for s in four] == [(751.0, 1000.0), (501.0, 750.0), (251.0, 500.0), (1.0, 250.0)]
    assert all(s.low <= e.value <= s.high for s in four for e in s.examples)


def files_of(made) -> dict:
    return {path.name: path.read_bytes() for path in sorted(made.index.path.iterdir())}


def test_same_bytes_however_it_was_built(make_index, tmp_path, monkeypatch):
    dense_NF = helpers().random_dense(7, 900, 60, signed=True)
    first = make_index(dense_NF, lengths=[300, 300, 300], folder=tmp_path / "a")
    expected = files_of(first)
    assert len(first.builder._buckets(10)) == 1 and first.builder.borders.tolist() == [0, 900]
    # buckets of at most 16 firings: the dense feature outgrows one and needs no sort
    many = make_index(dense_NF, lengths=[300, 300, 300], folder=tmp_path / "b", ram=128, chunk=101, flat=False)
    assert len(many.builder._buckets(10)) > 20
    assert files_of(many) == expected
    for module in (build, tables):
        monkeypatch.setattr(module, "BLOCK_FIRINGS", 64)
    monkeypatch.setattr(tables, "BLOCK_FEATURES", 7)
    # two segments, of two sequences and of one
    monkeypatch.setattr(segments, "SEGMENT_TOKENS", 400)
    assert files_of(make_index(dense_NF, lengths=[300, 300, 300], folder=tmp_path / "c", ram=4096)) == expected


@pytest.mark.parametrize("by_token", [True, False])
def test_cap_keeps_an_even_sample_and_exact_tables(make_index, tmp_path, monkeypatch, by_token):
    monkeypatch.setattr(build, "LEAST_CAP", 10)
    monkeypatch.setattr(build, "BLOCK_FIRINGS", 64)
    dense_NF = helpers().random_dense(7, 900, 60, signed=True)
    dense_NF[:300, 5] = 0
    options = {"lengths": [300] * 3, "by_token": by_token}
    whole = make_index(dense_NF, folder=tmp_path / "whole", **options).index
    idx = make_index(dense_NF, folder=tmp_path / "capped", cap=100, **options).index
    assert idx.manifest["build"]["cap"] == 100 and idx.manifest["Z"] == whole.manifest["Z"] and idx.check() == []
    n = whole.column("n")
    assert 3 < (n > 100).sum() < 50 and n[1] > 500
    assert np.array_equal(np.diff(idx.file("codes")["start"]), np.minimum(n, 100))
    assert np.array_equal(idx.column("kept"), np.minimum(1, 100 / np.maximum(1, n)).astype(np.float32))
    # all else is of every firing
    for name in set(whole.manifest["files"]) - {"codes.safetensors", "features.safetensors", "documents.jsonl"}:
        assert (idx.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    for name, column in whole.file("features").items():
        if name not in ("kept", "flags"):
            assert np.array_equal(idx.column(name), column, equal_nan=column.dtype.kind == "f"), name
    for j in range(60):
        f, all_of_it = idx.feature(j), whole.feature(j)
        assert f.capped == ("capped" in f.flags) == (n[j] > 100)
        at = np.searchsorted(all_of_it.positions, f.positions)
        assert np.array_equal(all_of_it.positions[at], f.positions) and np.array_equal(all_of_it.values[at], f.values)
        # one of each hundredth part, so that no stretch of text is left out
        assert not f.capped or (at // (n[j] / 100)).astype(int).tolist() == pytest.approx(range(100), abs=1)
        for sign in "+-":
            top = f.top(20, sign)
            assert [(e.position, e.value) for e in top] == [(e.position, e.value) for e in all_of_it.top(20, sign)]
            for slice in f.quantiles(10, 4, sign):
                assert all(slice.low <= abs(e.value) <= slice.high for e in slice.examples)
            if by_token:
                assert all(np.array_equal(a.codes, b.codes) for a, b in zip(top, all_of_it.top(20, sign), strict=True))
    assert np.array_equal(idx.counts_at(np.arange(900)), n)
    f = idx.feature(1)
    for shown in (str(f), f.html(), f.html("near"), f.text("quantiles")):
        assert f"capped: shown from 100 of {n[1]:,} firings" in shown
    few = next(j for j in range(60) if n[j] == idx.column("n")[(n > 60) & (n < 90)].max())
    assert not idx.feature(few).capped and idx.feature(few).near_misses()
    # not dense, but a firing that is left out would look like silence
    rare = next(j for j in range(60) if idx.feature(j).capped and j != 1)
    monkeypatch.setattr(type(f), "flags", ("capped",))
    assert idx.feature(rare).near_misses() == [] and "it is capped" in idx.feature(rare).html("near")
    together = {x.feature: x.count for x in idx.feature(1).neighbours("together", 60)}
    if by_token:
        both = (dense_NF != 0)[:, [1]] & (dense_NF != 0)
        assert all(abs(count - both[:, j].sum()) < 0.35 * both[:, j].sum() + 20 for j, count in together.items())
    with pytest.raises(SaekitError, match="a cap of 9 firings leaves too little to look at; pass 10 or more"):
        make_index(dense_NF, folder=tmp_path / "none", cap=9, **options)


def test_exponent():
    # 5 = 0.625 · 2³ → 5 / 2^-7 = 640, and powers of two land on 512
    assert exponent_of(5.0) == -7 and exponent_of(512.0) == 0 and exponent_of(1023.9) == 0 and exponent_of(0.0) == 0
    bits, over = quantise(np.array([1e-30, -1e-30, 0.5], np.float32), 0)
    assert bits.tolist() == [1, 0x8001, 0x3800] and not over
    assert quantise(np.array([65520.0], np.float32), 0)[1]


def test_overflow_raises_the_exponent_and_no_firing_is_lost(make_index, monkeypatch):
    monkeypatch.setattr(segments, "EXPONENT_TOKENS", 4)
    dense_NF = np.zeros((40, 3), np.float32)
    dense_NF[:, 0] = 1e-3
    dense_NF[:, 1] = -np.linspace(1, 2, 40)
    dense_NF[20, 2], dense_NF[30, 2] = 3e5, 1e9
    idx = make_index(dense_NF, chunk=5).index
    # 1e9 = 0.93 · 2^30
    assert idx.manifest["value_exponent"] == 20
    assert [idx.feature(j).n for j in range(3)] == [40, 40, 2]
    assert np.allclose(idx.feature(2).values, [3e5, 1e9], rtol=2**-11)
    # far below the smallest subnormal 2^-24 · 2^20: kept as exactly that
    assert (idx.feature(0).values == 2.0**-4).all()
    assert idx.at(30).features.tolist() == [2, 1, 0]
    assert idx.check() == []
    per_token = idx.at(3).values
    assert per_token[0] < 0 < per_token[1]


@pytest.mark.parametrize(("N", "F", "fires"), [(1, 1, True), (1, 1, False), (5, 3, False), (1, 70_000, True)])
def test_smallest(make_index, monkeypatch, N, F, fires):
    dense_NF = np.zeros((N, F), np.float32)
    if fires:
        dense_NF[0, F - 1] = 2.5
    # 70,000 rows are here for their 32-bit numbers, not for all pairs of them
    monkeypatch.setattr(geometry, "NEIGHBOUR_FLOPS", 1e6)
    idx = make_index(dense_NF, D=2).index
    assert (idx.manifest["Z"], len(idx)) == (int(fires), F)
    f = idx.feature(F - 1)
    assert f.values.tolist() == ([2.5] if fires else [])
    assert idx.at(0).features.tolist() == ([F - 1] if fires else [])
    assert idx.check() == [] and len(f.html()) > 500 and str(f)
    for view in ("quantiles", "random", "near"):
        f.html(view, "full")


def test_only_the_first_sequences(make_index):
    dense_NF = np.ones((30, 2), np.float32)
    idx = make_index(dense_NF, lengths=[10, 10, 10], n_sequences=2, chunk=13).index
    assert (idx.n_tokens, idx.n_sequences, idx.n_encoded, idx.feature(0).n) == (20, 2, 20, 20)


def test_nan_is_refused_by_place(make_index):
    dense_NF = np.ones((4, 3), np.float32)
    dense_NF[2, 1] = np.nan
    with pytest.raises(SaekitError, match="feature 1 has the code nan at position 2"):
        make_index(dense_NF)


def test_duplicate_is_reported(make_index, tmp_path):
    made = make_index(np.eye(3, dtype=np.float32))
    from saekit_kernels import Codes

    builder = IndexBuilder(made.sae, made.builder.store, tmp_path / "sae")
    codes = Codes.flat(torch.tensor([0, 2, 3, 3]), torch.tensor([1, 1, 0]), torch.ones(3), 3)
    x = torch.zeros(3, 6)
    builder.update(SimpleNamespace(positions=np.arange(3), codes=codes, x_BD=x, xhat_BD=x))
    with pytest.raises(AssertionError, match="feature 1 twice at position 0"):
        builder.finish()


def test_folder_protocol(make_index, tmp_path):
    folder = tmp_path / "sae"
    first = make_index(np.ones((5, 2), np.float32))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "index"]
    # a second builder begins, is killed: the old index still opens, the rest is no index
    half = IndexBuilder(first.sae, first.builder.store, folder)
    assert (folder / "index.partial").is_dir() and open_index(folder).feature(0).n == 5
    # while it lives nobody else may build there
    with pytest.raises(SaekitError, match=r"is being indexed by process \d+ on"):
        IndexBuilder(first.sae, first.builder.store, folder)
    half._lock.close()
    # killed between setting the old index aside and the rename
    (folder / "index").rename(folder / "index.old")
    with pytest.raises(SaekitError, match="has no index yet"):
        open_index(folder)
    second = make_index(np.ones((7, 2), np.float32))
    assert open_index(folder).feature(0).n == second.index.feature(0).n == 7
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "index"]
    lock = open(tmp_path / "free", "w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_files_are_plain_safetensors_in_order(random_index):
    from safetensors.numpy import load_file

    idx = random_index.index
    for name, entry in idx.manifest["files"].items():
        path = idx.path / name
        assert path.stat().st_size == entry["bytes"]
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + length])
        assert (8 + length) % 64 == 0
        sizes = [{"6": 8, "3": 4, "1": 2}.get(v["dtype"][1], 1) for k, v in header.items() if k != "__metadata__"]
        assert sizes == sorted(sizes, reverse=True)
        for key, array in load_file(path).items():
            assert np.array_equal(array, idx.file(name.split(".")[0])[key], equal_nan=array.dtype.kind == "f")
    dtypes = {k: v.dtype.str for k, v in idx.file("codes").items()}
    assert dtypes == {"start": "<i8", "position": "<u4", "value": "<f2"}
    assert idx.file("by_token")["feature"].dtype == np.uint16


def section() -> str:
    text = (Path(__file__).parents[2] / "docs/formats.md").read_text(encoding="utf-8")
    return text[text.index("## Feature index, format 1") :]


@pytest.mark.parametrize("cap", [None, 100])
def test_documented_lines_read_it(make_index, cap):
    made = make_index(helpers().random_dense(3, 600, 40, signed=True), cap=cap)
    code = re.search(r"```python\n(.*?)```", section(), re.DOTALL)
    assert code and "saekit." not in code[1] and "torch" not in code[1] and len(code[1].splitlines()) <= 40
    names: dict = {}
    exec(code[1], names)
    for j in range(40):
        positions, values, pieces = names["read_firings"](made.index.path, j)
        f = made.index.feature(j)
        assert np.array_equal(positions, f.positions) and np.array_equal(values, f.values)
        assert pieces == [made.index.pieces([t])[0] for t in made.token_N[positions]]
    for name in made.index.manifest["files"]:
        for key, array in names["open_tensors"](made.index.path / name).items():
            assert np.array_equal(array, made.index.file(name[:-12])[key], equal_nan=array.dtype.kind == "f")


def test_every_tensor_and_key_is_documented(make_index):
    unembedding = (torch.ones(50, 6), "")
    idx = make_index(helpers().random_dense(3, 600, 40, signed=True), unembedding=unembedding).index
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in section().splitlines() if line.startswith("|")]
    documented, file = {}, ""
    for row in cells:
        if len(row) == 4 and row[0] != "file" and row[1] != "---":
            file = row[0].strip("`") or file
            for name in re.findall(r"`(\w+)`", row[1]):
                documented[f"{file}.{name}"] = set(re.findall(r"[IUF]\d+|BOOL", row[2]))
        elif len(row) == 2 and "`" in row[0]:
            for names, tags in re.findall(r"((?:`\w+`[, ]*)+)([IUF]\d+)", row[0]):
                documented |= {f"features.{name}": {tags} for name in re.findall(r"`(\w+)`", names)}
    tensors = {
        f"{name[:-12]}.{key}": entry.tag
        for name in idx.manifest["files"]
        for key, entry in read_header(idx.path / name).items()
    }
    assert len(tensors) > 50
    for name, tag in tensors.items():
        assert tag in documented[name], (name, tag)
    # what this index lacks: columns that need a variant with thresholds or budgets
    assert set(documented) - set(tensors) - {"features."} == {"features.threshold", "features.budget"}
    for keys in (idx.manifest, idx.manifest["build"], idx.manifest["fingerprints"]):
        for key in keys:
            assert f"`{key}`" in section(), key


@pytest.mark.parametrize("signed", [False, True])
def test_neighbours_against_all_pairs(make_index, signed):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(50, 8, generator=generator)
    W[7] = -3 * W[4]
    W[9] = 0
    W[12] = 2 * W[11] + 0.1 * W[1]
    # opposite to almost all the rows beside it: no row of positive cosine is among its nearest
    W[20:45] = -W[45] + 0.02 * W[20:45]
    made = make_index(np.ones((2, 50), np.float32), D=8, W_dec_FD=W, W_enc_FD=W.flip(0).contiguous(), signed=signed)
    unit = (W / W.norm(dim=1, keepdim=True).clamp_min(1e-30)).double()
    cos = (unit @ unit.T).numpy()
    np.fill_diagonal(cos, 0)
    for j in range(50):
        got = made.index.feature(j).neighbours("decoder", 20)
        order = np.argsort(-np.abs(cos[j]))[:20]
        order = order[np.abs(cos[j][order]) > 0]
        assert np.allclose([n.value for n in got], cos[j][[n.feature for n in got]], atol=1e-3)
        # rows 4 and 7 are equally far from any other, so only the sizes are in one order
        assert np.allclose(np.abs([n.value for n in got]), np.abs(cos[j][order]), atol=1e-3)
        similar = np.abs(cos[j]) if signed else cos[j]
        best = np.delete(similar, j).max()
        f = made.index.feature(j)
        if j != 9:
            found = f.column("max_dec_cos")
            assert (abs(found) if signed else found) == pytest.approx(best, abs=1e-6)
            assert cos[j, f.column("max_dec_feature")] == pytest.approx(found, abs=1e-6)
            assert ("near-duplicate" in f.flags) == (best > 0.9)
    f = made.index.feature(4)
    # an opposite row is the same direction read the other way; it detects nothing where codes have one sign
    assert f.neighbours()[0].feature == 7 and f.neighbours()[0].value == -1
    assert ("near-duplicate" in f.flags) == signed
    assert all("near-duplicate" in made.index.feature(j).flags for j in (11, 12))
    assert (cos[45][np.argsort(-np.abs(cos[45]))[:20]] < 0).all()
    assert made.index.feature(9).neighbours() == []
    assert made.index.feature(45).neighbours("encoder")[0].feature == 42


def test_logit_weights_by_hand(make_index):
    # two tokens along each axis: decoder row (1, 0) raises token 1, lowers token 0, leaves 2 and 3 alone
    W_U_VD = torch.tensor([[-2.0, 0], [2, 0], [0, 1], [0, -1]])
    W_dec = torch.tensor([[1.0, 0], [0, 3]])
    token, weight, moments = logit_weights(W_dec, W_U_VD)
    assert token[0, 0, 0] == 1 and weight[0, 0, 0] == 2 and token[0, 1, 0] == 0 and weight[0, 1, 0] == -2
    assert token[1, 0, 0] == 2 and weight[1, 0, 0] == 3 and token[1, 1, 0] == 3
    assert (token[:, :, 4:] == ABSENT).all()
    # weights of row 0 are −2 2 0 0: variance 2, fourth moment 8, kurtosis 8/4 − 3
    assert moments["logit_std"][0] == pytest.approx(2**0.5)
    assert moments["logit_kurtosis"][0] == pytest.approx(-1) and moments["logit_skew"][0] == pytest.approx(0)
    note = "before the soft cap of 30"
    made = make_index(np.ones((2, 2), np.float32), D=2, W_dec_FD=W_dec, unembedding=(W_U_VD, note))
    logits = made.index.feature(0).logits(1)
    assert (logits.up[0].token, logits.down[0].token, logits.note) == (1, 0, note)
    elsewhere = make_index(
        np.ones((2, 2), np.float32), D=2, W_dec_FD=W_dec, unembedding=(W_U_VD, ""), site="blocks.0.hook_z"
    ).index
    assert elsewhere.feature(0).logits() is None
    assert any("hook_z does not write into the residual stream" in w for w in elsewhere.manifest["warnings"])


def test_store_without_tokenizer(make_index):
    idx = make_index(np.ones((4, 2), np.float32), token_N=[3, 17, 5, 0], tokenizer=False).index
    assert idx.text(1) == "#3#17#5#0" and idx.token_text(17) == "#17"


def test_index_agrees_with_encode(make_index):
    from saekit.sae import SAE
    from saekit.variants import TopK

    generator = torch.Generator().manual_seed(3)
    F, D, N = 64, 16, 1000
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=generator), dim=1)
    sae = SAE(TopK(k=5, d_sae=F), W.clone(), W, torch.zeros(F), torch.zeros(D))
    x_ND = torch.randn(N, D, generator=generator)
    dense_NF = sae.encode(x_ND).dense().numpy()
    idx = make_index(dense_NF, D=D, W_dec_FD=W).index
    for p in range(N):
        _, feature, value = sae.encode(x_ND[p]).pairs()
        got = dict(zip(*(a.tolist() for a in idx.at(p)), strict=True))
        assert set(got) == set(feature.tolist())
        assert np.allclose([got[j] for j in feature.tolist()], value.numpy(), rtol=2**-11)


def test_byte_level_vocabulary(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    vocab = vocab_bytes(tokenizer, 310)
    pieces = [vocab.blob[a:b].tobytes() for a, b in zip(vocab.start, vocab.start[1:], strict=False)]
    assert len(vocab) == 310 and pieces[300:] == [b""] * 10 and pieces[0] == b"<|bos|>"
    assert vocab.special.nonzero()[0].tolist() == [0, 1]
    text = "def naïve():\n\treturn '✓ 🙂'  \x00\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(pieces[i] for i in ids) == text.encode()


def test_sentencepiece_and_wordpiece_vocabularies():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_tokens = {f"<0x{b:02X}>": b + 3 for b in range(256)}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **byte_tokens, "▁": 259, "▁the": 260, "é": 261}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    got = vocab_bytes(fast)
    piece = lambda i: got.blob[got.start[i] : got.start[i + 1]].tobytes()  # noqa: E731
    assert (piece(3 + 0x0A), piece(3 + 0xE2)) == (b"\n", b"\xe2")
    assert (piece(259), piece(260), piece(261)) == (b" ", b" the", "é".encode())
    assert piece(1) == b"<s>" and got.special[:4].tolist() == [True, True, True, False]

    words = {"[UNK]": 0, "[CLS]": 1, "play": 2, "##ing": 3}
    tokenizer = Tokenizer(models.WordPiece(vocab=words, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    got = vocab_bytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]"))
    assert (piece(2), piece(3)) == (b"play", b"ing")
