"""What is not finite stops the run at the next log with one line, and no step is skipped on the way."""

import math
from typing import Any

import pytest
import torch
from saekit_kernels import ExtraRows

from saekit import backward
from saekit.errors import SaekitError
from saekit.trainer import Trainer
from saekit.variants import VARIANTS

D, F, B = 8, 32, 32


def made(name: str, **more) -> Trainer:
    k: dict[str, Any] = {"k": 3} if "k" in VARIANTS[name].__dataclass_fields__ else {}
    return Trainer(VARIANTS[name](d_sae=F, **k), D, tokens=B * 100, **more)


def rows(step: int) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_row_stops_the_run_with_one_line(name, value):
    """Nothing else is raised on the way to the next log, whatever the weights have become; and the flag stays."""
    trainer = made(name)
    for step in range(2):
        trainer.step(rows(step))
    trainer.log()
    bad = rows(2)
    bad[5, 3] = value
    trainer.step(bad)
    for step in range(3, 6):
        trainer.step(rows(step))
    for _ in range(2):
        with pytest.raises(SaekitError, match=r"^loss or gradient norm became infinite or NaN in step 3\b[^\n]*$"):
            trainer.log()


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("parameter", ["W_dec", "W_enc", "b_enc", "b_dec"])
@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_one_infinite_gradient_stops_the_run(name, parameter, micro_batches, monkeypatch):
    """The loss is finite, one number of one gradient is not, in one step: the next log says so; the step was taken."""
    trainer = made(name, micro_batches=micro_batches)
    for step in range(3):
        trainer.step(rows(step))
    before = {n: p.clone() for n, p in trainer.parameters().items()}
    moments = {n: m.clone() for n, (m, _) in trainer.moments.items()}
    real = {road: getattr(backward, road) for road in ("sparse", "dense")}
    for road in real:

        def broken(*args, road=road):
            found = real[road](*args)
            if parameter not in found.gradients:
                # summed by nobody yet: an infinite row that AuxK adds
                segment = next(s for s in found.segments if s.first <= 3 < s.last)
                more = torch.zeros(1, D).index_fill_(1, torch.tensor([5]), math.inf)
                both = (more, 0 * rows(0)[:1]) if parameter == "W_dec" else (0 * rows(0)[:1], more)
                segment.aux = ExtraRows(torch.tensor([3 - segment.first]), *both, torch.zeros(1))
                return found
            found.gradients[parameter].view(-1)[(3 * D + 5) % found.gradients[parameter].numel()] = math.inf
            return found

        monkeypatch.setattr(backward, road, broken)
    named = trainer.step(rows(3))
    monkeypatch.undo()
    assert all(v.isfinite() for v in named.values())
    assert trainer.step_count == 4
    # every parameter took its step, also those whose gradient was sound; no pre-activation is in the window of a θ
    for n in trainer.parameters().keys() - {"threshold"}:
        assert not torch.equal(trainer.parameters()[n], before[n]), n
        assert not torch.equal(trainer.moments[n][0], moments[n]), n
    for step in range(4, 6):
        trainer.step(rows(step))
    where = ", first in the gradient of feature 3;" if parameter in ("W_dec", "W_enc") else ""
    with pytest.raises(SaekitError, match=r"infinite or NaN in step 4\b" + where):
        trainer.log()
    with pytest.raises(SaekitError, match="in step 4"):
        trainer.raise_if_bad()


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_bad_row_at_inference_is_seen_and_leaves_the_others_alone(name):
    trainer = made(name)
    trainer.b_dec.zero_()
    sae = trainer.sae()
    if "threshold" in sae.extra:
        sae.threshold.fill_(0.2)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (6, D), generator=g).float()
    sae.W_enc.data.copy_(torch.randint(-3, 4, (F, D), generator=g))
    good, good_out = sae.encode(x).dense(), sae(x)
    x[2, 5] = math.nan
    others = [0, 1, 3, 4, 5]
    assert torch.equal(sae.encode(x).dense()[others], good[others])
    assert sae(x)[2].isnan().any() and torch.equal(sae(x)[others], good_out[others])


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_huge_and_tiny_inputs_are_no_special_case(name):
    """Activations of 1e15 and of 1e-15, in units of their own spread: finite all the way, and the same SAE."""
    from saekit.trainer import InputStatistics

    seen = []
    for scale in (2.0**50, 2.0**-50):
        x = torch.cat([rows(step) for step in range(8)]) * scale
        statistics = InputStatistics(x.mean(0), (x - x.mean(0)).square().sum(1).mean().item())
        trainer = made(name, statistics=statistics, fit_rows=x)
        for part in x.split(B):
            trainer.step(part)
        trainer.log()
        seen.append(trainer)
    for n, p in seen[0].parameters().items():
        assert torch.equal(p, seen[1].parameters()[n]), n
