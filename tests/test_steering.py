"""Steering: each mode on one position, the same text with and without kept keys and values, costs by hand, refusals."""

import dataclasses
import json
import math
from html.parser import HTMLParser

import pytest
import torch

import saekit as sk
from saekit import cli
from saekit.errors import SaekitError
from saekit.feature_index.render_steering import ablation_html, steering_text
from saekit.steering import Ablation, Change, Intervention, ablate_at, steer

SITE = "blocks.0.hook_resid_post"
PROMPT = "def add(a, b):\n    return"


@pytest.fixture(scope="module", params=["topk", "abs_topk"])
def sae(request, tiny_model, tiny_text, tmp_path_factory):
    """Trained and indexed, one of each kind of code."""
    folder = tmp_path_factory.mktemp("steer")
    store = sk.collect(tiny_model, site=SITE, text=tiny_text, out=folder / "acts", context=64, compute="fp32")
    variant = sk.VARIANTS[request.param](k=4, d_sae=128)
    sae = sk.train(variant, store, out=folder / "sae", epochs=4, batch=512)
    sk.build_index(sae, store)
    return sae


@pytest.fixture(scope="module")
def lm(tiny_model):
    return sk.load_model(str(tiny_model), compute="fp32")


@pytest.fixture(scope="module")
def feature(sae):
    """The one that fires most often."""
    return int(sk.open_index(sae.path).table(sort="-n", limit=1).features[0])


@pytest.fixture(scope="module")
def x_RTD(sae, lm):
    ids = torch.tensor([lm.tokenizer(PROMPT)["input_ids"]] * 3)
    return lm.capture(ids, [SITE])[SITE].float()


def code(sae, x_RTD, feature):
    return sae.encode(x_RTD).dense()[:, feature].view(x_RTD.shape[:2])


def test_each_mode_is_its_formula(sae, x_RTD, feature):
    d, c = sae.W_dec[feature], code(sae, x_RTD, feature)
    assert (c != 0).any() and (c == 0).any()
    amount = torch.tensor([0.0, 2.0, -3.0])
    put = {mode: Intervention(sae, feature, mode, amount)(x_RTD) for mode in ("add", "set", "ablate", "project")}
    along = (x_RTD - sae.b_dec) @ d
    torch.testing.assert_close(put["add"], x_RTD + amount[:, None, None] * d)
    torch.testing.assert_close(put["set"], x_RTD + (amount[:, None] - c)[..., None] * d)
    torch.testing.assert_close(put["ablate"], x_RTD - c[..., None] * d)
    torch.testing.assert_close(put["project"], x_RTD - along[..., None] * d)
    assert ((put["project"] - sae.b_dec) @ d).abs().max() < 1e-4
    # where the feature is silent, to ablate it changes nothing to the bit
    assert torch.equal(put["ablate"][c == 0], x_RTD[c == 0])
    assert put["add"].dtype == x_RTD.bfloat16().dtype or put["add"].dtype == torch.float32
    assert Intervention(sae, feature, "add", amount)(x_RTD.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("mode", ["add", "set", "ablate", "project"])
def test_the_text_is_the_same_without_kept_keys_and_values(sae, lm, feature, mode, temperature):
    options = {"mode": mode, "doses": (-6, 6), "new_tokens": 24, "seeds": (5, 6), "temperature": temperature}
    with_cache, without = (steer(sae, feature, PROMPT, model=lm, cache=cache, **options) for cache in (True, False))
    assert [run.tokens for run in with_cache.runs] == [run.tokens for run in without.runs]
    assert [run.kl for run in with_cache.runs] == pytest.approx([run.kl for run in without.runs], abs=1e-5)
    names = [(run.name, run.seed) for run in with_cache.runs]
    seeds = (5,) if temperature == 0 else (5, 6)
    doses = ("−6", "+6") if mode in ("add", "set") else ("",)
    assert names == [(name, seed) for name in ("baseline", *doses) for seed in seeds]


def test_the_baseline_is_the_models_own_text(sae, lm, feature):
    found = steer(sae, feature, PROMPT, model=lm, temperature=0, new_tokens=12)
    baseline = found.runs[0]
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *lm.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]])
    n = ids.shape[1]
    for _ in range(len(baseline.tokens)):
        ids = torch.cat([ids, lm.logits(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert tuple(ids[0, n:].tolist()) == baseline.tokens
    assert baseline.kl == 0 and baseline.next_tokens == ()
    # exp of the mean surprise at what was written
    logp = lm.logits(ids)[0].log_softmax(-1)[n - 1 : -1]
    assert baseline.perplexity == pytest.approx(math.exp(-logp.gather(1, ids[0, n:, None]).mean()), rel=1e-5)
    assert all(run.kl > 0 for run in found.runs[1:])


def test_costs_and_next_tokens_by_hand(sae, lm, feature):
    found = steer(sae, feature, PROMPT, model=lm, doses=(5,), new_tokens=8, temperature=0)
    run = found.runs[1]
    unit = float(sk.open_index(sae.path).column("q95")[feature])
    assert found.unit == unit
    ids = torch.tensor(
        [[lm.tokenizer.bos_token_id, *lm.tokenizer(PROMPT, add_special_tokens=False)["input_ids"], *run.tokens]]
    )

    def put(x_BTD):
        y = x_BTD + 5 * unit * sae.W_dec[feature]
        y[:, 0] = x_BTD[:, 0]  # BOS was not in the store
        return y

    plain, other = (t[0].double().log_softmax(-1) for t in (lm.logits(ids), lm.replace(ids, SITE, put)))
    kl = (plain.exp() * (plain - other)).sum(-1)[:-1].mean()
    assert run.kl == pytest.approx(kl.item(), rel=1e-4)
    at = ids.shape[1] - len(run.tokens) - 1
    change = (other[at].exp() - plain[at].exp()).abs()
    assert [c.token for c in run.next_tokens] == change.topk(5).indices.tolist()
    for c in run.next_tokens:
        assert (c.before, c.after) == pytest.approx(
            (plain[at, c.token].exp().item(), other[at, c.token].exp().item()), rel=1e-3
        )


def test_a_dose_of_nothing_is_the_baseline_and_a_run_does_not_depend_on_its_neighbours(sae, lm, feature):
    options = {"model": lm, "new_tokens": 16, "temperature": 1.0}
    both = steer(sae, feature, PROMPT, doses=(0, 4), seeds=(1, 2), **options)
    assert both.runs[2].tokens == both.runs[0].tokens and both.runs[2].kl == 0
    alone = steer(sae, feature, PROMPT, doses=(4,), seeds=(2,), **options)
    assert alone.runs[1].tokens == both.runs[5].tokens
    assert both.runs[0].tokens != both.runs[1].tokens
    several = steer(sae, feature, [PROMPT, "import os"], doses=(4,), seeds=(2,), **options)
    assert [one.prompt for one in several] == [PROMPT, "import os"] and several[0] == alone


def test_text_ends_at_the_end_of_text(sae, lm, feature):
    found = steer(sae, feature, PROMPT, model=lm, temperature=0, new_tokens=10, doses=(0,))
    fourth = found.runs[0].tokens[3]
    before, lm.tokenizer.eos_token = lm.tokenizer.eos_token, lm.tokenizer.convert_ids_to_tokens(fourth)
    try:
        assert lm.tokenizer.eos_token_id == fourth
        cut = steer(sae, feature, PROMPT, model=lm, temperature=0, new_tokens=10, doses=(0,))
    finally:
        lm.tokenizer.eos_token = before
    assert cut.runs[0].tokens == found.runs[0].tokens[: found.runs[0].tokens.index(fourth) + 1]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        assert not any(name.startswith("on") or name in ("href", "src") for name, _ in attrs)


def test_it_draws_itself_and_hostile_text_stays_text(sae, lm, feature):
    found = steer(sae, feature, "<script>alert(1)</script> & \u05d0", model=lm, doses=(-4, 4), new_tokens=6)
    html, text = found._repr_html_(), str(found)
    tags = Tags()
    tags.feed(html)
    assert tags.seen <= {"style", "div", "p", "span", "b", "i", "table", "tr", "td", "th", "h2", "h3"}
    assert "<script" not in html and "&lt;script&gt;" in html and html.count("<h3>") == 3
    assert "dose −4" in html and "dose +4" in text and "KL" in text and "next" in text
    assert "\x1b" not in text and "\x1b[1m" in steering_text(found, ansi=True)
    assert json.loads(json.dumps(found.to_dict()))["runs"][1]["dose"] == -4
    run = dataclasses.replace(found.runs[1], text="a\nb\x1b[31m")
    shown = steering_text(dataclasses.replace(found, runs=(run,)))
    assert "    a\n    b\\u001b[31m" in shown


# The command


def test_the_command_says_what_python_says(sae, feature, capsys):
    words = ["steer", str(sae.path), str(feature), "--prompt", PROMPT, "--dose", "-4", "2", "--new-tokens", "8"]
    assert cli.main([*words, "--seeds", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("seed 1") == 3 and "dose −4" in out and "dose +2" in out and f"Feature {feature}" in out
    assert cli.main([*words, "--json", "--no-cache"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    same = steer(sae, feature, PROMPT, doses=(-4, 2), new_tokens=8)
    assert [run["tokens"] for run in found["runs"]] == [list(run.tokens) for run in same.runs]
    assert found["unit"] == same.unit


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["9999", "--prompt", "x"], "feature 9999 does not exist; this SAE has 0 to 127"),
        (["3", "--prompt", ""], "the prompt holds no token; type something"),
        (["3", "--prompt", "x " * 200], "shorten one of them"),
        (
            ["3", "--prompt", "x", "--seed", "9007199254740993"],
            "seed 9007199254740993; it is a number from 0 to 9007199254740991",
        ),
        (["3", "--prompt", "x", "--seeds", "0"], "--seeds 0; it must be at least 1"),
        (["3", "--prompt", "x", "--temperature", "-1"], "temperature = -1; it is 0 or more"),
        (["3", "--prompt", "x", "--new-tokens", "0"], "new_tokens = 0; it must be at least 1"),
        (["3", "--prompt", "x", "--dose", "nan"], "dose nan; it is a finite number"),
        (["3", "--prompt", "x", "--unit", "-2"], "unit = -2; it is a positive number"),
        (["3", "--prompt", "x", "--model", "saekit:demo"], "SAE was trained on weights"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(sae, capsys, words, message):
    assert cli.main(["steer", str(sae.path), *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and said[-1].startswith("saekit: ")


def test_without_an_index_the_unit_must_be_said(sae, lm, feature, tmp_path):
    copy = sk.SAE.load(sae.path)
    copy.save(tmp_path / "sae")
    with pytest.raises(SaekitError, match=r"run  saekit index .*sae  or pass --unit"):
        steer(copy, feature, PROMPT, model=lm)
    assert steer(copy, feature, PROMPT, model=lm, unit=1.5, new_tokens=2).unit == 1.5
    assert steer(copy, feature, PROMPT, model=lm, mode="project", new_tokens=2).unit is None


def test_a_model_that_reads_what_follows_writes_no_text(sae, lm, feature, monkeypatch):
    monkeypatch.setitem(vars(lm), "causal", False)
    with pytest.raises(SaekitError, match="its attention is not causal, so it writes no text"):
        steer(sae, feature, PROMPT, model=lm)


def test_ablating_one_token_by_hand(sae, lm):
    """At one firing of the index: logits without and with x − c · d at that token alone, and nothing of what stands behind."""
    index = sk.open_index(sae.path)
    number = int(index.table(sort="-n", limit=1).features[0])
    example = max((e for s in "+-" for e in index.feature(number).top(8, s)), key=lambda e: e.centre)
    whole = index.window(example.position, None)
    found = ablate_at(sae, number, whole.tokens, whole.centre, model=lm)
    assert found.code == pytest.approx(example.value, rel=2e-3)
    ids = torch.tensor([whole.tokens[: whole.centre + 1].tolist()])
    x_D = lm.capture(ids, [SITE])[SITE][0, -1].float()

    def without(x_RTD):
        y = x_RTD.clone()
        y[0, -1] = x_D - found.code * sae.W_dec[number]
        return y

    before, after = lm.logits(ids)[0, -1].softmax(-1), lm.replace(ids, SITE, without)[0, -1].softmax(-1)
    assert found.kl == pytest.approx(float((before * (before / after).log()).sum()), rel=1e-3, abs=1e-7)
    assert found.kl > 0
    best = (after - before).abs().topk(5).indices.tolist()
    assert [c.token for c in found.next_tokens] == best
    for c in found.next_tokens:
        assert (c.before, c.after) == pytest.approx((float(before[c.token]), float(after[c.token])), rel=1e-4)
    # what follows is not read
    assert ablate_at(sae, number, whole.tokens[: whole.centre + 1], model=lm) == found
    # a feature that is silent there changes nothing
    silent = next(j for j in range(len(index)) if j not in index.at(example.position).features)
    assert (lambda a: (a.code, a.kl))(ablate_at(sae, silent, whole.tokens, whole.centre, model=lm)) == (0, 0)
    with pytest.raises(SaekitError, match="token 999 does not exist"):
        ablate_at(sae, number, whole.tokens, 999, model=lm)
    with pytest.raises(SaekitError, match="feature 128 does not exist; this SAE has 0 to 127"):
        ablate_at(sae, 128, whole.tokens, 0, model=lm)
    if bos := (sae.config["context"] or {})["dropped_ids"]:
        with pytest.raises(SaekitError, match="token 0 is one that the SAE was not trained on"):
            ablate_at(sae, number, [bos[0]], model=lm)


def test_an_ablation_is_drawn_and_says_where_the_index_was_made_otherwise(sae, lm, feature):
    example = next(e for s in "+-" for e in sk.open_index(sae.path).feature(feature).top(1, s))
    found = Ablation(feature, example.value, 0.25, (Change(3, "<b>", 0.5, 0.125),))
    drawn = ablation_html(found, example, 10.0)
    assert "KL 0.250 nats at the next token" in drawn and "&lt;b&gt;" in drawn and "in the index" not in drawn
    assert "in the index its code is" in ablation_html(
        dataclasses.replace(found, code=example.value * 1.2), example, 10.0
    )
    assert "so nothing changes" in ablation_html(dataclasses.replace(found, code=0.0, kl=0.0), example, 10.0)
