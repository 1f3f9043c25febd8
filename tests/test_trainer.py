"""One step of the Trainer against dense autograd, dead-feature counting, schedule, folding."""

import contextlib
import dataclasses
import math

import pytest
import torch
from saekit_kernels import using

import saekit as sk
from saekit import backward, losses, optim, synthetic
from saekit.errors import SaekitError
from saekit.ranks import Ranks
from saekit.trainer import InputStatistics, Trainer, generator
from saekit.variants import VARIANTS


def dense_gradients(trainer, x_BD, dead=None, top=None):
    """Gradients of L = rec + aux·AuxK by autograd on dense codes, and the losses; `top`: the features of each row (B, k)."""
    W_enc, W_dec, b_enc, b_dec = (
        trainer.parameters()[n].double().clone().requires_grad_() for n in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    x = x_BD.double()
    pre = (x - b_dec) @ W_enc.T + b_enc
    top = pre.detach().topk(trainer.variant.k, 1).indices if top is None else top
    codes = torch.zeros_like(pre).scatter(1, top, pre.relu().gather(1, top))
    residual = x - codes @ W_dec - b_dec
    rec = residual.square().sum() / (len(x) * trainer.total_variance)
    aux = torch.zeros(())
    if dead is not None:
        dead_pre = pre[:, dead].relu()
        k_aux = min(trainer.d_model // 2, len(dead))
        keep = dead_pre.detach().topk(k_aux, 1).indices
        a = torch.zeros_like(dead_pre).scatter(1, keep, dead_pre.gather(1, keep))
        e = residual.detach()
        aux = trainer.variant.aux * (e - a @ W_dec[dead]).square().sum() / (e - e.mean(0)).square().sum()
    grads = torch.autograd.grad(rec + aux, (W_enc, W_dec, b_enc, b_dec))
    named = dict(zip(("W_enc", "W_dec", "b_enc", "b_dec"), grads, strict=True))
    along = (named["W_dec"] * W_dec).sum(1, keepdim=True)
    named["W_dec"] = named["W_dec"] - along * W_dec
    return named, rec.item(), aux.item()


def codes_of(trainer, raw_BD):
    x_BD = trainer.normalised(raw_BD)
    rule = trainer.variant.rule(trainer.moment(x_BD, len(x_BD)))
    return backward.selected(trainer, x_BD, rule, Ranks(), csc=False).codes


@pytest.fixture
def x_BD():
    return torch.randn(96, 16, generator=torch.Generator().manual_seed(3))


def test_gradients_equal_dense_autograd(x_BD, captured_step):
    trainer = Trainer(sk.TopK(k=5, d_sae=64), d_model=16)
    trainer.b_dec.add_(0.1 * torch.randn(16))
    trainer.b_enc.add_(0.1 * torch.randn(64))
    named, got = captured_step(trainer, x_BD)
    expected, rec, _ = dense_gradients(trainer, x_BD)
    assert named["rec"].item() == pytest.approx(rec, rel=1e-5)
    for name, g in expected.items():
        error = (got[name].double() - g).norm() / g.norm()
        assert error < 1e-5, (name, error)


def test_bf16_gradients_are_as_near_as_those_of_eager_bf16(captured_step, bf16_by_default):
    """Each against float64 on its own selection."""
    x_BD = torch.randn(512, 96, generator=torch.Generator().manual_seed(5))
    trainer = Trainer(sk.TopK(k=16, d_sae=1024), d_model=96, fit_rows=x_BD)
    assert trainer.compute == "bf16"
    trainer.b_enc.add_(0.05 * torch.randn(1024))
    with torch.no_grad():
        top = codes_of(trainer, x_BD).indices.long()
    _, got = captured_step(trainer, x_BD)

    leaves = {name: p.clone().requires_grad_() for name, p in trainer.parameters().items()}
    with torch.autocast("cpu", torch.bfloat16):
        pre = torch.nn.functional.linear(x_BD - leaves["b_dec"], leaves["W_enc"], leaves["b_enc"])
        eager_top = pre.topk(16, 1).indices
        codes = torch.zeros_like(pre).scatter(1, eager_top, pre.relu().gather(1, eager_top))
        residual = x_BD - (codes @ leaves["W_dec"]).float() - leaves["b_dec"]
    (residual.square().sum() / (len(x_BD) * trainer.total_variance)).backward()

    truth, eager_truth = (dense_gradients(trainer, x_BD, top=t)[0] for t in (top, eager_top))
    for name, leaf in leaves.items():
        eager = leaf.grad
        if name == "W_dec":
            eager = eager - (eager * trainer.W_dec).sum(1, keepdim=True) * trainer.W_dec
        error = (got[name].double() - truth[name]).norm() / truth[name].norm()
        eager_error = (eager.double() - eager_truth[name]).norm() / eager_truth[name].norm()
        assert 1e-5 < error < 1.1 * eager_error, (name, error, eager_error)


def test_auxk_reaches_every_parameter_of_dead_features_and_nothing_else(x_BD, captured_step):
    trainer = Trainer(sk.TopK(k=3, d_sae=64, dead_after=1000), d_model=16)
    trainer._fit_encoder(x_BD, Ranks())
    dead = torch.tensor([3, 17, 40, 41, 63])
    trainer.b_enc[dead] -= 0.5  # less likely winners, yet positive on some rows
    with torch.no_grad():
        fired = codes_of(trainer, x_BD).fired_F()
    dead = dead[~fired[dead]]
    assert len(dead) >= 2
    trainer.idle_F[dead] = 10_000
    named, got = captured_step(trainer, x_BD)
    assert set(trainer.aux_ids.tolist()) == set(dead.tolist())
    expected, _, aux = dense_gradients(trainer, x_BD, dead)
    assert named["aux"].item() == pytest.approx(aux, rel=1e-4) and aux > 0
    for name, g in expected.items():
        assert (got[name].double() - g).norm() / g.norm() < 1e-5, name
    plain, _, _ = dense_gradients(trainer, x_BD)
    live = torch.ones(64, dtype=torch.bool)
    live[dead] = False
    assert got["W_enc"][dead].norm() > 0 and plain["W_enc"][dead].norm() == 0
    torch.testing.assert_close(got["W_enc"][live].double(), plain["W_enc"][live], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("variant", [sk.TopK(k=3, d_sae=64), sk.Matryoshka(k=3, d_sae=64)], ids=["topk", "matryoshka"])
def test_gradients_in_blocks_or_whole_train_alike(variant, x_BD):
    """Clipping needs whole gradients; a bound that is never reached changes nothing else. Dead features are there."""
    seen = []
    for clip in (None, 1e9):
        trainer = Trainer(dataclasses.replace(variant, dead_after=200, lr=1e-3, clip=clip), d_model=16, tokens=96 * 40)
        assert trainer.gradients_stay_in_blocks == (clip is None)
        assert trainer.nbytes()["gradients"] == (0 if clip is None else 2 * 64 * 16 * 4)
        logs = []
        for i in range(20):
            trainer.step(x_BD * (1 + i % 3))
            logs.append(trainer.log())
        assert any(log.get("aux", 0) > 0 for log in logs)
        seen.append((trainer.parameters(), [log["grad_norm"] for log in logs]))
    for name, p in seen[0][0].items():
        torch.testing.assert_close(p, seen[1][0][name], rtol=1e-4, atol=1e-6)
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-4)


def test_500_steps_end_alike_on_the_fast_path_and_on_the_reference(request):
    """Rounding differs, and with it now and then a choice: less than what another seed changes, in bf16 on the average."""
    truth = synthetic.preset("small", rows=200_000, features=96, width=32, l0=4.0, parents=0).draw()
    fresh = truth.sample(truth.rows, 4096).x_BD

    def end(seed: int, path: str) -> float:
        trainer = Trainer(sk.TopK(k=8, d_sae=192), d_model=32, tokens=500 * 256, seed=seed)
        rows = torch.Generator().manual_seed(seed)
        with using(path) if path else contextlib.nullcontext():
            for _ in range(500):
                first = int(torch.randint(0, truth.rows - 256, (), generator=rows))
                trainer.step(truth.sample(first, 256).x_BD)
        sae = trainer.sae()
        return ((fresh - sae(fresh)).square().sum() / (fresh - fresh.mean(0)).square().sum()).item()

    fast = [end(seed, "") for seed in range(3)]
    slow = [end(seed, "reference") for seed in range(3)]
    request.getfixturevalue("bf16_by_default")
    narrow = [end(seed, "") for seed in range(3)]
    spread = max(fast) - min(fast)
    assert 0 < spread < 0.1 and max(fast) < 0.5
    assert all(abs(a - b) < spread for a, b in zip(fast, slow, strict=True)), (fast, slow)
    assert narrow != fast
    assert abs(sum(narrow) - sum(fast)) / 3 < max(spread, max(narrow) - min(narrow)) < 0.1, (fast, narrow)


def test_auxk_lowers_what_is_left_to_explain(x_BD):
    trainer = Trainer(sk.TopK(k=3, d_sae=64, dead_after=1, aux=1.0, lr=1e-3), d_model=16)
    before = None
    for _ in range(120):
        named = trainer.step(x_BD)
        if "aux" in named:
            before = before or named["aux"].item()
    assert before is not None and named["aux"].item() < before


def test_dead_counting_is_in_tokens_and_a_feature_leaves_when_it_fires():
    # one feature per axis; inputs on axis 0 alone: features 1 to 3 are silent
    trainer = Trainer(sk.TopK(k=1, d_sae=4, dead_after=64, enc_init="tied"), d_model=4)
    trainer.W_dec.copy_(torch.eye(4))
    trainer.W_enc.copy_(torch.eye(4))
    x = torch.zeros(32, 4)
    x[:, 0] = 1.0
    trainer.step(x)
    assert trainer.idle_F.tolist() == [0, 32, 32, 32]
    assert trainer.log()["dead"] == 0
    trainer.step(x)
    assert trainer.log()["dead"] == 3  # 64 tokens
    assert len(trainer.aux_ids) == 0  # the list is rebuilt at steps divisible by 64
    trainer.step_count = 64
    trainer.step(x)
    assert trainer.aux_ids.tolist() == [1, 2, 3]
    y = torch.zeros(32, 4)
    y[:, 2] = 5.0
    trainer.step(y)
    assert trainer.idle_F[2] == 0 and trainer.log()["dead"] == 2


@pytest.mark.parametrize(("micro_batches", "idle"), [(1, 0), (2, 16)])
def test_one_token_is_enough_to_be_alive(micro_batches, idle):
    """Feature 2 fires on token 3 of 32 alone: no token of a later micro-batch than that one, or 16 of them, have passed."""
    trainer = Trainer(sk.TopK(k=1, d_sae=4, dead_after=64, enc_init="tied"), d_model=4, micro_batches=micro_batches)
    trainer.W_dec.copy_(torch.eye(4))
    trainer.W_enc.copy_(torch.eye(4))
    trainer.idle_F.fill_(1000)
    x = torch.zeros(32, 4)
    x[:, 0], x[3, 2] = 1.0, 5.0
    trainer.step(x)
    assert trainer.idle_F.tolist() == [0, 1032, idle, 1032]


def test_no_dead_feature_changes_nothing_to_the_bit(x_BD):
    one, two = (Trainer(sk.TopK(k=4, d_sae=64, aux=aux), d_model=16) for aux in (1 / 32, 0.0))
    for _ in range(3):
        one.step(x_BD), two.step(x_BD)
    assert all(torch.equal(one.parameters()[n], two.parameters()[n]) for n in one.parameters())


def test_perfect_reconstruction_gives_zero_aux_not_nan():
    e = torch.zeros(8, 4)
    assert losses.auxk(e, torch.ones(8, 4)).item() == 0.0


def test_decoder_rows_stay_at_norm_one_and_loss_falls(x_BD):
    trainer = Trainer(sk.TopK(k=4, d_sae=64, lr=3e-3), d_model=16, tokens=96 * 200)
    first = trainer.step(x_BD)["rec"].item()
    for _ in range(199):
        last = trainer.step(x_BD)["rec"].item()
    assert last < 0.6 * first
    torch.testing.assert_close(trainer.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=1e-6)


def test_folded_sae_on_raw_equals_the_trainer_on_scaled_input(x_BD):
    raw = 37.0 * x_BD + 5.0
    statistics = InputStatistics(raw.mean(0), (raw - raw.mean(0)).square().sum(1).mean().item())
    trainer = Trainer(sk.TopK(k=4, d_sae=64), d_model=16, statistics=statistics, tokens=96 * 10)
    assert trainer.total_variance == pytest.approx(1.0)
    for _ in range(5):
        trainer.step(raw)
    inside = codes_of(trainer, raw).dense() / trainer.scale
    outside = trainer.sae().encode(raw).dense()
    assert torch.equal(inside != 0, outside != 0)
    torch.testing.assert_close(outside, inside, rtol=1e-4, atol=1e-4)


def test_nan_stops_the_run_at_the_next_log(x_BD):
    trainer = Trainer(sk.TopK(k=4, d_sae=64), d_model=16)
    trainer.step(x_BD)
    trainer.log()
    bad = x_BD.clone()
    bad[5, 3] = math.nan
    trainer.step(bad)
    trainer.step(x_BD)
    with pytest.raises(SaekitError, match="in step 2, first in the gradient of feature"):
        trainer.log()


def test_wrong_width_and_shape_are_refused(x_BD):
    trainer = Trainer(sk.TopK(k=4, d_sae=64), d_model=16)
    with pytest.raises(SaekitError, match="d_model = 16, the batch has width 8"):
        trainer.step(x_BD[:, :8])
    with pytest.raises(SaekitError, match="flatten"):
        trainer.step(x_BD[None])


def test_k_above_the_number_of_features_is_refused():
    with pytest.raises(SaekitError, match=r"k = 512 exceeds d_sae = 256; lower --k or raise --d-sae"):
        sk.TopK(k=512, d_sae=256)
    with pytest.raises(SaekitError, match="k = 300 exceeds d_sae = 256"):
        Trainer(sk.TopK(k=300), d_model=16)


def test_schedule():
    # 1,000 steps: warm-up over 50, constant, to 0 over the last 200
    assert optim.lr_scale(0, 1000) == pytest.approx(1 / 50)
    assert optim.lr_scale(49, 1000) == optim.lr_scale(799, 1000) == 1.0
    assert optim.lr_scale(900, 1000) == pytest.approx(0.5)
    assert optim.lr_scale(999, 1000) == pytest.approx(1 / 200)
    assert optim.lr_scale(5000, None) == 1.0
    assert optim.default_lr(768, 2**14, 24_000) == optim.default_lr(768, 2**14, None) == pytest.approx(2e-4)
    # a quarter of the features, a quarter of the width, a sixteenth of the steps: 2 · 2 · 4
    assert optim.default_lr(192, 2**12, 1_500) == pytest.approx(2e-4 * 16)
    # shorter than 215 steps it stays: √(24,000/215) = 10.565
    assert optim.default_lr(768, 2**14, 10) == pytest.approx(2e-4 * 10.565, rel=1e-4)
    assert optim.default_lr(64, 64, 10) == 0.01
    # each variant its share of it
    shares = {name: optim.learning_rate(cls(d_sae=2**14), 768, 2**14, None) / 2e-4 for name, cls in VARIANTS.items()}
    assert {name: round(share, 6) for name, share in shares.items() if share != 1} == {
        "relu": 2.0,
        "jumprelu": 0.5,
        "gated": 0.5,
    }
    assert optim.learning_rate(sk.ReLU(d_sae=64, lr=3e-3), 768, 64, None) == 3e-3


def test_generators_of_different_purposes_share_nothing():
    one, two = (torch.randn(4, generator=generator(0, p)) for p in ("decoder", "order"))
    assert not torch.equal(one, two)
    assert torch.equal(one, torch.randn(4, generator=generator(0, "decoder")))


def test_only_fit_fits(x_BD):
    """`tied` is the decoder itself and `kaiming` √(2D/F) of it, whatever rows are given; `fit` is another scale."""
    for enc_init, scale in (("tied", 1.0), ("kaiming", math.sqrt(2 * 16 / 64))):
        trainer = Trainer(sk.TopK(k=4, d_sae=64, enc_init=enc_init), d_model=16, fit_rows=x_BD)
        torch.testing.assert_close(trainer.W_enc, scale * trainer.W_dec)
    fitted = Trainer(sk.TopK(k=4, d_sae=64), d_model=16, fit_rows=x_BD)
    assert not torch.allclose(fitted.W_enc, fitted.W_dec)


def test_an_overflowing_decoder_row_is_named(x_BD):
    trainer = Trainer(sk.TopK(k=4, d_sae=64, lr=1e38), d_model=16)
    trainer.step(x_BD)
    with pytest.raises(SaekitError, match=r"decoder row of feature \d+ overflowed by step 1; .* lower --lr"):
        trainer.log()


def test_what_a_caller_can_get_wrong_is_one_line(x_BD):
    statistics = InputStatistics(x_BD.mean(0), 16.0)
    with pytest.raises(SaekitError, match="micro_batches = 0; it must be at least 1"):
        Trainer(sk.TopK(k=4, d_sae=64), d_model=16, micro_batches=0)
    with pytest.raises(SaekitError, match="normalise = sqrt_d needs the mean norm"):
        Trainer(sk.TopK(k=4, d_sae=64, normalise="sqrt_d"), d_model=16, statistics=statistics)
    with pytest.raises(SaekitError, match="at least one row"):
        Trainer(sk.TopK(k=4, d_sae=64), d_model=16, tokens=960).step(x_BD[:0])
    with pytest.raises(SaekitError, match="95 rows are not divisible by 2 micro-batches"):
        Trainer(sk.TopK(k=4, d_sae=64), d_model=16, micro_batches=2).step(x_BD[:95])


def test_a_loss_cannot_take_a_key_of_the_log(x_BD):
    class Clash(sk.TopK):
        own_losses = True

        def losses(self, out):
            return {"l0": out.values.abs().mean()}

    with pytest.raises(SaekitError, match="topk calls a loss l0, which is a key of the log"):
        Trainer(Clash(k=4, d_sae=64), d_model=16).step(x_BD)


@pytest.mark.parametrize(("steps", "every"), [(50, 1), (600, 6), (6400, 64), (100_000, 64), (None, 64)])
def test_the_list_of_dead_features_is_rebuilt_a_hundred_times_or_every_64_steps(x_BD, steps, every):
    trainer = Trainer(sk.TopK(k=4, d_sae=64), d_model=16, tokens=None if steps is None else 96 * steps)
    trainer.step(x_BD)
    assert trainer.rebuild_every == every


def test_feature_choice_without_a_length_is_calibrated_as_mutual_choice(x_BD):
    def rows(n):
        yield x_BD

    found = []
    for cls in (sk.FeatureChoice, sk.MutualChoice):
        trainer = Trainer(cls(k=4, d_sae=64), d_model=16)
        for _ in range(5):
            trainer.step(x_BD)
        found.append(trainer.finish(None, rows))
    assert torch.equal(found[0].encode(x_BD).dense(), found[1].encode(x_BD).dense())
    assert found[0].encode(x_BD).l0().sum() == 4 * 96
