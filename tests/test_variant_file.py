"""A variant from a file of the user's own, on every verb: one with a rule and values, one whose selection is no rule.

Between two commands the variants are forgotten, as they are between two processes.
"""

import json
import re

import numpy as np
import pytest
import torch

import saekit as sk
from saekit import browse, cli
from saekit.errors import SaekitError
from saekit.variants import VARIANTS
from saekit.variants.files import load_variant_file

SITE = "blocks.0.hook_resid_post"
OWN = '''"""Two variants."""
from dataclasses import dataclass
from typing import ClassVar

from saekit.variants import Counted


@dataclass(frozen=True, kw_only=True)
class NearBest(Counted):
    """c = relu(pre) on the k largest of each row that are at least `ratio` of the largest"""

    name: ClassVar[str] = "near_best"

    ratio: float = 0.5
    """Of the largest."""

    def rule(self, at):
        from saekit_kernels import RowCount

        return RowCount(self.k)

    def values(self, out):
        import torch

        return torch.where(out.pre >= self.ratio * out.pre.amax(1, keepdim=True), out.pre, 0)

    def inference_options(self):
        return {"k": self.k, "ratio": self.ratio}

    @classmethod
    def from_inference_options(cls, options, d_sae):
        return cls(k=options["k"], ratio=options["ratio"], d_sae=d_sae)


@dataclass(frozen=True, kw_only=True)
class Halves(Counted):
    """c = pre, sign kept, on the k/2 largest |pre| of each half of the features"""

    name: ClassVar[str] = "halves"
    key: ClassVar[str] = "abs"

    def select(self, pre_BF):
        import torch

        halves_BHF = pre_BF.unflatten(1, (2, -1))
        at_BHK = halves_BHF.detach().abs().topk(self.k // 2, dim=2).indices
        kept_BHF = torch.zeros_like(halves_BHF, dtype=torch.bool).scatter_(2, at_BHK, True)
        return torch.where(kept_BHF, halves_BHF, 0).flatten(1)
'''
NAMES = ("near_best", "halves")


def forget():
    for name in NAMES:
        VARIANTS.pop(name, None)


@pytest.fixture(autouse=True)
def forgotten():
    yield
    forget()


def run(*argv) -> int:
    """One command, as in a process of its own."""
    forget()
    return cli.main([str(word) for word in argv])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_text):
    """acts/, own.py and an SAE of each variant."""
    root = tmp_path_factory.mktemp("own")
    sk.collect(tiny_model, site=SITE, text=tiny_text, out=root / "acts", context=64, tokens=12_000)
    (root / "own.py").write_text(OWN)
    words = ["--k", "6", "--d-sae", "128", "--batch", "512", "--variant-file", root / "own.py"]
    for name in NAMES:
        assert run("train", name.replace("_", "-"), root / "acts", "--out", root / name, *words) == 0
    forget()
    return root


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_takes_the_file(name, folder, capsys):
    sae, file = folder / name, ("--variant-file", folder / "own.py")
    assert run("index", sae, "--tokens", "4000", *file) == 0
    assert f"next:  saekit browse {sae} --variant-file {folder / 'own.py'}" in capsys.readouterr().out
    assert run("evaluate", sae, "--lm-tokens", "1000", "--json", *file) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["sae"]["variant"] == name and content["sae"]["signed"] == (name == "halves")
    assert set(content["tiers"]) == {"1", "2"} and ("two_sided" in content["tiers"]["1"]["metrics"]) == (
        name == "halves"
    )
    assert run("check", sae, *file) == 0
    assert "SAE is sound" in capsys.readouterr().out
    assert run("feature", sae, "3", *file) == 0
    assert name in capsys.readouterr().out
    # an index is read without its variant
    assert run("feature", sae, "3") == 0 and run("check", sae / "index") == 0


@pytest.mark.parametrize("verb", ["evaluate", "index", "check"])
def test_without_the_file_one_line_says_what_to_pass(verb, folder, capsys):
    sae = folder / "near_best"
    capsys.readouterr()
    assert run(verb, sae) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{sae}: variant near_best is not built in; pass --variant-file with the Python file that defines it" in said
    with pytest.raises(SaekitError, match=r"or call saekit\.variants\.files\.load_variant_file$"):
        sk.SAE.load(sae)


@pytest.mark.parametrize("verb", ["evaluate", "index", "check", "browse"])
def test_a_file_that_is_none_is_named(verb, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(browse.subprocess, "Popen", lambda *_, **__: pytest.fail("a server was started"))
    (tmp_path / "bad.py").write_text("import nothing_here\n")
    for file, message in (
        (tmp_path / "none.py", "no such file: "),
        (tmp_path / "bad.py", ".*bad.py, line 1: ModuleNotFound"),
    ):
        assert run(verb, folder / "near_best", "--variant-file", file) == 2
        assert re.match(f"saekit: {message}", capsys.readouterr().err)


def test_browse_passes_the_file_on(folder, capsys, monkeypatch):
    started = []

    class Server:
        def __init__(self, line, **_):
            started.append(line)

        def wait(self):
            return 0

    monkeypatch.setattr(browse.subprocess, "Popen", Server)
    assert run("index", folder / "halves", "--tokens", "1000", "--variant-file", folder / "own.py") == 0
    monkeypatch.chdir(folder)
    assert run("browse", "halves", "--variant-file", "own.py", "--no-model") == 0
    assert run("browse", "halves") == 0
    with_file, without = (line[line.index("--") + 1 :] for line in started)
    assert with_file == [str(folder / "halves"), "--no-model", "--variant-file", str(folder / "own.py")]
    assert without == [str(folder / "halves")]


def test_from_python(folder, tmp_path):
    load_variant_file(folder / "own.py")
    store = sk.open_store(folder / "acts")
    sae = sk.SAE.load(folder / "near_best")
    assert sae.variant == VARIANTS["near_best"](k=6, ratio=0.5, d_sae=128)
    x_BD = store.read(SITE, 0, 500).float()
    pre_BF = (x_BD - sae.b_dec).double() @ sae.W_enc.double().T + sae.b_enc
    top_BK = pre_BF.topk(6, 1).values
    fired_B = ((top_BK >= 0.5 * top_BK[:, :1]) & (top_BK > 0)).sum(1)
    assert 1 <= fired_B.min() < fired_B.max() == 6
    assert (sae.encode(x_BD).l0() == fired_B).double().mean() > 0.99
    sae.save(tmp_path / "sae")
    l0 = sk.evaluate(sae, store, tiers=(1,)).value("l0")
    assert 1 < l0 < 6
    index = sk.build_index(sae, store, tokens=1000)
    assert index.manifest["variant"] == "near_best" and index.manifest["ragged"]


def test_a_selection_that_is_no_rule(folder, tmp_path):
    """Dense in training, sparse behind it: against the formula in float64."""
    load_variant_file(folder / "own.py")
    store = sk.open_store(folder / "acts")
    sae = sk.SAE.load(folder / "halves")
    assert sae.config["signed"] and sae.variant.dense
    index = sk.build_index(sae, store, tokens=2000)
    rows = np.flatnonzero(store.row_positions() < index.n_tokens)
    x_BD = store.read(SITE, 0, len(rows)).float()
    pre_BF = (x_BD.double() - sae.b_dec.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    size_BHF = pre_BF.abs().unflatten(1, (2, 64))
    bars_BHK = size_BHF.topk(4, 2).values
    # rows in which float32 decides between the third and the fourth of a half
    clear_B = (bars_BHK[..., 2] - bars_BHK[..., 3] > 1e-4).all(1).numpy()
    c_BF = torch.where((size_BHF >= bars_BHK[..., 2:3]).flatten(1), pre_BF, 0).numpy()
    got_NF = np.zeros((index.n_tokens, 128))
    for j in range(128):
        got_NF[index.feature(j).positions, j] = index.feature(j).values
    got_BF = got_NF[store.row_positions()[rows]]
    assert clear_B.mean() > 0.9
    np.testing.assert_allclose(got_BF[clear_B], c_BF[clear_B], rtol=2**-10, atol=1e-4)
    assert (c_BF < 0).any() and (c_BF > 0).any()
    assert ((got_BF[:, :64] != 0).sum(1) == 3).all() and ((got_BF[:, 64:] != 0).sum(1) == 3).all()
    assert index.column("n_neg").tolist() == (got_NF < 0).sum(0).tolist()
    # no token depends on the others
    dense_BF = sae.encode(x_BD[:40]).dense()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae.encode(x_BD[:40][order]).dense(), dense_BF[order])
    torch.testing.assert_close(torch.cat([sae.encode(x_D[None]).dense() for x_D in x_BD[:40]]), dense_BF)
    # what a training step sees is what inference sees: the reconstruction explains most of the variance
    assert sk.evaluate(sae, store, tiers=(1,)).value("fvu") < 0.7
