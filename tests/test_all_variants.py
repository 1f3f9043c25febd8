"""Everything behind training, for every variant: evaluation, index, check, what is drawn; codes of one sign and of both, as many
per token as there are, dense ones.

B tokens · D model width · F features
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import saekit as sk
from saekit import cli
from saekit.encoding import encode_store
from saekit.errors import SaekitError
from saekit.evaluation.reconstruction import Reconstruction
from saekit.feature_index import IndexBuilder, build_index, open_index
from saekit.progress import Progress
from saekit.run_folder import summary
from saekit.sae import check_sae
from saekit.store.format import map_tensors, write_tensors
from saekit.trainer import Trainer
from saekit.variants import VARIANTS

SITE = "blocks.0.hook_resid_post"
F = 128
CASES = {
    "topk": sk.TopK(k=4, d_sae=F),
    "abs_topk": sk.AbsTopK(k=4, d_sae=F),
    "mutual_choice": sk.MutualChoice(k=4, d_sae=F),
    "feature_choice": sk.FeatureChoice(k=4, d_sae=F),
    "matryoshka": sk.Matryoshka(k=4, d_sae=F),
    "variational": sk.Variational(k=4, d_sae=F),
    "variational, one sign": sk.Variational(k=4, d_sae=F, relu_mu=True, variance="input"),
    "top_afa": sk.TopAFA(d_sae=F),
    "jumprelu": sk.JumpReLU(l1=0.01, d_sae=F),
    "gated": sk.Gated(l1=0.01, d_sae=F),
    "relu": sk.ReLU(l1=0.01, d_sae=F),
    # about half of all features on every token
    "relu, dense": sk.ReLU(l1=0.0, d_sae=F),
}
SIGNED = ("abs_topk", "variational")
BUILT_IN = tuple(VARIANTS)
CLOSE = 1e-5


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny_model, tiny_text):
    return sk.collect(
        tiny_model, site=SITE, text=tiny_text, out=tmp_path_factory.mktemp("acts") / "acts", context=64, tokens=12_000
    )


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """trained(case) -> folder of the SAE, trained once."""
    root, made = tmp_path_factory.mktemp("saes"), {}

    def folder(case: str):
        if case not in made:
            made[case] = root / case.replace(", ", "-")
            sk.train(CASES[case], store, out=made[case], batch=512)
        return made[case]

    return folder


def test_no_variant_is_missing():
    assert {type(variant).name for variant in CASES.values()} == set(BUILT_IN)
    assert {case for case, variant in CASES.items() if variant.signed} == set(SIGNED)


@pytest.mark.parametrize("case", CASES)
def test_every_verb(case, trained, store, tmp_path, capsys):
    folder = str(trained(case))
    assert cli.main(["index", folder, "--tokens", "4000"]) == 0
    assert f"firings of {F} features on" in capsys.readouterr().out
    assert cli.main(["evaluate", folder, "--lm-tokens", "1000"]) == 0
    said = capsys.readouterr().out
    assert f"of {F} features silent over" in said and "nats with the SAE in place" in said
    assert ("two_sided" in said) == (case in SIGNED)
    for path, kind in ((folder, "SAE"), (f"{folder}/index", "index")):
        assert cli.main(["check", path]) == 0
        assert f"{kind} is sound" in capsys.readouterr().out
    index = open_index(folder)
    assert index.signed == (case in SIGNED) and len(index) == len(index.table()) == F
    assert index.table().to_csv().count("\n") == F + 1
    shown = index.table(limit=3).features.tolist()
    assert cli.main(["feature", folder, *map(str, shown)]) == 0
    said = capsys.readouterr().out
    assert ("positive" in said or "negative" in said) == (case in SIGNED)
    assert (
        cli.main(["feature", folder, *map(str, shown), "--view", "quantiles", "--html", str(tmp_path / "f.html")]) == 0
    )
    page = (tmp_path / "f.html").read_text(encoding="utf-8")
    assert page.count("<h2>") == 3 and "nan" not in page


@pytest.mark.parametrize("case", CASES)
def test_typed_text_is_encoded_as_the_store_is(case, trained, store, tiny_model):
    sae = sk.SAE.load(trained(case))
    index = build_index(sae, store, tokens=200)
    lm = sk.load_model(str(tiny_model), compute="fp32")
    text = index.encode("def add(a, b):\n", sae=sae, lm=lm)
    x_TD = lm.capture(torch.tensor([text.tokens.tolist()]), [SITE])[SITE][0].float()
    dense_TF = sae.encode(x_TD).dense().numpy()
    dense_TF[~text.encoded] = 0
    assert text.l0.tolist() == (dense_TF != 0).sum(1).tolist() and text.l0.any()
    for j in range(F):
        assert np.array_equal(text.codes_of(j), dense_TF[:, j])
    assert (
        np.abs(text.strongest(F).values) == np.sort(np.abs(dense_TF).max(0))[::-1][: len(text.strongest(F).values)]
    ).all()


# Against a dense float64 reference


def reference(sae: sk.SAE, x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (B, F) float64 by the formula of each variant, and bool (B, F): where float32 decides on which side of the bar."""
    name = sae.variant.name
    W, b, b_dec = sae.W_enc.double(), sae.b_enc.double(), sae.b_dec.double()
    centred_BD = x_BD.double() - b_dec
    pre_BF = centred_BD @ W.T + b
    if name in ("topk", "abs_topk", "variational"):
        key_BF = pre_BF.abs() if sae.variant.signed else pre_BF
        bars_BK = key_BF.topk(sae.variant.k + 1, 1).values
        bar_B1, next_B1 = bars_BK[:, -2:-1].clamp(min=1e-300), bars_BK[:, -1:]
        tied_BF = (bar_B1 - next_B1 < CLOSE) & ((key_BF - bar_B1).abs() < 2 * CLOSE)
        return torch.where(key_BF >= bar_B1, pre_BF, 0), tied_BF
    if name == "top_afa":
        value_BF, order_BF = pre_BF.relu().sort(1, descending=True)
        norm_BF = value_BF.square().cumsum(1).sqrt()
        off_BF = (norm_BF - centred_BD.norm(dim=1, keepdim=True)).abs()
        least_B1, n_B1 = off_BF.min(1, keepdim=True)
        kept_BF = torch.where(torch.arange(F) <= n_B1, value_BF, 0)
        tied_BF = (off_BF - least_B1 < CLOSE) & (value_BF > 0)
        tied_BF &= tied_BF.sum(1, keepdim=True) > 1
        place_BF = torch.zeros_like(pre_BF)
        return place_BF.scatter(1, order_BF, kept_BF), place_BF.bool().scatter(1, order_BF, tied_BF)
    if name == "gated":
        magnitude_BF = sae.extra["r_mag"].double().exp() * (pre_BF - b) + sae.extra["b_mag"].double()
        close_BF = torch.minimum(pre_BF.abs(), magnitude_BF.abs()) < CLOSE
        return torch.where(pre_BF > 0, magnitude_BF.relu(), 0), close_BF
    theta = sae.extra["threshold"].double() if name != "relu" else torch.zeros(())
    return torch.where(pre_BF > theta, pre_BF, 0), (pre_BF - theta).abs() < CLOSE


@pytest.mark.parametrize("case", CASES)
def test_tier_1_and_index_equal_a_dense_reference(case, trained, store):
    sae = sk.SAE.load(trained(case))
    index = build_index(sae, store, tokens=4000)
    rows = np.flatnonzero(store.row_positions() < index.n_tokens)
    positions = store.row_positions()[rows]
    x_BD = store.read(SITE, 0, len(rows)).float()
    c_BF, close_BF = reference(sae, x_BD)
    got_NF = np.zeros((index.n_tokens, F))
    for j in range(F):
        got_NF[index.feature(j).positions, j] = index.feature(j).values
    got_BF = torch.from_numpy(got_NF[positions])
    assert (close_BF & (c_BF != 0)).sum() < 0.06 * (c_BF != 0).sum()
    c_BF = torch.where(close_BF, got_BF, c_BF)
    want_NF = np.zeros_like(got_NF)
    want_NF[positions] = c_BF.numpy()
    np.testing.assert_allclose(got_NF, want_NF, rtol=2**-10, atol=1e-4)

    assert index.column("n").tolist() == (want_NF != 0).sum(0).tolist()
    assert index.column("n_pos").tolist() == (want_NF > 0).sum(0).tolist()
    assert index.column("n_neg").tolist() == (want_NF < 0).sum(0).tolist()
    assert index.features_per_token.tolist() == (want_NF != 0).sum(1).tolist()
    energy_F = (want_NF**2).sum(0) * sae.W_dec.double().square().sum(1).numpy()
    np.testing.assert_allclose(index.column("energy"), energy_F / energy_F.sum(), rtol=1e-3, atol=1e-7)
    for j in np.flatnonzero(index.column("n")).tolist():
        f, codes = index.feature(j), got_NF[got_NF[:, j] != 0, j]
        for q in (5, 50, 95):
            assert f.column(f"q{q:02d}") == pytest.approx(np.quantile(np.abs(codes), q / 100), rel=1e-3)
        assert f.max == pytest.approx(np.abs(codes).max(), rel=1e-6)
        edges = f.histogram.edges
        assert (edges[0], edges[-1]) == (-f.max if index.signed else 0.0, f.max)
        assert f.histogram.counts.sum() == f.n
        assert f.histogram.counts[edges[1:] <= 0].sum() == (codes < 0).sum()
        for sign, s in (("+", 1), ("-", -1)):
            examples = f.top(64, sign)
            assert (s * np.array([e.value for e in examples]) > 0).all()
            if (s * codes > 0).any() and f.n >= 10:
                assert examples[0].value == pytest.approx(s * (s * codes).max(), rel=1e-6)
    flags = index.column("flags")
    one_sided_F = index.signed & ((want_NF > 0).any(0) != (want_NF < 0).any(0))
    assert ((flags & 8) > 0).tolist() == one_sided_F.tolist()
    assert ((flags & 1) > 0).tolist() == (~want_NF.any(0)).tolist()

    tier1 = measured(sae, store, rows)
    y_BD = c_BF @ sae.W_dec.double() + sae.b_dec.double()
    e_BD, spread = x_BD.double() - y_BD, (x_BD - x_BD.mean(0)).double().square().sum()
    assert tier1["fvu"].value == pytest.approx(float(e_BD.square().sum() / spread), rel=1e-3)
    assert tier1["l0"].value == pytest.approx(float((c_BF != 0).sum(1).double().mean()), rel=1e-3)
    assert tier1["l1"].value == pytest.approx(float(c_BF.abs().sum(1).mean()), rel=1e-3)
    assert tier1["dead_at"].value == int((~want_NF.any(0)).sum()) and tier1["dead_at"].n == len(rows)
    if index.signed:
        n_F, rarer_F = (want_NF != 0).sum(0), np.minimum((want_NF > 0).sum(0), (want_NF < 0).sum(0))
        both = (rarer_F >= 64) & (rarer_F >= 0.05 * n_F)
        assert 0 < both.sum() < F
        assert tier1["two_sided"].value == pytest.approx(both.sum() / (n_F > 0).sum())


def measured(sae, store, rows, *more) -> dict:
    """Tier 1 on these rows; `more` consumers see the same pass."""
    sequences = np.unique(np.searchsorted(store.seq_rows(), rows, side="right") - 1)
    tier1 = Reconstruction(sae, torch.from_numpy(store.statistics(SITE).mean_D.copy()), sequences)
    encode_store(sae, store, SITE, [tier1, *more], rows=rows)
    return tier1.metrics()


@pytest.mark.parametrize("case", SIGNED)
def test_nothing_depends_on_the_sign_that_a_feature_was_given(case, trained, store, tmp_path):
    sae = sk.SAE.load(trained(case))
    flipped = sk.SAE.load(trained(case))
    turn_F = torch.arange(F) % 3 == 0
    for tensor in (flipped.W_enc, flipped.W_dec, flipped.b_enc):
        tensor.data[turn_F] *= -1
    found = []
    for one, name in ((sae, "as it is"), (flipped, "flipped")):
        one.save(tmp_path / name)
        found.append((sk.evaluate(one, store, lm_tokens=1000), build_index(one, store, tokens=3000)))
    (evaluation, index), (evaluation_, index_) = found
    values, values_ = (
        {key: m["value"] for key, m in e.metrics().items() if m["value"] is not None} for e in (evaluation, evaluation_)
    )
    assert values_ == pytest.approx(values, rel=1e-6, abs=1e-9)
    assert "two_sided" in values and "ce_added" in values
    for name in ("n", "mean_abs", "q50", "energy", "crowd", "token_entropy", "flags"):
        assert np.array_equal(index.column(name), index_.column(name), equal_nan=True), name
    turn = turn_F.numpy()
    for a, b in (("n_pos", "n_neg"), ("n_neg", "n_pos")):
        assert np.array_equal(index_.column(a), np.where(turn, index.column(b), index.column(a)))
    for j in (0, 1):
        ends = {s: [e.position for e in index.feature(j).top(8, s)] for s in "+-"}
        assert {s: [e.position for e in index_.feature(j).top(8, s)] for s in "+-"} == (
            {"+": ends["-"], "-": ends["+"]} if turn[j] else ends
        )


# Features that never fire, counted in three places


def frozen(variant) -> sk.variants.Variant:
    """The variant with weights that stay where they are: the smallest steps, no rounding by an input scale."""
    changes = {"lr": 1e-30, "normalise": "none", "dead_after": 512}
    if isinstance(variant, sk.FeatureChoice):
        # features choose from the first step: 512 · 4 / 128 = 16 tokens of each batch, no fraction to be spread over steps
        changes |= {"switch": 0.0, "budget": "uniform"}
    return replace(variant, **changes)


@pytest.mark.parametrize("case", CASES)
def test_counts_of_a_window_agree_at_its_end_and_a_step_after(case, store, tmp_path):
    """A window of one batch, in which training's rule and the calibrated rule of inference keep the same codes."""
    train_rows = store.valid_rows([SITE], split="train")
    windows = [np.sort(train_rows[i : 512 * 4 : 4]) for i in (0, 2)]
    x_BD = [store.read(SITE, 0, store.rows).float()[torch.from_numpy(rows)] for rows in windows]
    trainer = Trainer(frozen(CASES[case]), store.d(SITE), tokens=1024, fit_rows=x_BD[0], compute="fp32")
    # the further down in the order of features, the rarer, or with both signs the more negative
    spread = ((x_BD[0] @ trainer.W_enc.T).std()).item()
    trainer.b_enc.copy_(-torch.linspace(0, 5 * spread, F))
    config = {"site": SITE, "variant": trainer.variant.name}
    silent = []
    for step, (rows, x) in enumerate(zip(windows, x_BD, strict=True)):
        trainer.step(x)
        dead_F = (trainer.idle_F >= trainer.dead_after).numpy()
        assert trainer.log()["dead"] == dead_F.sum() and 0 < dead_F.sum() < F
        # the end of a run turns features to their commoner sign, which is another test's matter
        sae = trainer.sae(config) if case in SIGNED else trainer.finish(config, lambda n, x=x: iter([x]))
        folder = sae.save(tmp_path / f"step-{step}")
        builder = IndexBuilder(sae, store, folder)
        metrics = measured(sae, store, rows, builder)
        index = builder.index
        assert metrics["dead_at"].value == dead_F.sum()
        assert metrics["dead_at"].note.startswith("without a firing in 512 tokens")
        assert ((index.column("n") == 0) == dead_F).all()
        assert any(
            w.startswith(f"{dead_F.sum()} of {F} features did not fire on 512 tokens")
            for w in index.manifest["warnings"]
        )
        negative_only_F = (index.column("n_neg") > 0) & (index.column("n_pos") == 0)
        assert negative_only_F.any() == (case in SIGNED) and not dead_F[negative_only_F].any()
        silent.append(dead_F)
    assert (silent[0] != silent[1]).any()


@pytest.mark.parametrize("case", ["topk", "abs_topk"])
@pytest.mark.parametrize("steps", [4, 5])
def test_the_log_the_summary_tier_1_and_the_index_count_alike(case, steps, store, tmp_path):
    """`dead_after` is four batches: the run ends at the end of that window, or one step after it."""
    variant = replace(frozen(CASES[case]), dead_after=1024, d_sae=1024)
    sae = sk.train(variant, store, out=tmp_path / "sae", batch=256, tokens=256 * steps, log_every=1, compute="fp32")
    rows = [batch.rows for batch, _ in zip(store.batches([SITE], batch=256, seed=0, split="train"), range(steps))]
    window = np.sort(np.concatenate(rows[-4:]))
    builder = IndexBuilder(sae, store, sae.path)
    metrics = measured(sae, store, window, builder)
    silent = int((builder.index.column("n") == 0).sum())
    log = [json.loads(line) for line in (tmp_path / "sae/metrics.jsonl").read_text().splitlines()]
    assert len(log) == steps and [line["dead"] for line in log[:3]] == [0, 0, 0]
    assert 0 < silent == log[-1]["dead"] == metrics["dead_at"].value
    assert metrics["dead_at"].n == builder.index.n_encoded == 1024
    assert f"{silent:,} of 1,024 features silent for 1,024 tokens" in summary(tmp_path / "sae")


def test_tier_1_counts_in_the_index_and_says_so(trained, store, tmp_path):
    sae = sk.SAE.load(trained("abs_topk"))
    sae.save(tmp_path / "sae")
    held_out = sk.evaluate(sae, store, tiers=(1,)).metrics()["dead_at"]
    index = build_index(sae, store)
    counted = sk.evaluate(sae, store, tiers=(1,)).metrics()
    assert counted["dead_at"]["n"] == counted["alive"]["n"] == index.n_encoded > held_out["n"]
    assert counted["dead_at"]["value"] == (index.column("n") == 0).sum()
    assert f"in the {index.n_encoded:,} tokens of the index" in counted["dead_at"]["note"]
    counts = map_tensors(tmp_path / "sae/evaluation/density.safetensors")
    rows = store.valid_rows([SITE], split="heldout")
    codes = sae.encode(store.read(SITE, 0, store.rows).float()[torch.from_numpy(rows)]).dense()
    assert counts["n"].tolist() == (codes != 0).sum(0).tolist()
    assert counts["n_neg"].tolist() == (codes < 0).sum(0).tolist()
    # an index that is another SAE's does not end an evaluation
    sae.b_enc += 0.1
    sae.save(tmp_path / "sae")
    evaluation = sk.evaluate(sae, store, tiers=(1,))
    assert evaluation.metrics()["dead_at"]["n"] == held_out["n"]
    assert any(
        "silent features are those of the held-out tokens: " in w and "belongs to SAE" in w
        for w in evaluation.warnings()
    )


# Many codes, none, and codes that are not what they should be


def test_many_codes_come_in_shorter_chunks_and_change_nothing(trained, store, tmp_path, monkeypatch):
    sae = sk.SAE.load(trained("relu, dense"))
    rows = store.valid_rows([SITE], split="all")[:3000]

    class Sizes(list):
        def update(self, chunk):
            self.append((len(chunk.rows), chunk.codes.values.numel()))

        def finish(self):
            pass

    sae.save(tmp_path / "one")
    one = IndexBuilder(sae, store, tmp_path / "one")
    sizes = Sizes()
    expected = measured(sae, store, rows, one, sizes)
    assert [n for n, _ in sizes] == [3000]
    # the first chunk is as long as if all features fired, later ones as the one before tells
    monkeypatch.setattr("saekit.encoding.CHUNK_CODES", 40_000)
    sae.save(tmp_path / "two")
    two = IndexBuilder(sae, store, tmp_path / "two")
    sizes = Sizes()
    found = measured(sae, store, rows, two, sizes)
    assert sizes[0][0] == 40_000 // F and sum(n for n, _ in sizes) == 3000 and len(sizes) > 3
    assert max(codes for _, codes in sizes[1:]) < 1.2 * 40_000
    assert all(found[key].value == pytest.approx(expected[key].value, rel=1e-6) for key in expected)
    for name in ("codes", "by_token", "examples", "features"):
        a, b = one.index.file(name), two.index.file(name)
        assert all(np.array_equal(a[key], b[key], equal_nan=a[key].dtype.kind == "f") for key in a), name
    assert one.index.manifest["value_exponent"] == two.index.manifest["value_exponent"]


@pytest.mark.parametrize("case", ["relu", "abs_topk"])
def test_an_sae_in_which_nothing_fires(case, trained, store, tmp_path):
    sae = sk.SAE.load(trained(case))
    sae.W_enc.data.zero_()
    sae.b_enc.data.fill_(0.0)
    sae.save(tmp_path / "sae")
    evaluation = sk.evaluate(sae, store, lm_tokens=1000)
    index = build_index(sae, store, tokens=1000)
    assert evaluation.value("l0") == 0 and evaluation.value("alive") == 0 and index.manifest["Z"] == 0
    assert (
        index.check() == []
        and "did not fire on" in index.feature(5).text()
        and "did not fire on" in index.feature(5).html()
    )
    assert f"100 % of {F} features silent" in evaluation.health()


def test_an_open_gate_without_magnitude_is_no_firing(store, trained, tmp_path):
    sae = sk.SAE.load(trained("gated"))
    rows = np.flatnonzero(store.row_positions() < 32 * 64)
    x_BD = store.read(SITE, 0, len(rows)).float()
    before_BF, _ = reference(sae, x_BD)
    # half of the magnitudes fall below 0
    sae.b_mag -= before_BF[before_BF > 0].median()
    sae.save(tmp_path / "sae")
    index = build_index(sae, store, tokens=32 * 64)
    c_BF, close_BF = reference(sae, x_BD)
    open_BF = (x_BD - sae.b_dec) @ sae.W_enc.T + sae.b_enc > 0
    assert (open_BF & (c_BF == 0)).sum() > 1000 and (c_BF > 0).sum() > 1000
    clear_F = ~close_BF.any(0).numpy()
    assert clear_F.mean() > 0.6
    assert index.column("n")[clear_F].tolist() == (c_BF > 0).sum(0).numpy()[clear_F].tolist()
    assert (index.column("n_neg") == 0).all() and index.check() == []


def test_negative_codes_of_a_variant_that_denies_them_are_named(store, tmp_path, trained):
    sae = sk.SAE.load(trained("abs_topk"))
    sae.config["signed"] = False
    builder = IndexBuilder(sae, store, tmp_path / "sae")
    with pytest.raises(
        SaekitError, match=r"^feature \d+ has the code -\d.* variant abs_topk says that no code is negative; "
    ):
        encode_store(sae, store, SITE, [builder], rows=builder.rows()[:100])


# What is said


def test_l0_off_its_target_is_said(store, tmp_path):
    def warnings(name, variant):
        sae = sk.train(variant, store, out=tmp_path / name, batch=512, tokens=2048)
        return " ".join(sk.evaluate(sae, store, tiers=(1,)).warnings())

    assert "above l0 = 0.5" in warnings("aimed", sk.ReLU(l0=0.5, d_sae=F))
    # a weight set by hand aims at nothing
    assert "L0" not in warnings("by hand", sk.ReLU(l0=0.5, l1=0.1, d_sae=F))
    assert "L0" not in warnings("k", sk.TopK(k=4, d_sae=F))


@pytest.mark.parametrize("case", ["mutual_choice", "feature_choice", "matryoshka"])
def test_thresholds_that_are_not_calibrated_are_said(case, store, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(Progress, "say", lines.append)
    sk.train(CASES[case], store, out=tmp_path / "sae", batch=512, tokens=2048)
    lines.clear()
    (checkpoint,) = (tmp_path / "sae/checkpoints").iterdir()
    sae = sk.SAE.load(checkpoint)
    said = f"{checkpoint}: its thresholds are running averages of training, not calibrated; L0 may be off"
    assert lines == [said]
    assert any("not calibrated" in w for w in sk.evaluate(sae, store, tiers=(1,)).warnings())
    assert check_sae(checkpoint) == []
    lines.clear()
    sk.SAE.load(tmp_path / "sae")
    assert lines == []


# saekit check


def change(name: str, **values):
    def edit(sae):
        for at, value in values.items():
            tensor = getattr(sae, name)
            tensor.view(-1)[int(at.removeprefix("at"))] = value

    return edit


def narrow(sae):
    sae.threshold = sae.threshold.half()


BAD = {
    "threshold below 0": ("jumprelu", change("threshold", at7=-0.5), r"threshold goes down to -0\.5; it is 0 or more"),
    "threshold below 0, one for all": ("mutual_choice", change("threshold", at0=-2.0), "threshold goes down to -2; "),
    "threshold infinite": ("feature_choice", change("threshold", at3=float("inf")), "threshold holds values that are not"),
    "threshold narrow": ("matryoshka", narrow, "threshold is float16; it is float32 or wider"),
    "budget above 1": ("feature_choice", change("budget", at0=1.5), r"budget goes from .* to 1\.5; it is a share"),
    "budgets too small": ("feature_choice", lambda sae: sae.budget.mul_(0.5), "budget adds up to 2 features per token, k is 4"),
    "magnitude not finite": ("gated", change("r_mag", at1=float("nan")), "r_mag holds values that are not finite"),
    "noise not finite": ("variational, one sign", change("W_var", at9=float("nan")), "W_var holds values that are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_check_names_values_that_cannot_be(name, trained, tmp_path):
    case, edit, message = BAD[name]
    sae = sk.SAE.load(trained(case))
    edit(sae)
    sae.save(tmp_path / "sae")
    problems = check_sae(tmp_path / "sae")
    assert any(re.match(message, problem) for problem in problems), problems


@pytest.mark.parametrize("case", ["jumprelu", "feature_choice", "gated", "variational", "topk"])
def test_check_knows_the_tensors_of_a_variant(case, trained, tmp_path, capsys):
    folder = trained(case)
    extra = sk.SAE.load(folder).variant.saved
    tensors = {name: np.array(t) for name, t in map_tensors(folder / "sae.safetensors").items()}

    def checked(tensors) -> str:
        out = tmp_path / "sae"
        out.mkdir(exist_ok=True)
        write_tensors(out / "sae.safetensors", tensors)
        config = json.loads((folder / "config.json").read_text())
        config["weights"]["bytes"] = (out / "sae.safetensors").stat().st_size
        (out / "config.json").write_text(json.dumps(config))
        assert cli.main(["check", str(out)]) == 2
        return capsys.readouterr().err

    assert f"holds stray, which {sk.SAE.load(folder).variant.name} does not have" in checked(
        {**tensors, "stray": np.ones(3)}
    )
    for name in extra:
        assert f"has no tensor {name}" in checked({k: t for k, t in tensors.items() if k != name})
        wrong = np.ones((*tensors[name].shape, 2), np.float32)
        assert f"{name} is {wrong.shape}, expected {tensors[name].shape}" in checked({**tensors, name: wrong})
