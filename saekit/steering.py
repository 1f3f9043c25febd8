"""What one feature does to the text that a language model writes: doses on it, while the model reads and writes.

    found = steer("saes/topk", 123, "The weather is", doses=(-4, 4))
    found                              # draws itself in a notebook: baseline and doses, their cost, the next tokens

With d the feature's decoder row (norm 1), c its code at a token and u its unit, the 95th percentile of its magnitudes:

| mode | x becomes | |
|---|---|---|
| `add` | x + dose · u · d | the direction, whether or not the feature fires |
| `set` | x + (dose · u − c) · d | the code is clamped |
| `ablate` | x − c · d | only where it fires |
| `project` | x − ((x − b_dec) · d) d | nothing of the direction is left |

at every token that the SAE was trained on: BOS and other tokens that were dropped from its store stay as they are. All runs of
a prompt are written side by side with the same random numbers, so that a difference between two is the dose's.

R runs · T tokens · D width · V vocabulary
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from saekit.config import DOSED, LARGEST_SEED, SteerMode
from saekit.errors import SaekitError
from saekit.feature_index.render import visible
from saekit.feature_index.vocabulary import VocabBytes, vocab_bytes
from saekit.model import LanguageModel, load_model
from saekit.provenance import short
from saekit.sae import SAE

if TYPE_CHECKING:
    from saekit.feature_index.reader import FeatureIndex

CHANGED = 5
"""Next tokens that are shown."""


class Change(NamedTuple):
    """One token's probability to be the first that follows the prompt."""

    token: int
    text: str
    """White space where alone, control characters and stray bytes made visible."""
    before: float
    after: float


@dataclass(frozen=True)
class Run:
    """One continuation."""

    dose: float | None
    """In units of the feature; None where the mode has no dose, and for the baseline."""
    baseline: bool
    seed: int
    tokens: tuple[int, ...]
    """What was written, up to and with the end-of-text token."""
    text: str
    kl: float
    """KL(unsteered ‖ steered) in nats, mean over the tokens of prompt and continuation that predict another."""
    perplexity: float
    """exp of the mean surprise of the unsteered model at the continuation."""
    next_tokens: tuple[Change, ...]
    """Those whose probability behind the prompt changed most."""

    @property
    def name(self) -> str:
        """`baseline`, `+4`, `−0.5`, or the mode's own."""
        if self.baseline:
            return "baseline"
        return "" if self.dose is None else f"{self.dose:+g}".replace("-", "−")


@dataclass(frozen=True)
class Steering:
    """A prompt, and how it goes on under each dose. Draws itself in a notebook; `str()` is the text form."""

    sae: str
    feature: int
    label: str
    mode: SteerMode
    unit: float | None
    """Of a dose, in the units of a code; None where the mode has no dose."""
    prompt: str
    temperature: float
    runs: tuple[Run, ...]
    """By dose, the baseline first, then by seed."""

    def __str__(self) -> str:
        from saekit.feature_index.render_steering import steering_text

        return steering_text(self)

    def _repr_html_(self) -> str:
        from saekit.feature_index.render import fragment
        from saekit.feature_index.render_steering import steering_html

        return fragment(steering_html(self))

    def to_dict(self) -> dict:
        """As JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Ablation:
    """What one firing does to the token that follows: the model's next token without and with the feature's part at it."""

    feature: int
    code: float
    """Of the feature where it was taken away, computed now; 0 where it is silent, and then nothing changes."""
    kl: float
    """KL(untouched ‖ ablated) of the next token, in nats."""
    next_tokens: tuple[Change, ...]
    """Those whose probability changed most."""

    def to_dict(self) -> dict:
        """As JSON can hold it."""
        return asdict(self)


@dataclass(frozen=True)
class Intervention:
    """x := f(x) on one feature. `amount`: dose · u of each row of the batch (R); unused where the mode has none."""

    sae: SAE
    feature: int
    mode: SteerMode
    amount: Tensor

    def __call__(self, x_RTD: Tensor) -> Tensor:
        sae, shape = self.sae, x_RTD.shape
        d = sae.W_dec[self.feature].float()
        x = x_RTD.float().to(d.device)
        amount = self.amount.to(d)[:, None]
        if self.mode == "project":
            change = -((x - sae.b_dec.float()) @ d)
        elif self.mode == "add":
            change = amount.expand(shape[:2])
        else:
            change = -self.code(x)
            if self.mode == "set":
                change = change + amount
        return (x + change[..., None] * d).to(x_RTD)

    def code(self, x_RTD: Tensor) -> Tensor:
        """The feature's code at each token (R, T)."""
        codes = self.sae.encode(x_RTD)
        row_N, feature_N, value_N = codes.pairs()
        c = torch.zeros(codes.batch, device=value_N.device)
        mine = feature_N == self.feature
        c[row_N[mine].long()] = value_N[mine].float()
        return c.view(x_RTD.shape[:2])


def steer(
    sae: "SAE | str | Path",
    feature: int,
    prompt: str | Sequence[str],
    *,
    mode: SteerMode = "add",
    doses: Sequence[float] = (-4, 4),
    new_tokens: int = 40,
    seeds: Sequence[int] = (0,),
    temperature: float = 0.8,
    cache: bool = True,
    unit: float | None = None,
    model: "LanguageModel | str | None" = None,
    device: str = "auto",
    force: bool = False,
) -> "Steering | list[Steering]":
    """Continuations of a prompt without and with doses on a feature; a list of them for several prompts.

    `doses` are in units of the feature, `unit` = None: the 95th percentile of its magnitudes in the index of the SAE. A dose
    has a sign. `temperature` = 0 takes the most probable token, for every seed the same. `cache`: keys and values of what has
    been read are kept; the text is the same without, and slower. `model` = None: the one the SAE was trained on, in fp32.

    Raises SaekitError for what cannot be: no such feature or mode, a model of other weights (unless `force`), one that reads
    what follows, a prompt without tokens or too long for the model, no index to take a unit from.
    """
    if not isinstance(sae, SAE):
        sae = SAE.load(sae)
    _check(sae, feature, mode, doses, new_tokens, seeds, temperature)
    index = _index_of(sae)
    if mode in DOSED:
        unit = _unit_of(sae, index, feature) if unit is None else unit
        if not (unit > 0 and np.isfinite(unit)):
            raise SaekitError(f"unit = {unit:g}; it is a positive number")
    else:
        doses, unit = (), None
    lm = _model_of(sae, model, device, force)
    label = index.feature(feature).label if index is not None else ""
    name = index.name if index is not None else str(sae.path or sae.variant.name)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    found = []
    for text in prompts:
        ids = _ids_of(sae, lm, text, new_tokens)
        runs = _runs(sae, lm, feature, mode, unit, ids, doses, new_tokens, seeds, temperature, cache)
        found.append(Steering(name, feature, label, mode, unit, text, temperature, tuple(runs)))
    return found[0] if isinstance(prompt, str) else found


def _check_feature(sae: SAE, feature: int):
    if not 0 <= feature < sae.d_sae:
        raise SaekitError(f"feature {feature} does not exist; this SAE has 0 to {sae.d_sae - 1:,}")


def _check(sae: SAE, feature: int, mode: str, doses, new_tokens: int, seeds, temperature: float):
    _check_feature(sae, feature)
    if mode not in get_args(SteerMode):
        raise SaekitError(f"mode {mode} is not known; choose {', '.join(get_args(SteerMode))}")
    if mode in DOSED and not len(doses):
        raise SaekitError(f"mode {mode} needs a dose; pass for example --dose -4 4")
    for dose in doses:
        if not np.isfinite(dose):
            raise SaekitError(f"dose {dose}; it is a finite number")
    if new_tokens < 1:
        raise SaekitError(f"new_tokens = {new_tokens}; it must be at least 1")
    if not len(seeds):
        raise SaekitError("no seed given; pass at least one")
    for seed in seeds:
        if not 0 <= seed <= LARGEST_SEED:
            raise SaekitError(f"seed {seed}; it is a number from 0 to {LARGEST_SEED}")
    if not (temperature >= 0 and np.isfinite(temperature)):
        raise SaekitError(f"temperature = {temperature:g}; it is 0 or more")


def _index_of(sae: SAE) -> "FeatureIndex | None":
    """The SAE's own index; None where there is none."""
    from saekit.feature_index import open_index

    if sae.path is None or not (sae.path / "index" / "manifest.json").is_file():
        return None
    return open_index(sae.path)


def _unit_of(sae: SAE, index: "FeatureIndex | None", feature: int) -> float:
    if index is None:
        where = sae.path or "SAE"
        raise SaekitError(
            f"no index says how large codes of feature {feature} are; run  saekit index {where}  or pass --unit"
        )
    if index.feature(feature).n == 0:
        raise SaekitError(f"feature {feature} did not fire in the index, so it has no unit; pass --unit")
    return float(index.column("q95")[feature])


def _model_of(sae: SAE, model, device: str, force: bool) -> LanguageModel:
    entry = sae.config.get("model") or {}
    if isinstance(model, LanguageModel):
        lm = model
    elif model is None and not entry.get("id"):
        raise SaekitError(f"{sae.path or 'this SAE'} does not say which language model it belongs to; pass --model")
    else:
        lm = load_model(model or entry["id"], device=device, compute="fp32")
    trained = entry.get("weights_fingerprint")
    if trained and trained != lm.weights_fingerprint and not force:
        raise SaekitError(
            f"SAE was trained on weights {short(trained)}, those of {lm.id} are {short(lm.weights_fingerprint)}; "
            "pass --model, or --force to steer anyway"
        )
    if sae.site is None:
        raise SaekitError(f"{sae.path or 'this SAE'} does not say where in the model it reads")
    width = lm.check_site(sae.site).d
    if width != sae.d_in:
        raise SaekitError(f"SAE expects D = {sae.d_in}, site {sae.site} of {lm.id} has {width}")
    if not lm.causal:
        raise SaekitError(f"{lm.id} cannot be steered: its attention is not causal, so it writes no text")
    return lm


@torch.no_grad()
def ablate_at(
    sae: "SAE | str | Path",
    feature: int,
    ids: Sequence[int],
    at: int = -1,
    *,
    model: "LanguageModel | str | None" = None,
    device: str = "auto",
    force: bool = False,
) -> Ablation:
    """x − c · d at one token of a text, and what that changes in the model's next token behind it. What stands behind `at`
    is not read. Of an example of the index: its sequence up to its strongest token.

        window = index.window(position, None)
        ablate_at("saes/topk", 123, window.tokens, window.centre)

    Raises SaekitError as `steer` does, and for a token on which the SAE was not trained.
    """
    if not isinstance(sae, SAE):
        sae = SAE.load(sae)
    _check_feature(sae, feature)
    ids = [int(t) for t in ids]
    if not -len(ids) <= at < len(ids):
        raise SaekitError(f"token {at} does not exist; the text has {len(ids):,}")
    lm = _model_of(sae, model, device, force)
    ids = ids[: at % len(ids) + 1]
    if ids[-1] in ((sae.config.get("context") or {}).get("dropped_ids") or []):
        raise SaekitError(f"token {len(ids) - 1} is one that the SAE was not trained on")
    if lm.max_context is not None and len(ids) > lm.max_context:
        raise SaekitError(f"the text has {len(ids):,} tokens up to there, {lm.id} reads {lm.max_context:,}")
    assert sae.site is not None
    on_feature, codes = Intervention(sae, feature, "ablate", torch.zeros(1)), []

    def put(x_RTD: Tensor) -> Tensor:
        last = x_RTD[:, -1:]
        codes.append(float(on_feature.code(last.float().to(sae.W_dec.device))))
        return torch.cat([x_RTD[:, :-1], on_feature(last).to(x_RTD.device)], dim=1)

    row_T = torch.tensor([ids])
    plain_V = lm.logits(row_T)[0, -1].float().log_softmax(-1)
    other_V = lm.replace(row_T, sae.site, put)[0, -1].float().log_softmax(-1)
    kl = float((plain_V.exp() * (plain_V - other_V)).sum())
    changes = _changes(plain_V.exp(), other_V.exp(), vocab_bytes(lm.tokenizer, lm.vocab_size) if lm.tokenizer else None)
    return Ablation(feature, codes[0], max(kl, 0.0), changes)


def _changes(before_V: Tensor, after_V: Tensor, vocabulary: VocabBytes | None) -> tuple[Change, ...]:
    """The tokens whose probability changed most."""
    best = (after_V - before_V).abs().topk(min(CHANGED, len(after_V))).indices.tolist()
    return tuple(
        Change(t, f"#{t}" if vocabulary is None else _token_text(vocabulary, t), float(before_V[t]), float(after_V[t]))
        for t in best
    )


def _ids_of(sae: SAE, lm: LanguageModel, prompt: str, new_tokens: int) -> list[int]:
    special = lm.tokenizer_entry()
    if special is None:
        raise SaekitError(f"{lm.id} has no tokenizer, so a prompt cannot be read")
    ids = list(lm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    if not ids:
        raise SaekitError("the prompt holds no token; type something")
    if (sae.config.get("context") or {}).get("prepend_bos") and special["bos"] not in (None, ids[0]):
        ids = [special["bos"], *ids]
    if lm.max_context is not None and len(ids) + new_tokens > lm.max_context:
        raise SaekitError(
            f"the prompt has {len(ids):,} tokens and {new_tokens:,} are to follow, {lm.id} reads {lm.max_context:,}; "
            "shorten one of them"
        )
    return ids


def _runs(sae, lm, feature, mode, unit, ids, doses, new_tokens, seeds, temperature, cache) -> list[Run]:
    """The baseline and every dose, each with every seed, in one batch: equal lengths need no padding."""
    levels: list[float | None] = list(doses) if mode in DOSED else [None]
    seeds = list(seeds)[:1] if temperature == 0 else list(seeds)
    named = [(None, True, seed) for seed in seeds] + [(dose, False, seed) for dose in levels for seed in seeds]
    steered = torch.tensor([not baseline for _, baseline, _ in named])
    amount = torch.tensor([0.0 if dose is None else dose * unit for dose, _, _ in named])
    dropped = torch.tensor((sae.config.get("context") or {}).get("dropped_ids") or [], dtype=torch.int64)

    def change(rows: Tensor | slice) -> Callable[[Tensor, Tensor], Tensor]:
        """What is put in the place of x (R, T, D) at tokens (R, T)."""
        on_feature = Intervention(sae, feature, mode, amount[rows])

        def put(x_RTD: Tensor, ids_RT: Tensor) -> Tensor:
            keep_RT = steered[rows].to(x_RTD.device)[:, None] & ~torch.isin(ids_RT, dropped.to(ids_RT.device))
            return torch.where(keep_RT[..., None], on_feature(x_RTD).to(x_RTD.device), x_RTD)

        return put

    prompt_RT = torch.tensor([ids] * len(named))
    pick = _Sampler([seed for _, _, seed in named], temperature)
    whole_RT = lm.write(prompt_RT, new_tokens, pick, site=sae.site, change=change(slice(None)), cache=cache).cpu()
    eos, prompt_length, found = lm.tokenizer.eos_token_id, len(ids), []
    vocabulary = vocab_bytes(lm.tokenizer, lm.vocab_size)
    for r, (dose, baseline, seed) in enumerate(named):
        written = whole_RT[r, prompt_length:]
        ends = (written == eos).nonzero() if eos is not None else written.new_empty(0, 1)
        length = prompt_length + (int(ends[0]) + 1 if len(ends) else len(written))
        row_T = whole_RT[r : r + 1, :length]
        plain = lm.logits(row_T)[0].float().log_softmax(-1)
        put = change(slice(r, r + 1))
        other = (
            lm.replace(row_T, sae.site, lambda x, t=row_T, put=put: put(x, t.to(x.device)))[0].float().log_softmax(-1)
        )
        kl = float((plain.exp() * (plain - other)).sum(-1)[:-1].mean())
        target = row_T[0, 1:].to(plain.device)
        surprise = -plain[:-1].gather(-1, target[:, None])[prompt_length - 1 :, 0]
        before, after = (t[prompt_length - 1].exp() for t in (plain, other))
        changes = () if baseline else _changes(before, after, vocabulary)
        tokens = tuple(row_T[0, prompt_length:].tolist())
        found.append(
            Run(
                dose,
                baseline,
                seed,
                tokens,
                _text(lm, tokens),
                max(kl, 0.0),
                float(surprise.mean().exp()),
                changes,
            )
        )
    return found


def _text(lm: LanguageModel, tokens: Sequence[int]) -> str:
    return lm.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _token_text(vocabulary: VocabBytes, token: int) -> str:
    return visible(vocabulary.blob[vocabulary.start[token] : vocabulary.start[token + 1]].tobytes())


class _Sampler:
    """The next token of each row, by the inverse of its distribution: rows of equal seed see the same random numbers."""

    def __init__(self, seeds: Sequence[int], temperature: float):
        self.temperature, self.order = temperature, list(dict.fromkeys(seeds))
        self.row = torch.tensor([self.order.index(seed) for seed in seeds])
        self.draws = [torch.Generator().manual_seed(seed) for seed in self.order]

    def __call__(self, logits_RV: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits_RV.argmax(-1)
        share_RV = (logits_RV.double() / self.temperature).softmax(-1).cumsum(-1)
        drawn = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self.draws])[self.row]
        at = torch.searchsorted(share_RV, (drawn.to(share_RV.device) * share_RV[:, -1])[:, None], right=True)[:, 0]
        return at.clamp(max=logits_RV.shape[1] - 1)
