"""Collectives, and selection over processes: 2 and 4 of them over gloo give what one gives on the whole batch, to the bit.

This file is a script too: the processes of one group run all cases and leave their results in a folder.

    python test_selection.py FOLDER RANK SIZE

B tokens · D width · F features · R ranks
"""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from saekit_kernels import (
    BatchCount,
    Codes,
    ColumnCount,
    EncodeOut,
    RowCount,
    RowMass,
    Rule,
    Threshold,
    Workspace,
    build_csc,
    encode_select,
)
from torch import Tensor

from saekit.errors import SaekitError
from saekit.ranks import PACKED_BYTES, Ranks
from saekit.selection import encode_select_over

LOST = "a process of torchrun was lost; run the same command again"
D, F = 5, 24


class Inputs(NamedTuple):
    """Small integers: every product is exact, however it is cut into blocks."""

    x_BD: Tensor
    W_enc_FD: Tensor
    b_enc_F: Tensor
    b_in_D: Tensor


class Case(NamedTuple):
    inputs: Inputs
    rule: Rule
    key: str


def integers(B: int, spread: int, seed: int = 0) -> Inputs:
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-spread, spread + 1, shape, generator=random).float()

    return Inputs(draw(B, D), draw(F, D), draw(F), draw(D))


def with_nan(B: int) -> Inputs:
    """Rows 3 and 10 and column 2 are NaN, column 5 is infinite."""
    inputs = integers(B, 9, seed=1)
    inputs.x_BD[3], inputs.x_BD[10], inputs.b_enc_F[2], inputs.b_enc_F[5] = torch.nan, torch.nan, torch.nan, torch.inf
    return inputs


def few_positive(B: int) -> Inputs:
    """Some in twenty: products have a standard deviation of about 95."""
    inputs = integers(B, 9, seed=2)
    inputs.b_enc_F.sub_(150)
    return inputs


INPUTS = {
    "spread": lambda: integers(24, 40),
    "another batch": lambda: integers(24, 40)._replace(x_BD=integers(24, 40, seed=5).x_BD),
    "ties": lambda: integers(24, 1),
    "equal rows": lambda: integers(24, 9)._replace(x_BD=integers(1, 9).x_BD.repeat(24, 1)),
    "nan": lambda: with_nan(24),
    "few positive": lambda: few_positive(24),
    "none positive": lambda: integers(24, 9)._replace(b_enc_F=torch.full((F,), -10_000.0)),
    "13 rows": lambda: integers(13, 3),
    "1 row": lambda: integers(1, 3),
    "no rows": lambda: integers(0, 3),
}

# with both keys and every rule; the others with one key and these rules
FULL = ("ties", "nan")
SOME = (
    *("batch 17", "batch 50 hint", "batch 50 hint 1000000000.0", "column few", "column few hint", "column many"),
    *("column many some hints wrong", "row count", "row mass", "threshold of each"),
)


def rules(inputs: Inputs, key: str) -> dict[str, Rule]:
    B = len(inputs.x_BD)
    random = torch.Generator().manual_seed(3)
    few_F, many_F = (torch.randint(0, top, (F,), generator=random) for top in (5, 2 * B + 2))
    t_B = torch.randint(0, 300, (B,), generator=random).float()
    theta_F = torch.randint(0, 50, (F,), generator=random).float()

    # hints as they come: of a batch before this one
    before = inputs._replace(x_BD=integers(24, int(inputs.x_BD.nan_to_num().abs().max()) if B else 3, seed=7).x_BD)
    hint = encode_select(*before, rule=BatchCount(50), key=key, compute="fp32").hint
    hint_F = encode_select(*before, rule=ColumnCount(few_F), key=key, compute="fp32").hint
    assert hint is not None and hint_F is not None
    some_F = hint_F.clone()
    some_F[::3], some_F[1::6], some_F[2::6], some_F[4::6] = 1e9, torch.nan, torch.inf, -1.0
    return {
        **{f"batch {m}": BatchCount(m) for m in (0, 1, 2, 17, 50, B * F // 2, B * F, B * F + 5)},
        **{f"batch 50 hint {h}": BatchCount(50, h) for h in (0.0, -1.0, 30.0, 1e9, torch.nan, torch.inf)},
        **{f"batch {m} hint": BatchCount(m, hint) for m in (0, 50, B * F // 2)},
        "column few": ColumnCount(few_F),
        "column many": ColumnCount(many_F),
        "column none": ColumnCount(torch.zeros(F, dtype=torch.int64)),
        "column one": ColumnCount(torch.ones(F, dtype=torch.int32)),
        "column few hint": ColumnCount(few_F, hint_F),
        "column many hint": ColumnCount(many_F, hint_F),
        "column few some hints wrong": ColumnCount(few_F, some_F),
        "column many some hints wrong": ColumnCount(many_F, some_F),
        "column few hint 0": ColumnCount(few_F, torch.zeros(F)),
        "row count": RowCount(3),
        "row count all": RowCount(F),
        "row mass": RowMass(t_B),
        "threshold": Threshold(4.0),
        "threshold of each": Threshold(theta_F, margin=2.0),
    }


# pre-activations are the inputs themselves: the worked example
#   pre = [[3, -5,  1, 0.5],   M=3      : row 0 {0: 3}         row 1 {3: 4, 0: 2}            (tie 2,2: smaller feature)
#          [2,  2, -1, 4  ]]   M=4      : row 0 {0: 3}         row 1 {3: 4, 0: 2, 1: 2}
#                              m=1,1,1,1: row 0 {0: 3, 2: 1}   row 1 {1: 2, 3: 4}
EXAMPLE = torch.tensor([[3, -5, 1, 0.5], [2, 2, -1, 4]])
# rows 0 to 4 go to ranks 0, 1, 0, 1, 0 of two, or 0, 1, 2, 3, 0 of four; the first three ones of each column stay
ONES = torch.tensor([[1, 0], [1, 1], [0, 1], [1, 1], [1, 1]], dtype=torch.float32)
BY_HAND = {
    "M=3": (EXAMPLE, BatchCount(3), [{0: 3}, {3: 4, 0: 2}], 2.0, [0, 0, 0]),
    "M=4": (EXAMPLE, BatchCount(4), [{0: 3}, {3: 4, 0: 2, 1: 2}], 2.0, [0, 0, 0]),
    # 3, 1, 0.5, 2, 2 and 4 are positive, four short of ten
    "M=10": (EXAMPLE, BatchCount(10), [{0: 3, 2: 1, 3: 0.5}, {3: 4, 0: 2, 1: 2}], 0.5, [0, 4, 0]),
    "m=1": (
        *(EXAMPLE, ColumnCount(torch.ones(4)), [{0: 3, 2: 1}, {1: 2, 3: 4}]),
        *([3.0, 2.0, 1.0, 4.0], [0, 0, 0]),
    ),
    # two rows at most in a column: 2 + 2 + 2 + 0 pairs asked for, 2 + 1 + 1 there
    "m=2": (
        *(EXAMPLE, ColumnCount(torch.tensor([2, 9, 2, 0])), [{0: 3, 2: 1}, {0: 2, 1: 2}]),
        *([2.0, 2.0, 1.0, 0.0], [0, 2, 0]),
    ),
    "ties of a column": (
        *(ONES, ColumnCount(torch.tensor([3, 3])), [{0: 1}, {0: 1, 1: 1}, {1: 1}, {0: 1, 1: 1}, {}]),
        *([1.0, 1.0], [0, 0, 0]),
    ),
    # row 0, row 1 twice, row 2, the first of row 3
    "ties of the batch": (ONES, BatchCount(5), [{0: 1}, {0: 1, 1: 1}, {1: 1}, {0: 1}, {}], 1.0, [0, 0, 0]),
}


def cases() -> dict[str, Case]:
    found = {}
    for name, make in INPUTS.items():
        for key in ("relu", "abs") if name in FULL else ("relu",):
            inputs = make()
            asked = rules(inputs, key)
            for rule_name in asked if name in FULL else SOME:
                found[f"{name}, {key}, {rule_name}"] = Case(inputs, asked[rule_name], key)
    for name, (pre_BF, rule, *_) in BY_HAND.items():
        n = pre_BF.shape[1]
        found[f"by hand, {name}"] = Case(Inputs(pre_BF, torch.eye(n), torch.zeros(n), torch.zeros(n)), rule, "relu")
    return found


def shares(rank: int) -> dict[str, list[Tensor]]:
    """Tensors of one rank, for the collectives: large and small ones, of every dtype, some that do not lie in one piece."""
    random = torch.Generator().manual_seed(100 + rank)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=random, dtype=dtype)

    large = (2, PACKED_BYTES // 4)
    return {
        "floats": [
            *(draw(*large), draw(3, 2), draw(), draw(0, 4), draw(7), draw(*large).T, draw(6, 4)[:, 1]),
            *(draw(*large, dtype=torch.float64), draw(5, dtype=torch.float64), draw(9).requires_grad_()),
        ],
        "integers": [torch.randint(-(2**40), 2**40, shape, generator=random) for shape in (large, (3,), ())],
        "masks": [torch.rand(shape, generator=random) < 0.2 for shape in ((1000,), (), (0,))]
        + [(torch.rand(20, 30, generator=random) < 0.2).T],
        "ragged": [
            torch.arange(3 * rank, dtype=torch.int32),
            torch.randint(-(2**40), 2**40, (5 - rank,), generator=random),
            torch.empty(0),
            draw(4),
        ],
    }


# What the processes do


def answer(folder: Path, rank: int, size: int):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    ranks = Ranks(rank, size)
    # fresh memory is filled with NaN
    torch.use_deterministic_algorithms(True)
    results: dict = {}
    for i, (name, case) in enumerate(cases().items()):
        rule = RowMass(case.rule.t_B[rank::size]) if isinstance(case.rule, RowMass) else case.rule
        x_BD, *weights = case.inputs
        workspace = Workspace() if i % 2 else None
        out = encode_select_over(
            *(ranks, x_BD[rank::size], *weights),
            rule=rule,
            key=case.key,
            compute="fp32",
            workspace=workspace,
            csc=i % 3 == 0,
        )
        assert (out.csc is not None) == (i % 3 == 0)
        for found, expected in zip(out.csc or (), build_csc(out.codes)):
            same(found, expected, f"{name}: csc of rank {rank}")
        codes = out.codes
        parts = (codes.values, codes.indices, codes.row_ptr, out.threshold, out.hint, out.counters)
        # thousands of small arrays: pickling them as tensors takes seconds
        results[name] = codes.n_features, [None if t is None else t.numpy() for t in parts]
    for name in ("mean_", "sum_"):
        results[name] = shares(rank)["floats"]
        getattr(ranks, name)(results[name])
    given = shares(rank)
    ranks.sum_(given["integers"])
    for mask in given["masks"]:
        ranks.any_(mask)
    results |= {"sum_ of integers": given["integers"], "any_": given["masks"]}
    results["joined"] = [ranks.joined(t) for t in given["ragged"]]
    results["gather"] = ranks.gather({"rank": rank})
    (folder / f"{rank}.pkl").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


def out_of(n_features: int, parts) -> EncodeOut:
    values, indices, row_ptr, threshold, hint, counters = (None if t is None else torch.from_numpy(t) for t in parts)
    return EncodeOut(Codes(values, indices, row_ptr, n_features), None, threshold, hint, counters)  # pyright: ignore


CHILD = """
import os, signal, sys, time
from datetime import timedelta
import torch
import torch.distributed as dist
from saekit.errors import SaekitError
from saekit.ranks import Ranks

store, rank, size, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
store = dist.FileStore(store, size)
store.add("here", 1)
while store.add("here", 0) < size:
    time.sleep(0.05)
timeout = timedelta(seconds=3 if how == "silent" else 600)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
ranks = Ranks(rank, size)
try:
    for n in range(1000):
        ranks.mean_([torch.ones(3), torch.ones(1 << 17)])
        ranks.any_(torch.ones(3, dtype=torch.bool))
        ranks.gather(n)
        ranks.joined(torch.arange(rank))
        if n == 3 and rank == size - 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
except SaekitError as error:
    print(error)
    sys.exit(2)
finally:
    dist.destroy_process_group()
"""


def started(*arguments) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


# What is asked of them


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def answers(request, tmp_path_factory) -> list[dict]:
    """What each rank found."""
    folder = tmp_path_factory.mktemp("selection")
    processes = [started(__file__, folder, rank, request.param) for rank in range(request.param)]
    said = [p.communicate(timeout=300)[1] for p in processes]
    assert all(p.returncode == 0 for p in processes), "\n".join(said)
    return [pickle.loads((folder / f"{rank}.pkl").read_bytes()) for rank in range(request.param)]


def same(found: Tensor | None, expected: Tensor | None, what: str):
    assert (found is None) == (expected is None), what
    if found is not None and expected is not None:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
        assert torch.equal(found.signbit() & ~found.isnan(), expected.signbit() & ~expected.isnan()), (
            f"{what}: sign of 0"
        )


def check_against_whole(outs: list[EncodeOut], whole: EncodeOut, what: str):
    """The ranks' rows, put back in their order, are the whole batch's; all else is the same on every rank."""
    R = len(outs)
    pairs = [out.codes.pairs() for out in outs]
    row = torch.cat([p.row_N * R + r for r, p in enumerate(pairs)])
    feature, value = torch.cat([p.feature_N for p in pairs]), torch.cat([p.value_N for p in pairs])
    order = (row * whole.codes.n_features + feature).argsort()
    for found, expected in zip((row[order], feature[order], value[order]), whole.codes.pairs()):
        same(found, expected, what)
    for r, out in enumerate(outs):
        same(out.threshold, whole.threshold, f"{what}: threshold of rank {r}")
        same(out.hint, whole.hint, f"{what}: hint of rank {r}")
        same(out.counters, whole.counters, f"{what}: counters of rank {r}")
        assert out.codes.batch == len(range(r, whole.codes.batch, R)) and out.codes.is_rowwise == whole.codes.is_rowwise
        if not out.codes.is_rowwise:
            assert (out.codes.values != 0).all() and out.codes.row_ptr is not None
            assert out.codes.row_ptr[-1] == out.codes.values.numel()


@pytest.mark.parametrize("inputs", INPUTS)
def test_the_ranks_together_keep_what_one_keeps(answers, inputs):
    asked = {name: case for name, case in cases().items() if name.startswith(f"{inputs}, ")}
    assert len(asked) >= len(SOME)
    for name, case in asked.items():
        whole = encode_select(*case.inputs, rule=case.rule, key=case.key, compute="fp32")
        check_against_whole([out_of(*found[name]) for found in answers], whole, name)


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(answers, name):
    _, _, rows, threshold, counters = BY_HAND[name]
    outs = [out_of(*found[f"by hand, {name}"]) for found in answers]
    kept = [{} for _ in rows]
    for r, out in enumerate(outs):
        for row, feature, value in zip(*(t.tolist() for t in out.codes.pairs())):
            kept[row * len(outs) + r][feature] = value
        assert out.threshold is not None
        assert out.threshold.tolist() == threshold and out.counters.tolist() == counters
    assert kept == rows


def test_the_cases_meet_what_they_are_for():
    """Ties at the bar on every rank, NaN at the bar, hints that are too high: else the tests above show little."""
    every = cases()

    def whole(name: str) -> tuple[Tensor, Tensor, EncodeOut]:
        """Pre-activations, the threshold in their shape, and what is kept."""
        (x_BD, W_FD, b_F, b_in_D), rule, key = every[name]
        pre_BF = (x_BD - b_in_D) @ W_FD.T + b_F
        out = encode_select(x_BD, W_FD, b_F, b_in_D, rule=rule, key=key)
        assert out.threshold is not None
        return pre_BF, out.threshold.expand_as(pre_BF), out

    # of the pairs at the bar some stay and some go; those that stay are of all four ranks, in a column of two or more
    for name in ("ties, relu, batch 50", "ties, relu, column few"):
        pre_BF, bar_BF, out = whole(name)
        at_bar_BF = (pre_BF == bar_BF) & (bar_BF > 0)
        stays_BF = at_bar_BF & (out.codes.dense() != 0)
        assert at_bar_BF.sum() > stays_BF.sum()
        assert set((stays_BF.nonzero()[:, 0] % 4).tolist()) == {0, 1, 2, 3}

    # two rows and a column of NaN, 2 · 24 + 22; in row order 1 + 1 + 1 + 24 + 6 · 1, and 17 of the 24 of row 10
    pre_BF, bar_BF, out = whole("nan, relu, batch 50")
    assert pre_BF.isnan().sum() == 70 and bar_BF.isnan().all() and out.counters.tolist() == [0, 0, 11]

    _, bar_BF, out = whole("few positive, relu, batch 50 hint")
    assert (bar_BF > 0).all() and 0 < out.counters[1] < 50
    assert whole("none positive, relu, batch 17")[2].counters.tolist() == [0, 17, 0]

    # the hints of a batch before are too high in some columns, not in all
    name = "another batch, relu, column few hint"
    rule = every[name].rule
    assert isinstance(rule, ColumnCount) and rule.hint_F is not None
    short_F = ((whole(name)[0] > rule.hint_F).sum(0) < rule.m_F) & (rule.hint_F > 0)
    assert 0 < short_F.sum() < F


def test_means_and_sums(answers):
    R = len(answers)
    given = [shares(r)["floats"] for r in range(R)]
    for i, parts in enumerate(zip(*given)):
        total = torch.stack([p.detach().double() for p in parts]).sum(0)
        for name, truth in (("sum_", total), ("mean_", total / R)):
            for found in answers:
                result = found[name][i].detach()
                assert result.dtype == parts[0].dtype and result.shape == parts[0].shape
                # numbers of size 1, added R − 1 times
                precision = 1e-6 if result.dtype == torch.float32 else 1e-15
                torch.testing.assert_close(result.double(), truth, rtol=0, atol=4 * R * precision)
                assert torch.equal(result, answers[0][name][i]), "the same bits on every rank"
    for i, parts in enumerate(zip(*(shares(r)["integers"] for r in range(R)))):
        assert all(torch.equal(found["sum_ of integers"][i], torch.stack(parts).sum(0)) for found in answers)


def test_any(answers):
    for i, parts in enumerate(zip(*(shares(r)["masks"] for r in range(len(answers))))):
        truth = torch.stack(parts).any(0)
        assert all(torch.equal(found["any_"][i], truth) for found in answers)
        assert i != 0 or (0 < truth.sum() < truth.numel() and not torch.equal(truth, parts[0]))


def test_joined_and_gathered(answers):
    for i, parts in enumerate(zip(*(shares(r)["ragged"] for r in range(len(answers))))):
        assert all(torch.equal(found["joined"][i], torch.cat(parts)) for found in answers)
        assert all(found["joined"][i].dtype == parts[0].dtype for found in answers)
    assert all(found["gather"] == [{"rank": r} for r in range(len(answers))] for found in answers)


def test_large_tensors_travel_as_they_lie_and_small_ones_together(monkeypatch):
    calls = []
    monkeypatch.setattr(dist, "all_reduce", lambda t, op: calls.append((t.data_ptr(), t.dtype, t.numel())))
    large, almost = torch.ones(PACKED_BYTES // 4), torch.ones(PACKED_BYTES // 4 - 1)
    small = [torch.ones(3, 2), torch.ones(()), torch.ones(5, dtype=torch.float64), torch.ones(2, dtype=torch.int64)]
    Ranks(rank=1, size=2).sum_([small[0], large, *small[1:], almost])
    assert calls[0] == (large.data_ptr(), torch.float32, PACKED_BYTES // 4)
    # 3 · 2 + 1 and the one that is just below
    packed = [(torch.float32, 7 + PACKED_BYTES // 4 - 1), (torch.float64, 5), (torch.int64, 2)]
    assert [call[1:] for call in calls[1:]] == packed


def test_one_process_needs_nobody():
    """No process group exists here."""
    ranks, given = Ranks(), shares(0)
    ranks.mean_(given["floats"])
    ranks.sum_(given["integers"])
    ranks.any_(given["masks"][0])
    for kind, tensors in shares(0).items():
        assert all(torch.equal(a, b) for a, b in zip(given[kind], tensors))
    assert ranks.joined(given["ragged"][1]) is given["ragged"][1] and ranks.gather(3) == [3]
    inputs = integers(24, 9)
    for rule in (BatchCount(50, 3.0), ColumnCount(torch.full((F,), 2)), RowCount(3)):
        out = encode_select_over(ranks, *inputs, rule=rule, key="abs", compute="fp32", workspace=None, csc=True)
        check_against_whole([out], encode_select(*inputs, rule=rule, key="abs", compute="fp32"), str(rule))


@pytest.mark.parametrize(
    ("how", "size", "lines"),
    # a process that says nothing is noticed when the time of the group is up, one that dies at once by its neighbours
    [("killed", 3, 2), ("silent", 2, 1)],
)
def test_a_lost_process_ends_the_others_with_one_line(tmp_path, how, size, lines):
    processes = [started("-c", CHILD, tmp_path / "store", rank, size, how) for rank in range(size)]
    try:
        said = [p.communicate(timeout=60)[0] for p in processes[:-1]]
    finally:
        processes[-1].kill()
        processes[-1].communicate()
    assert [p.returncode for p in processes] == [2] * lines + [-signal.SIGKILL]
    assert said == [f"{LOST}\n"] * lines


@pytest.mark.parametrize("error", [RuntimeError, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError])
def test_every_error_of_a_collective_says_so(monkeypatch, error):
    def fails(*_):
        raise error("Timed out waiting 1800000ms for recv operation to complete")

    for name in ("all_reduce", "all_gather_object", "all_gather"):
        monkeypatch.setattr(dist, name, fails)
    ranks = Ranks(rank=0, size=2)
    for call in (
        lambda: ranks.mean_([torch.ones(3)]),
        lambda: ranks.sum_([torch.ones(PACKED_BYTES)]),
        lambda: ranks.any_(torch.ones(3, dtype=torch.bool)),
        lambda: ranks.joined(torch.ones(3)),
        lambda: ranks.gather(1),
        lambda: ranks.barrier(),
    ):
        with pytest.raises(SaekitError, match=f"^{LOST}$"):
            call()


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
