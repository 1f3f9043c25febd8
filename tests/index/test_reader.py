"""What an opened index answers, and what it refuses."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from saekit.errors import SaekitError
from saekit.feature_index import open_index
from saekit.store.format import write_tensors


@pytest.fixture
def small(make_index):
    """20 tokens in two sequences " a b c …": feature 0 fires on every " a", 1 on " b" and " c", 2 once, 3 never."""
    pieces = [b"<s>", b" a", b" b", b" c", b"12", b"3", b"=x"]
    token_N = [0, 1, 2, 3, 4, 1, 5, 6, 2, 3, 0, 1, 1, 2, 6, 6, 3, 2, 1, 4]
    dense_NF = np.zeros((20, 4), np.float32)
    token = np.array(token_N)
    dense_NF[token == 1, 0] = [1, 2, 3, 4, 5]
    dense_NF[(token == 2) | (token == 3), 1] = 1
    dense_NF[3, 2] = 7
    return make_index(dense_NF, lengths=[10, 10], token_N=token_N, unencoded=[0, 10], pieces=pieces).index


# opening


def refused(path) -> str:
    with pytest.raises(SaekitError) as error:
        open_index(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_opens_from_both_folders(small):
    sae = small.path.parent
    assert len(open_index(sae)) == len(open_index(sae / "index")) == len(open_index(str(sae))) == 4


def test_refusals_name_the_file_and_the_command(small, tmp_path):
    sae = small.path.parent
    command = f"saekit index {sae}"
    assert "no such SAE folder" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty") == f"{tmp_path}/empty has no index yet: run  saekit index {tmp_path}/empty"
    manifest = (sae / "index/manifest.json").read_text()

    (sae / "index/manifest.json").write_text(manifest.replace('"format_version": 1', '"format_version": 2'))
    said = refused(sae)
    assert "has index format 2, this saekit reads 1" in said and command in said
    (sae / "index/manifest.json").write_text("{")
    assert "is not valid JSON" in refused(sae) and command in refused(sae)
    (sae / "index/manifest.json").write_text("{}")
    assert "is not an index" in refused(sae)
    (sae / "index/manifest.json").write_text(manifest)

    codes = sae / "index/codes.safetensors"
    whole = codes.read_bytes()
    codes.write_bytes(whole[:-2])
    said = refused(sae)
    assert (
        f"codes.safetensors has {len(whole) - 2:,} bytes, the manifest says {len(whole):,}" in said and command in said
    )
    codes.unlink()
    assert "codes.safetensors is missing" in refused(sae)
    codes.write_bytes(whole)

    (sae / "config.json").write_text(json.dumps({"fingerprint": "sha256:other"}))
    said = refused(sae)
    assert "belongs to SAE sha256:sae..., the folder holds sha256:other..." in said and command in said
    (sae / "config.json").unlink()
    assert len(open_index(sae)) == 4

    (sae / "index/manifest.json").unlink()
    assert "has no index yet (an unfinished build is there)" in refused(sae)


def test_check_reads_everything(small):
    assert small.check() == []
    path = small.path / "codes.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert open_index(small.path).check() == [
        f"{path} is damaged (sha256 differs); rebuild:  saekit index {small.path.parent}"
    ]


@pytest.mark.parametrize("number", [-1, 4, 999_999, "12", 1.0, True])
def test_no_such_feature(small, number):
    shown = f"{number:,}" if isinstance(number, int) and not isinstance(number, bool) else repr(number)
    with pytest.raises(SaekitError, match="this SAE has 0 to 3") as error:
        small.feature(number)
    assert str(error.value).startswith(f"feature {'1' if number is True else shown} does not exist")
    assert small[np.int64(3)].number == 3


# examples


def test_windows_never_cross_a_sequence(small):
    example = small.window(11, 24, 8, feature=0)
    assert example.positions.tolist() == list(range(10, 20)) and example.centre == 1
    assert (example.at_start, example.at_end) == (True, True)
    # " a" at 11, 12 and 18 with the third to fifth code
    assert example.codes.tolist() == [0, 3, 4, 0, 0, 0, 0, 0, 5, 0]
    assert example.text == "<s> a a b=x=x c b a12" and example.special.tolist() == [True] + [False] * 9
    assert example.encoded.tolist() == [False] + [True] * 9
    # where it begins and where in the window the firing stands differ: 10 and 1
    assert example.position == 11 and type(example.position) is int
    inner = small.window(14, 2, 1)
    assert inner.positions.tolist() == [12, 13, 14, 15] and not inner.at_start and not inner.at_end
    assert small.text(3, 1, 1) == " b c12"
    assert small.window(0, None).positions.tolist() == list(range(10))
    with pytest.raises(SaekitError, match="this index has 0 to 19"):
        small.window(20)


def test_a_passage_and_a_document(small):
    """Positions in the order given: "the codes of a text", read from the index."""
    text = small.passage(np.array([3, 1, 0, 4]))
    assert text.pieces == (b" c", b" a", b"<s>", b"12") and text.encoded.tolist() == [True, True, False, True]
    # on " c" at 3 fire features 2 (7) and 1 (1), on " a" feature 0 (1)
    assert text.l0.tolist() == [2, 1, 0, 0]
    assert [x.tolist() for x in text.at(0)] == [[2, 1], [7, 1]] and text.codes_of(0).tolist() == [0, 1, 0, 0]
    error, norm = (small.file("per_token")[name][[3, 1, 4]] for name in ("error", "norm_x"))
    np.testing.assert_allclose(text.error_share[[0, 1, 3]], error / norm**2, rtol=1e-6)
    assert text.error_share[2] == 0
    for number in range(small.n_documents):
        positions = small.document_positions(number)
        assert (np.diff(positions) > 0).all() and all(small.document_of(p)[0] == number for p in positions)
    whole = np.concatenate([small.document_positions(number) for number in range(small.n_documents)])
    assert sorted(whole) == list(range(20))
    for bad in (-1, small.n_documents):
        with pytest.raises(SaekitError, match="document -?[0-9]+ does not exist; this index has 0 to"):
            small.document_positions(bad)
    for bad, words in (([], "holds no token"), ([20], "has 0 to 19"), ([-1], "has 0 to 19")):
        with pytest.raises(SaekitError, match=words):
            small.passage(np.array(bad, np.int64))


def test_a_token_by_its_name(small):
    assert [small.token_named(name) for name in ("12", " a", "a", "#3")] == [4, 1, 1, 3]
    for bad in ("b c", "", "#7", "#", "#²", "#" + "9" * 30):
        with pytest.raises(SaekitError, match="is no single token of this vocabulary"):
            small.token_named(bad)


def test_direct_effects_are_decoder_times_unembedding(make_index, tmp_path):
    W_dec_FD = torch.tensor([[1.0, 0, 2, 0, 0, 0], [0, -1, 0, 0, 0, 3]])
    dense = np.ones((4, 2), np.float32)
    token = np.array([1, 2, 3, 4, 5, 6], np.float32)
    index, elsewhere = (
        make_index(dense, W_dec_FD=W_dec_FD, folder=tmp_path / f"sae{i}", site=f"blocks.0.{kind}").index
        for i, kind in enumerate(("hook_resid_post", "attn.hook_z"))
    )
    for one in (index, elsewhere):
        write_tensors(one.path.parent / "sae.safetensors", {"W_dec": W_dec_FD.numpy()})
    # 1·1 + 2·3 and −1·2 + 3·6
    assert index.effects_on(token).tolist() == [7, 16]
    with pytest.raises(SaekitError, match="blocks.0.attn.hook_z does not write into the residual stream directly"):
        elsewhere.effects_on(token)


def test_random_is_spread_and_repeatable(make_index):
    idx = make_index(np.ones((1000, 1), np.float32)).index
    drawn = [e.position for e in idx.feature(0).random(20, seed=3)]
    assert drawn == [e.position for e in idx.feature(0).random(20, seed=3)]
    assert drawn != [e.position for e in idx.feature(0).random(20, seed=4)]
    # one in each twentieth of the firings
    assert [p // 50 for p in drawn] == list(range(20))
    assert len(idx.feature(0).random(2000)) == 1000


def test_near_misses(make_index):
    # token 1 at 0 2 4 … of three sequences; the feature fires on it in the first two sequences only half of the time
    token_N = np.tile([1, 2], 150)
    dense_NF = np.zeros((300, 2), np.float32)
    dense_NF[[0, 4, 100, 104], 0] = 1
    dense_NF[::2, 1] = 1
    idx = make_index(dense_NF, lengths=[100, 100, 100], token_N=token_N, unencoded=[2]).index
    at = [e.position for e in idx.feature(0).near_misses(16)]
    assert len(set(at)) == 16 and all(token_N[p] == 1 and p not in (0, 2, 4, 100, 104) for p in at)
    # its own sequences come first, and there is enough room in them
    assert max(at) < 200
    both = [e.position for e in idx.feature(0).near_misses(145)]
    assert sorted(both) == [p for p in range(0, 300, 2) if p not in (0, 2, 4, 100, 104)]
    assert all(p < 200 for p in both[:95]) and all(p >= 200 for p in both[95:])
    assert idx.feature(1).near_misses() == [], "a dense feature has none"
    assert all(e.value == 0 for e in idx.feature(0).near_misses())


# tables and neighbours


def test_token_table(small):
    first = small.feature(0).tokens()
    assert [(t.text, t.count, t.share, t.precision, t.f1) for t in first] == [(" a", 5, 1.0, 1.0, 1.0)]
    both = small.feature(1).tokens()
    assert [(t.text, t.count, t.precision) for t in both] == [(" b", 4, 1.0), (" c", 3, 1.0)]
    assert small.feature(2).tokens()[0].precision == pytest.approx(1 / 3)


def test_together_counts_joint_firings(make_index):
    rng = np.random.default_rng(0)
    dense_NF = (rng.random((400, 5)) < [0.3, 0.3, 0.3, 1.0, 0.01]).astype(np.float32)
    dense_NF[:, 1] = dense_NF[:, 0]
    dense_NF[dense_NF[:, 0] != 0, 2] = 0
    idx = make_index(dense_NF).index
    n = idx.column("n")
    near = {x.feature: x for x in idx.feature(0).neighbours("together")}
    assert set(near) == {1, 3}, "2 never fires with it, 4 fires too rarely"
    assert near[1].count == n[0] and near[1].value == pytest.approx(1.0)
    # firing on every token says nothing: lift 1, NPMI 0
    assert near[3].value == pytest.approx(0.0, abs=1e-9)
    assert idx.feature(3).neighbours("together")[0].value == pytest.approx(0.0, abs=1e-9)


def test_signs_of_neighbours_are_compared(random_index):
    made, idx = random_index, random_index.index
    sign_NF = np.sign(made.dense_NF)
    compared = 0
    for j in range(len(idx)):
        for kind in ("decoder", "together"):
            for near in idx.feature(j).neighbours(kind):
                both_N = sign_NF[:, j] * sign_NF[:, near.feature]
                joint = int((both_N != 0).sum())
                if idx.signed and joint >= 5:
                    assert near.agree == (both_N > 0).sum() / joint
                    compared += 1
                else:
                    assert near.agree is None
    assert (compared > 20) == idx.signed
    assert any("same sign" in idx.feature(j).html() for j in range(len(idx))) == idx.signed


def test_densities_of_both_signs(random_index):
    made, idx = random_index, random_index.index
    E = made.encoded_N.sum()
    assert idx.column("density_pos").tolist() == ((made.dense_NF > 0).sum(0) / E).tolist()
    assert idx.column("density_neg").tolist() == ((made.dense_NF < 0).sum(0) / E).tolist()
    assert (idx.table(density_neg=(1e-9, None)).features.size > 0) == idx.signed
    dense_F = idx.column("density") > 0.1
    assert set(idx.table(flag="dense").features) == set(np.flatnonzero(dense_F))


def test_check_compares_signs(random_index):
    idx = random_index.index
    assert idx.check() == []
    if not idx.signed:
        return
    path = idx.path / "manifest.json"
    path.write_text(json.dumps({**idx.manifest, "signed": False}))
    (problem,) = open_index(idx.path).check()
    assert problem.endswith("codes.safetensors holds negative codes, the manifest says that there are none")


def test_table_filters_and_sorts(small):
    table = small.table(sort="-n", columns=["feature", "n", "density", "top_text", "flags_text", "bar", "label"])
    assert table.features.tolist() == [1, 0, 2, 3]
    row = next(iter(table))
    assert (row["n"], row["density"], row["top_text"], row["label"]) == (7, 7 / 18, " b", "")
    assert row["bar"] == [0.0] * 15 + [1.0]
    assert table["n"].tolist() == [7, 5, 1, 0] and table["top_text"] == [" b", " a", " c", ""]
    # a column that is not among the table's own
    assert "feature" not in small.table(columns=["n"]).names and small.table(sort="n")["feature"].tolist() == [
        3,
        2,
        0,
        1,
    ]
    with pytest.raises(SaekitError, match="no column densty; nearest: density"):
        table["densty"]
    assert small.table(alive=False).features.tolist() == [3]
    assert small.table(sort="n", n=(1, 5)).features.tolist() == [2, 0]
    assert small.table(sort="feature", density=(0.06, None)).features.tolist() == [0, 1]
    assert small.table(sort="feature", flag="dead").features.tolist() == [3]
    assert small.table(sort="feature", without=["dead", "dense"]).features.tolist() == [2]
    # a dead feature has no median: undefined values come last, whichever way the order runs
    assert small.table(sort="q50").features[-1] == small.table(sort="-q50").features[-1] == 3
    assert small.table(limit=2, sort="feature").features.tolist() == [0, 1]
    with pytest.raises(SaekitError, match="no column densty; nearest: density"):
        small.table(densty=(0, 1))
    with pytest.raises(SaekitError, match="no flag dad; known are dead"):
        small.table(flag="dad")


def test_csv_cannot_become_a_formula(small):
    small.feature(0).label = '=HYPERLINK("http://evil")'
    text = small.table(sort="feature", columns=["feature", "label", "mean"]).to_csv()
    assert text.splitlines()[1].startswith("0,\"'=HYPERLINK(")
    assert small.table(labelled=True).features.tolist() == [0]


# searching


def test_search_text_says_where(small):
    small.feature(2).label = "the letter b"
    hits = small.search("b")
    assert (hits[0].feature, hits[0].where, hits[0].text) == (2, "label", "the letter b")
    # " b" occurs 4 times, feature 1 fires on these and 3 times more
    assert (hits[1].feature, hits[1].where) == (1, "token")
    assert (hits[1].precision, hits[1].recall) == (pytest.approx(4 / 7), 1.0)
    assert hits[1].score == pytest.approx(2 * 4 / (7 + 4))
    # a text over several tokens is found where it ends: " b c" ends at 3 and 9
    found = {h.feature: h for h in small.search("b c")}
    assert found[2].where == "text" and found[2].recall == 0.5 and found[1].recall == 1.0
    assert small.find_text("b c").tolist() == [3, 9]
    # " c" and "<s>" are neighbours across a border only
    assert small.find_text(" c<s>").tolist() == []
    assert small.search("zebra") == [] and small.search("") == []


def test_search_regex(small):
    assert small.tokens_matching(r"^\d+$") == [4, 5]
    hits = small.search(regex="^ [bc]$")
    assert (hits[0].feature, hits[0].precision, hits[0].recall) == (1, 1.0, 1.0)
    with pytest.raises(SaekitError, match="is not a regular expression"):
        small.search(regex="(")


def test_search_regex_is_stopped(make_index):
    idx = make_index(np.ones((2, 1), np.float32), pieces=[b"<s>", b"a" * 40]).index
    with pytest.raises(SaekitError, match="takes longer than 2 s"):
        idx.search(regex=r"^(a+)+$b")


def test_search_by_direction(make_index):
    W = np.array([[1, 0], [0.6, 0.8], [-3, 0], [0, 1]], np.float32)
    small = make_index(np.ones((2, 4), np.float32), D=2, W_dec_FD=torch.from_numpy(W)).index
    with pytest.raises(SaekitError, match=r"sae.safetensors is missing"):
        small.search(like=0)
    write_tensors(small.path.parent / "sae.safetensors", {"W_dec": W})
    hits = small.search(like=0, limit=2)
    assert [(h.feature, h.where, round(h.score, 3)) for h in hits] == [(2, "decoder", -1.0), (1, "decoder", 0.6)]
    assert small.search(vector=[0, 2.0], limit=1)[0].feature == 3
    with pytest.raises(SaekitError, match="has 3 entries, decoder rows have 2"):
        small.search(vector=[1, 2, 3])
    with pytest.raises(SaekitError, match="exactly one of"):
        small.search("a", regex="b")


def test_without_by_token(make_index):
    rng = np.random.default_rng(2)
    dense_NF = (rng.random((300, 6)) < 0.3).astype(np.float32)
    with_it = make_index(dense_NF).index
    at = rng.permutation(300)[:50]
    expected = with_it.counts_at(at)
    assert np.array_equal(expected, (dense_NF[at] != 0).sum(0))
    without = make_index(dense_NF, by_token=False).index
    assert not without.has_by_token and np.array_equal(without.counts_at(at), expected)
    assert without.feature(0).neighbours("together") == []
    with pytest.raises(SaekitError, match=r"index without by_token; rebuild:  saekit index"):
        without.at(0)


# the rest


def test_to_dict_is_json(small):
    for j in range(4):
        data = small.feature(j).to_dict()
        assert json.loads(json.dumps(data))["feature"] == j
    assert small.feature(0).to_dict()["top"]["+"][0]["value"] == 5.0


def test_density_interval_by_hand(small):
    # feature 0 fires 2 and 3 times in the two sequences: se² = (4 + 9 − 25/2) / 18²
    f = small.feature(0)
    half = 1.96 * (13 - 12.5) ** 0.5 / 18
    assert f.density_interval == (pytest.approx(5 / 18 - half), pytest.approx(5 / 18 + half))
    assert small.feature(3).density_interval == (0.0, 3 / 18)


def test_values_are_mapped_not_copied(small):
    before = {name: os.stat(small.path / name).st_mtime_ns for name in small.manifest["files"]}
    assert not small.feature(1).positions.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        small.feature(1).positions[0] = 3
    assert before == {name: os.stat(small.path / name).st_mtime_ns for name in small.manifest["files"]}


def test_one_reader_many_threads(random_index):
    idx = random_index.index
    expected = [idx.feature(j).html() for j in range(len(idx))]
    fresh = open_index(idx.path)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda j: fresh.feature(j).html(), range(len(idx)))) == expected


def test_a_map_outlives_a_rebuild(make_index, tmp_path):
    old = make_index(np.ones((5, 2), np.float32)).index
    codes = old.file("codes")
    make_index(np.ones((9, 2), np.float32))
    assert codes["position"].tolist() == [0, 1, 2, 3, 4] * 2


def test_index_folder_can_be_moved(small, tmp_path):
    shutil.move(small.path.parent, tmp_path / "elsewhere")
    assert open_index(tmp_path / "elsewhere").feature(0).n == 5


# the SAE as a whole


def test_norms(make_index):
    """‖f‖ has ‖b_dec‖ as a coordinate: b_dec is all ones, D = 4, so 2; decoder rows have norm 1, 1 and 2."""
    W_dec_FD = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]])
    dense_NF = np.zeros((5, 3), np.float32)
    dense_NF[1, 0], dense_NF[2, :2], dense_NF[3, 2], dense_NF[4, 2] = 1, (3, 6), 2, 2
    x_ND = np.zeros((5, 4), np.float32)
    x_ND[:, 0] = [2, 2, 14, 4, 0]
    idx = make_index(dense_NF, x_ND=x_ND, D=4, W_dec_FD=W_dec_FD).index
    found = idx.norms()
    # √(0+4), √(1+4), √(9+36+4), √(16+4); the last token has no norm
    assert found.positions.tolist() == [0, 1, 2, 3] and found.undefined == 1 and not found.constant
    assert found.code == pytest.approx([2, 5**0.5, 7, 20**0.5]) and found.x.tolist() == [2, 2, 14, 4]
    # ‖x‖²/‖f‖² − 1: 0, 4/5 − 1 = −0.2, 196/49 − 1 = 3, 16/20 − 1 = −0.2
    assert found.inside == {0.25: 0.75, 0.5: 0.75, 1.0: 0.75} and found.under == 0.25
    assert found.ratio == pytest.approx((1 + 5**0.5 / 2 + 0.5 + 20**0.5 / 4) / 4)
    assert found.median == pytest.approx((1 + 5**0.5 / 2) / 2) and found.eps_lbo == pytest.approx(0.2 / 2)
    assert len(idx.norms(2).x) <= 2


def test_norms_of_normalised_inputs_and_of_nothing(make_index, tmp_path):
    x_ND = np.full((30, 6), 0.5, np.float32)
    assert make_index(np.ones((30, 2)), x_ND=x_ND).index.norms().constant
    folder = tmp_path / "silent"
    found = make_index(np.zeros((9, 2)), x_ND=np.zeros((9, 6), np.float32), folder=folder).index.norms()
    assert not len(found.x) and found.undefined == 9 and np.isnan(found.ratio)


def test_crowd(random_index):
    idx, l0 = random_index.index, (random_index.dense_NF != 0).sum(1)
    found = idx.crowd(4)
    encoded = random_index.encoded_N
    assert found.counts.tolist() == np.bincount(l0[encoded]).tolist()
    assert found.mean == pytest.approx(l0[encoded].mean()) and idx.adaptive
    for side, best in ((found.most, max), (found.fewest, min)):
        values = [int(c.features[c.example.centre]) for c in side]
        # the best of each sequence, the best sequences first
        of_sequence = [best(l0[encoded & (random_index.seq_N == s)]) for s in np.unique(random_index.seq_N[encoded])]
        assert values == sorted(of_sequence, reverse=best is max)[:4]
        assert len({c.example.sequence for c in side}) == 4
        assert all((c.features == l0[c.example.positions]).all() for c in side)
    # every token in one group, groups apart, quartiles of the relative error
    error = ((random_index.x_ND - random_index.xhat_ND) ** 2).sum(1) / (random_index.x_ND**2).sum(1)
    assert sum(g.tokens for g in found.error) == encoded.sum()
    assert all(a.high < b.low for a, b in zip(found.error, found.error[1:], strict=False))
    for g in found.error:
        mine = error[encoded & (l0 >= g.low) & (l0 <= g.high)]
        assert len(mine) == g.tokens
        assert (g.q25, g.median, g.q75) == pytest.approx(tuple(np.quantile(mine, (0.25, 0.5, 0.75))), rel=1e-4)


def test_a_row_rule_that_rarely_finds_too_few_is_not_adaptive(make_index, tmp_path):
    dense_NF = np.ones((200, 4), np.float32)
    dense_NF[7, 2:] = 0
    made = make_index(dense_NF)
    assert made.index.manifest["ragged"] and not made.index.adaptive
    dense_NF[:100, 3] = 0
    assert make_index(dense_NF, folder=tmp_path / "ragged").index.adaptive


def test_kth_values(random_index):
    size = np.sort(np.abs(random_index.dense_NF[random_index.encoded_N]), axis=1)[:, ::-1]
    for k in (1, 3, 12):
        found = random_index.index.kth_values(k)
        wanted = size[:, k - 1]
        assert found.values == pytest.approx(wanted[wanted > 0], rel=1e-3)
        assert found.short == pytest.approx((wanted == 0).mean())


def test_snippets(small):
    got = small.snippets(np.array([0, 3, 9, 10, 19]), 2, 1)
    # never across the border between 9 and 10
    assert got == [
        (b"", b"<s>", b" a"), (b" a b", b" c", b"12"), (b"=x b", b" c", b""), (b"", b"<s>", b" a"), (b" b a", b"12", b""),
    ]  # fmt: skip


def trained(idx, training=None, **options):
    config = json.loads((idx.path.parent / "config.json").read_text())
    config |= {"options": options, "provenance": {"training": training or {}}}
    (idx.path.parent / "config.json").write_text(json.dumps(config))
    return open_index(idx.path)


def test_aim(make_index):
    dense_NF = np.zeros((100, 4), np.float32)
    dense_NF[:, 0] = dense_NF[:, 1] = 1
    dense_NF[:3, 2] = 1
    idx = make_index(dense_NF).index
    # 203 firings on 100 tokens
    calibrated = {"threshold_source": "calibration", "calibration_rows": 5000}
    assert idx.aim() is None
    aim = trained(idx, k=2, **calibrated).aim()
    assert (aim.found, aim.off, aim.threshold) == (2.03, pytest.approx(0.015), None) and aim.warning == ""
    assert str(aim) == (
        "Trained for k = 2; in this index 2.0 features fire per token (+1.5 %). "
        "One threshold per feature, calibrated on 5,000 training rows."
    )
    dense_NF[:8, 2] = 1
    idx = make_index(dense_NF, folder=idx.path.parent).index
    # 208: 4 % more than 2, which a calibrated threshold must not have, and a penalty may
    write_tensors(idx.path.parent / "sae.safetensors", {"threshold": np.array([0.25], np.float32)})
    aim = trained(idx, k=2, **calibrated).aim()
    assert (
        "Threshold θ = 0.25, calibrated" in str(aim)
        and "2.1 features fire per token, 4 % more than the 2" in aim.warning
    )
    running = trained(idx, k=3, threshold_source="running average").aim()
    assert "a running average of training, not calibrated" in str(running) and "31 % less than the 3" in running.warning
    aim = trained(idx, {"l0": 2.0, "l1": None}).aim()
    assert aim.warning == "" and str(aim).startswith("Trained for L0 = 2, by the weight of its penalty")
    assert "17 % less" in trained(idx, {"l0": 2.5, "l1": None}).aim().warning
    # λ set by hand aims at nothing, but for the loss that names its target
    assert trained(idx, {"l0": 2.0, "l1": 0.1}).aim() is None
    assert trained(idx, {"l0": 2.0, "l1": 0.1, "l0_loss": "target"}).aim() is not None


def test_ranks_and_budgets(make_index):
    """Feature j − 1 fires on every j-th token: density 1/j, so α = 1; its budget is 1.9 times that for odd j, 3 times for even."""
    N, F = 4000, 60
    dense_NF = (np.arange(N)[:, None] % np.arange(1, F + 1) == 0).astype(np.float32)
    times = torch.tensor([1.9 if j % 2 else 3.0 for j in range(1, F + 1)])
    budget_F = times * torch.from_numpy(dense_NF.mean(0))
    idx = make_index(dense_NF, buffers={"budget": budget_F, "threshold": torch.arange(F, dtype=torch.float32)}).index
    law = idx.law()
    assert law.rank[0] == 1 and law.rank[-1] == F and law.density[-1] == pytest.approx(1 / F, rel=0.02)
    _, alpha, _ = law.law
    assert alpha == pytest.approx(1, abs=0.05) and law.fitted == pytest.approx(law.density, rel=0.1)
    # 1.9 · 1 for j = 1, 3 · ½ for j = 2
    assert law.budget[0] == pytest.approx(1.9) and (np.diff(law.budget) <= 0).all()
    under = np.arange(1, F, 2)
    assert law.under == len(under) and idx.table("feature", flag="under-budget").features.tolist() == under.tolist()
    assert idx.column("budget_share")[:2] == pytest.approx([1 / 1.9, 1 / 3])
    assert idx.table(budget_share=(0.5, None), limit=None).features.size == F - len(under)


def test_without_budgets(small, make_index, tmp_path):
    assert not small.has_budgets and small.law().budget is None and small.law().law is None
    # feature 3 never fires
    assert small.law().density.tolist() == pytest.approx([7 / 18, 5 / 18, 1 / 18, np.nan], nan_ok=True)
    with pytest.raises(SaekitError, match="no flag under-budget; known are dead"):
        small.table(flag="under-budget")
    with pytest.raises(SaekitError, match="no column budget_share"):
        small.column("budget_share")
    # budgets that never came into force: all alike, and so are the thresholds
    start = {"budget": torch.full((4,), 0.5), "threshold": torch.full((4,), 0.1)}
    assert not make_index(np.eye(4), buffers=start, folder=tmp_path / "start").index.has_budgets
    uniform = {"budget": torch.full((4,), 0.5), "threshold": torch.arange(4.0)}
    assert make_index(np.eye(4), buffers=uniform, folder=tmp_path / "uniform").index.has_budgets


def test_posterior(make_index, tmp_path):
    from saekit.variants import Variational

    dense_NF = np.zeros((20, 3), np.float32)
    dense_NF[::2, 0] = 2
    dense_NF[:5, 1] = [-0.5, 0.5, 3, -3, 3]
    rho_F = torch.tensor([float(np.log(0.25)), float(np.log(0.25)), 9.0])
    made = make_index(
        dense_NF, signed=True, buffers={"b_var": rho_F}, sae_variant=Variational(k=2, prior_std=2.0, d_sae=3)
    )
    idx = made.index
    # σ = 2·√¼ = 1; KL = ½(2²/2² + ¼ − 1 − log ¼); the third ρ is cut to 2, and never fires
    assert idx.has_std and idx.column("std_mean") == pytest.approx([1, 1, 2 * np.e])
    assert idx.column("kl_mean")[0] == pytest.approx(0.5 * (0.25 + np.log(4))) and np.isnan(idx.column("kl_mean")[2])
    f = idx.feature(1)
    assert f.std == 1 and f.uncertain == pytest.approx(2 / 5) and np.isnan(idx.feature(2).uncertain)
    assert f.top(1)[0].std.tolist() == [1.0 if c else 0.0 for c in f.top(1)[0].codes]
    # noise that depends on the input is not a feature's own, and a fixed one needs no tensor
    other = make_index(dense_NF, signed=True, buffers={"b_var": rho_F, "W_var": torch.zeros(3, 6)}, sae_variant=Variational(k=2, prior_std=2.0, variance="input"), folder=tmp_path / "input").index  # fmt: skip
    assert not other.has_std and other.feature(1).std is None and other.window(3, feature=1).std is None
    fixed = make_index(dense_NF, signed=True, buffers={}, sae_variant=Variational(k=2, prior_std=2.0, variance="fixed", log_var_init=0.0), folder=tmp_path / "fixed").index  # fmt: skip
    assert fixed.column("std_mean").tolist() == [2, 2, 2]


def test_ends_of_a_crowd_with_more_equals_than_are_looked_at(random_index, monkeypatch):
    from saekit.feature_index import per_token

    whole = random_index.index.crowd(4)
    monkeypatch.setattr(per_token, "CANDIDATES", 20)
    few = random_index.index.crowd(2)
    for side in ("most", "fewest"):
        a, b = ([int(c.features[c.example.centre]) for c in getattr(x, side)] for x in (few, whole))
        # the extreme itself is always among them; here 20 tokens are looked at, and as many that equal the last
        assert a[0] == b[0] and len(a) == 2


def test_a_table_draws_itself(make_index):
    dense_NF = np.zeros((40, 60), np.float32)
    dense_NF[::2, :59] = 1.0
    idx = make_index(dense_NF).index
    idx.feature(3).label = "<script>"
    drawn = idx.table("feature", columns=("feature", "label", "n", "density", "bar"))._repr_html_()
    assert "<td>3</td><td>&lt;script&gt;</td><td>20</td>" in drawn and "<script>" not in drawn
    # fifty rows of sixty, and no column of histograms
    assert drawn.count("<tr>") == 51 and "60 rows, 50 are shown" in drawn and "bar</th>" not in drawn
    assert "<td></td>" in idx.table("-feature", columns=("q50",))._repr_html_()
