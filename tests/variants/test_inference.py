"""The finished SAE of every variant: it never depends on the rest of the batch, and saving, folding and dtypes change nothing."""

import copy
import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from saekit_kernels import Threshold, encode_select

import saekit as sk
from saekit import sae as sae_module
from saekit.sae import check_sae
from saekit.trainer import InputStatistics, Trainer
from saekit.variants import VARIANTS

D, F = 16, 64
K: dict[str, Any] = {"k": 5, "d_sae": F}
CASES = {
    "topk": sk.TopK(**K),
    "topk multi_k": sk.TopK(**K, multi_k=1 / 8),
    "topk mean_square": sk.TopK(**K, normalise="mean_square"),
    "topk sqrt_d": sk.TopK(**K, normalise="sqrt_d"),
    "topk none": sk.TopK(**K, normalise="none"),
    "abs_topk": sk.AbsTopK(**K),
    "abs_topk ema": sk.AbsTopK(**K, ema=0.9),
    "mutual_choice": sk.MutualChoice(**K),
    "mutual_choice ema": sk.MutualChoice(**K, ema=0.9),
    "feature_choice": sk.FeatureChoice(**K),
    "variational": sk.Variational(**K),
    "variational before": sk.Variational(**K, sample="before"),
    "variational relu_mu": sk.Variational(**K, relu_mu=True),
    "variational input": sk.Variational(**K, variance="input"),
    "variational fixed": sk.Variational(**K, variance="fixed"),
    "top_afa": sk.TopAFA(d_sae=F),
    "relu": sk.ReLU(d_sae=F, l1=0.05),
    "jumprelu": sk.JumpReLU(d_sae=F, l1=0.05, theta=0.1, bandwidth=0.1),
    "jumprelu ema": sk.JumpReLU(d_sae=F, l1=0.05, theta=0.1, bandwidth=0.1, ema=0.9),
    "gated": sk.Gated(d_sae=F, l1=0.05),
    "matryoshka": sk.Matryoshka(**K),
    "matryoshka 3": sk.Matryoshka(**K, widths=(7, 30, F)),
}


def test_every_variant_is_among_the_cases():
    assert {v.name for v in CASES.values()} == set(VARIANTS)


def raw_rows(n: int, seed: int) -> torch.Tensor:
    """Rows that are far from centred and of no special scale."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.randn(40, D, generator=torch.Generator().manual_seed(77))
    strength = torch.rand(n, 40, generator=g) + 0.5
    return 37.0 * ((torch.rand(n, 40, generator=g) < 0.1) * strength) @ truth + 5.0


def trained(variant, steps: int = 40) -> Trainer:
    rows = raw_rows(2048, 0)
    mean_D = rows.mean(0)
    statistics = InputStatistics(mean_D, (rows - mean_D).square().sum(1).mean().item(), rows.norm(dim=1).mean().item())
    trainer = Trainer(variant, D, statistics=statistics, tokens=64 * steps, fit_rows=rows)
    for step in range(steps):
        trainer.step(raw_rows(64, 100 + step))
    return trainer


@pytest.fixture(scope="module")
def finished():
    """`finished(name)`: (trainer, final SAE) of a case, made once; do not change them."""
    made = {}

    def get(name: str):
        if name not in made:
            trainer = trained(CASES[name])
            made[name] = trainer, trainer.finish(None, lambda n: iter(raw_rows(2048, 0).split(500)))
        return made[name]

    return get


def on_integers(sae) -> tuple:
    """A copy whose products are exact in any order, and rows to go with it."""
    g = torch.Generator().manual_seed(5)
    sae = copy.deepcopy(sae)
    for name, low, high in (("W_enc", -3, 4), ("W_dec", -2, 3), ("b_enc", -2, 3), ("b_dec", -2, 3)):
        p = getattr(sae, name).data
        p.copy_(torch.randint(low, high, p.shape, generator=g))
    for name, tensor in sae.extra.items():
        if name == "threshold":
            tensor.copy_(torch.randint(1, 12, tensor.shape, generator=g))
        elif name == "r_mag":
            tensor.zero_()
        elif name == "b_mag":
            tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=g))
    return sae, torch.randint(-4, 5, (24, D), generator=g).float()


@pytest.mark.parametrize("name", CASES)
def test_a_row_is_encoded_alike_alone_and_in_any_batch(name, finished, monkeypatch):
    sae, x_BD = on_integers(finished(name)[1])
    before = {n: t.clone() for n, t in sae.state_dict().items()}
    codes = sae.encode(x_BD)
    dense, out = codes.dense(), sae(x_BD)
    assert 0 < dense.count_nonzero() < dense.numel()
    for i in range(len(x_BD)):
        assert torch.equal(sae.encode(x_BD[i : i + 1]).dense()[0], dense[i])
        assert torch.equal(sae(x_BD[i]), out[i])
    perm = torch.randperm(len(x_BD), generator=torch.Generator().manual_seed(1))
    assert torch.equal(sae.encode(x_BD[perm]).dense(), dense[perm])
    assert torch.equal(sae.encode(torch.cat([x_BD, 9 * x_BD.flip(0)])).dense()[: len(x_BD)], dense)
    # sequences are flattened to tokens first
    for shape in ((4, 6, D), (2, 3, 4, D)):
        assert torch.equal(sae.encode(x_BD.view(shape)).dense(), dense)
        assert torch.equal(sae(x_BD.view(shape)), out.view(shape))
    # in pieces of three rows
    monkeypatch.setattr(sae_module, "PIECE_ELEMENTS", 3 * F)
    assert torch.equal(sae.encode(x_BD).dense(), dense)
    assert all(torch.equal(t, before[n]) for n, t in sae.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_encoding_draws_nothing_and_moves_nothing(name, finished):
    trainer, sae = finished(name)
    x_BD = raw_rows(64, 3)
    state = {n: t.clone() for n, t in trainer.state()[0].items()}
    torch.manual_seed(0)
    one = sae.encode(x_BD).dense()
    torch.manual_seed(1)
    drawn = torch.get_rng_state()
    assert torch.equal(sae.train().encode(x_BD).dense(), one)
    assert torch.equal(sae.eval().encode(x_BD).dense(), one)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(t, state[n]) for n, t in trainer.state()[0].items())
    assert not any(p.requires_grad for p in sae.parameters()) and not one.requires_grad


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_no_rows_give_no_codes(name, finished):
    sae = finished(name)[1]
    assert sae.encode(torch.zeros(0, D)).dense().shape == (0, F)
    assert sae(torch.zeros(0, D)).shape == (0, D) and sae(torch.zeros(2, 0, D)).shape == (2, 0, D)


@pytest.mark.parametrize("name", CASES)
def test_saved_loaded_and_saved_again(name, finished, tmp_path):
    sae = finished(name)[1]
    sae.save(tmp_path / "one")
    assert check_sae(tmp_path / "one") == []
    loaded = sk.SAE.load(tmp_path / "one")
    x_BD = raw_rows(64, 3)
    assert torch.equal(loaded.encode(x_BD).dense(), sae.encode(x_BD).dense())
    assert torch.equal(loaded(x_BD), sae(x_BD))
    assert loaded.extra.keys() == sae.extra.keys()
    for n, tensor in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[n], tensor) and loaded.state_dict()[n].dtype == tensor.dtype
    assert loaded.variant.inference_options() == sae.variant.inference_options()
    assert (loaded.variant.name, loaded.variant.key, loaded.variant.signed) == (
        *(sae.variant.name, sae.variant.key),
        sae.variant.signed,
    )
    loaded.save(tmp_path / "two")
    for file in ("config.json", "sae.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_options_survive_saving(finished, tmp_path):
    """Worked out: what inference needs, and where the thresholds are from."""
    want = {
        "topk multi_k": {"k": 5, "relu": True},
        "abs_topk": {"k": 5},
        "mutual_choice": {"k": 5, "threshold_source": "calibration", "calibration_rows": 2048},
        "feature_choice": {"k": 5, "threshold_source": "calibration", "calibration_rows": 2048},
        "matryoshka": {
            "k": 5,
            "widths": [4, 8, 16, 32, 64],
            "threshold_source": "calibration",
            "calibration_rows": 2048,
        },
        "top_afa": {},
        "relu": {},
        "jumprelu": {},
        "gated": {},
    }
    for name, options in want.items():
        finished(name)[1].save(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["options"] == options, name
        assert config["signed"] is (name == "abs_topk") and config["variant"] == name.split()[0]
    finished("variational input")[1].save(tmp_path / "v")
    options = json.loads((tmp_path / "v" / "config.json").read_text())["options"]
    # prior_std = √(V/k) = √(1/5) in units of the input's spread
    scale = finished("variational input")[0].scale
    assert options.pop("prior_std") == pytest.approx(math.sqrt(1 / 5) / scale, rel=1e-6)
    assert options == {"k": 5, "relu_mu": False, "variance": "input", "log_var_init": -6.0}


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_the_number_of_features_may_be_left_to_the_width(name, tmp_path):
    """d_sae None: 16·D features; what is saved can be read."""
    k: dict[str, Any] = {"k": 2} if "k" in VARIANTS[name].__dataclass_fields__ else {}
    sae = Trainer(VARIANTS[name](**k), 4).sae()
    loaded = sk.SAE.load(sae.save(tmp_path / "sae"))
    assert loaded.d_sae == 64 and check_sae(tmp_path / "sae") == []


@pytest.mark.parametrize("name", CASES)
def test_folded_on_raw_is_unfolded_on_scaled_input(name, finished):
    """In float32: codes ÷ s, the same support but for pairs within rounding of a bar."""
    trainer = finished(name)[0]
    raw_BD = raw_rows(256, 3)
    s = trainer.scale
    assert (s == 1.0) == (CASES[name].normalise == "none")
    outside = trainer.sae().encode(raw_BD).dense()
    folded = copy.copy(trainer)
    folded.scale = 1.0
    inside = folded.sae().encode(raw_BD * s).dense() / s
    differ = (inside != 0) != (outside != 0)
    assert differ.sum() <= 2 and inside.count_nonzero() > 100
    torch.testing.assert_close(outside[~differ], inside[~differ], rtol=1e-4, atol=1e-5 * outside.abs().max().item())


@pytest.mark.parametrize("name", CASES)
def test_folding_is_exact_in_float64(name, finished):
    """1e-12 in float64, for every scale; thresholds per feature, magnitudes and all."""
    trainer = copy.copy(finished(name)[0])
    g = torch.Generator().manual_seed(2)
    wide = {n: p.double() for n, p in trainer.parameters().items()}
    for n, p in wide.items():
        if n in ("b_enc", "b_dec", "r_mag", "b_mag", "W_var"):
            p += 0.05 * torch.randn(p.shape, generator=g, dtype=torch.float64)
    trainer._parameters = wide
    trainer.averages = {n: t.double() for n, t in trainer.averages.items()}
    trainer.buffers = {n: t.double() for n, t in trainer.buffers.items()}
    x_BD = trainer.normalised(raw_rows(256, 3)).double()
    for s in (1 / 37.3, 0.7, 1000.1):
        trainer.scale = s
        folded = trainer.sae()
        trainer.scale = 1.0
        plain = trainer.sae()
        outside, inside = folded.encode(x_BD / s), plain.encode(x_BD)
        assert outside.values.dtype == torch.float64
        assert torch.equal(outside.dense() != 0, inside.dense() != 0)
        biggest = inside.dense().abs().max().item()
        torch.testing.assert_close(outside.dense() * s, inside.dense(), rtol=1e-12, atol=1e-12 * biggest)
        biggest = plain(x_BD).abs().max().item()
        torch.testing.assert_close(folded(x_BD / s) * s, plain(x_BD), rtol=1e-12, atol=1e-12 * biggest)


@pytest.mark.parametrize("variance", ["feature", "input", "fixed"])
def test_the_noise_of_a_folded_variational_sae_is_that_of_training(variance):
    """ρ on raw input equals ρ on scaled input, and σ = prior_std·exp(ρ/2) is σ of training ÷ s."""
    from saekit.step import DenseSlots, Moment, inference_step

    trainer = trained(sk.Variational(**K, variance=variance, log_var_init=-1.0))
    s, raw_BD = trainer.scale, raw_rows(8, 3)
    if variance == "input":
        trainer.parameters()["W_var"].add_(0.1 * torch.randn(F, D, generator=torch.Generator().manual_seed(1)))

    def sigma(sae, x_BD):
        at = Moment(x_BD, sae.b_dec, sae.extra, len(x_BD), F)
        slots = DenseSlots(torch.ones(len(x_BD), F), torch.ones(len(x_BD), F, dtype=torch.bool))
        out = inference_step(slots, at, {**dict(sae.named_parameters()), **sae.extra})
        return sae.variant.prior_std * (sae.variant.log_var(out) / 2).exp()

    folded = trainer.sae()
    trainer.scale = 1.0
    plain = trainer.sae()
    torch.testing.assert_close(sigma(folded, raw_BD) * s, sigma(plain, raw_BD * s), rtol=1e-4, atol=0)


NARROW = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float64: 2**-24}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_changing_the_dtype_rounds_weights_and_codes_and_nothing_else(name, dtype, finished, tmp_path):
    """Against the same SAE, its weights rounded, computed in float64: one rounding of each code is all that is left."""
    sae = sk.SAE.load(finished(name)[1].save(tmp_path / "sae"))
    threshold = sae.extra["threshold"].clone() if "threshold" in sae.extra else None
    changed = sae.to(dtype)
    assert changed is sae and all(p.dtype == dtype for p in sae.parameters())
    if threshold is not None:
        assert torch.finfo(sae.threshold.dtype).bits >= 32 and torch.equal(sae.threshold.to(threshold.dtype), threshold)
    x_BD = raw_rows(256, 3).to(dtype)
    got = sae.encode(x_BD.double())
    assert got.values.dtype == dtype and torch.equal(sae.encode(x_BD).dense(), got.dense())
    assert sae(x_BD).dtype == dtype and sae.decode(got).dtype == dtype
    wide = copy.deepcopy(sae).double()
    want = wide.encode(x_BD.double()).dense()
    differ = (got.dense() != 0) != (want != 0)
    assert differ.sum() <= 1 and want.count_nonzero() > 100
    error = (got.dense().double() - want).abs()[~differ]
    assert (error <= NARROW[dtype] * want.abs()[~differ] + 1e-5 * want.abs().max()).all()


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_float64_is_float64_all_the_way(name):
    """Input 3 + 2⁻⁴⁰, encoder and decoder the identity: that number is the code and comes out again, as float32 could not."""
    k = {"k": 1} if "k" in VARIANTS[name].__dataclass_fields__ else {}
    trainer = Trainer(VARIANTS[name](d_sae=4, b_dec="zero", **k), 4)
    trainer.W_enc.copy_(torch.eye(4)), trainer.W_dec.copy_(torch.eye(4))
    sae = trainer.sae().to(torch.float64)
    x_BD = torch.tensor([[3 + 2.0**-40, 0, 0, 0]], dtype=torch.float64)
    assert sae.encode(x_BD).dense().tolist() == x_BD.tolist() == sae(x_BD).tolist()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_config_agrees_after_a_change_of_dtype(name, dtype, finished, tmp_path):
    sae = sk.SAE.load(finished(name)[1].save(tmp_path / "one"))
    before = sae.fingerprint
    sae.to(dtype).save(tmp_path / "two")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.") and config["fingerprint"] != before
    loaded = sk.SAE.load(tmp_path / "two")
    assert loaded.W_enc.dtype == dtype and loaded.fingerprint == sae.fingerprint
    x_BD = raw_rows(64, 3)
    assert torch.equal(loaded.encode(x_BD).dense(), sae.encode(x_BD).dense())
    assert check_sae(tmp_path / "two") == []


def test_budgets_are_not_rounded_to_the_dtype_of_the_weights(tmp_path):
    """7 tokens of 1,000 each: 0.007 in bfloat16 is 0.0069885…, so that 1,000 of them make 6.99."""
    sae = Trainer(sk.FeatureChoice(k=7, d_sae=1000), 4, tokens=400).sae()
    assert check_sae(sae.to(torch.bfloat16).save(tmp_path / "sae")) == []


@pytest.mark.parametrize("move", ["cpu", "half and back", "double and back"])
@pytest.mark.parametrize("name", ["mutual_choice", "feature_choice", "jumprelu"])
def test_thresholds_come_back_as_they_were(name, move, finished):
    sae = copy.deepcopy(finished(name)[1])
    before = sae.threshold.clone()
    {
        "cpu": lambda: sae.cpu(),
        "half and back": lambda: sae.half().float(),
        "double and back": lambda: sae.double().float(),
    }[move]()
    assert torch.equal(sae.threshold, before) and sae.threshold.dtype == torch.float32


@pytest.mark.parametrize("name", ["mutual_choice", "matryoshka", "feature_choice", "jumprelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_threshold_is_not_rounded_to_the_dtype_of_the_weights(name, dtype):
    """pre = 1 + 2⁻¹², computed in float32; θ = 1 + 1.5·2⁻¹² is above it, but would round to 1."""
    k: dict[str, Any] = {"k": 1} if name != "jumprelu" else {}
    trainer = Trainer(VARIANTS[name](d_sae=2, b_dec="zero", **k), 2)
    sae = trainer.sae()
    sae.W_enc.data.copy_(torch.tensor([[1.0, 2**-12], [1.0, -1.0]]))
    sae.threshold.fill_(1.0 + 1.5 * 2**-12)
    x_BD = torch.ones(1, 2)
    assert sae.encode(x_BD).dense().count_nonzero() == 0
    assert sae.to(dtype).encode(x_BD).dense().count_nonzero() == 0
    # the kernel, called with narrow rows, does not round it either
    rows = x_BD.to(dtype), sae.W_enc, sae.b_enc, sae.b_dec
    assert encode_select(*rows, rule=Threshold(sae.threshold), compute="fp32").codes.values.numel() == 0
    assert encode_select(*rows, rule=Threshold(0.99), compute="fp32").codes.values.numel() == 1


@pytest.mark.parametrize("name", ["mutual_choice", "matryoshka", "feature_choice"])
def test_calibrated_l0_on_fresh_rows(name):
    """Within 2 % of k: thresholds from 8,192 rows, tried on 8,192 others of the same law."""
    trainer = trained(dataclasses.replace(CASES[name], lr=3e-3), steps=300)
    sae = trainer.finish(None, lambda n: iter(raw_rows(8192, 0).split(1000)))
    l0 = sae.encode(raw_rows(8192, 1)).l0().double().mean().item()
    assert l0 == pytest.approx(5, rel=0.02)
    assert sae.encode(raw_rows(8192, 0)).l0().double().mean().item() == pytest.approx(
        5, rel=1e-6 if name != "feature_choice" else 0.01
    )


def test_an_average_of_the_weights_is_what_is_saved():
    """ema 0.9: Σ_t 0.1·0.9^(T−t)·w_t / (1 − 0.9^T), by hand beside the steps; W_dec's rows are at norm 1 again; the
    trainer goes on from the weights themselves."""
    rows = raw_rows(512, 0)
    mean_D = rows.mean(0)
    statistics = InputStatistics(mean_D, (rows - mean_D).square().sum(1).mean().item())
    runs = {
        ema: Trainer(sk.TopK(**K, ema=ema, lr=1e-2), D, statistics=statistics, tokens=64 * 30, fit_rows=rows)
        for ema in (0.0, 0.9)
    }
    history = []
    for step in range(12):
        for trainer in runs.values():
            trainer.step(raw_rows(64, step))
        history.append({n: p.double().clone() for n, p in runs[0.9].parameters().items()})
    weight = [0.1 * 0.9 ** (11 - t) / (1 - 0.9**12) for t in range(12)]
    assert sum(weight) == pytest.approx(1.0)
    want = {n: sum(w * h[n] for w, h in zip(weight, history, strict=True)) for n in history[0]}
    want["W_dec"] /= want["W_dec"].norm(dim=1, keepdim=True)
    sae, s = runs[0.9].sae(), runs[0.9].scale
    for n, divided in (("W_enc", 1), ("W_dec", 1), ("b_enc", s), ("b_dec", s)):
        torch.testing.assert_close(getattr(sae, n).double(), want[n] / divided, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(sae.W_enc, runs[0.9].W_enc, rtol=1e-3)
    for n, p in runs[0.0].parameters().items():
        assert torch.equal(p, runs[0.9].parameters()[n])


def test_an_averaged_threshold_is_0_or_more():
    variant = sk.JumpReLU(d_sae=F, l0=6.0, l1=0.0, bandwidth=0.3, theta=0.02, lr=0.05, ema=0.5)
    trainer = Trainer(variant, D, tokens=64 * 50)
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        trainer.step(torch.randn(64, D, generator=g))
        assert (trainer.sae().threshold >= 0).all()
