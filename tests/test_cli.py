"""The command line: the whole flow typed, and what bad input gets: one line on stderr, exit code 2, nothing left."""

import json
import re

import pytest

import saekit as sk
from saekit import cli
from saekit.errors import SaekitError

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def acts(tmp_path_factory, tiny_model, tiny_text):
    out = tmp_path_factory.mktemp("cli") / "acts"
    line = ["collect", str(tiny_model), "--site", SITE, "--text", str(tiny_text), "--context", "64", "--out", str(out)]
    assert cli.main(line) == 0
    return out


@pytest.fixture(scope="module")
def sae(tmp_path_factory, acts):
    out = tmp_path_factory.mktemp("cli") / "sae"
    assert (
        cli.main(["train", "topk", str(acts), "--out", str(out), "--k", "4", "--d-sae", "128", "--batch", "512"]) == 0
    )
    return out


@pytest.fixture(scope="module")
def indexed(sae):
    assert cli.main(["index", str(sae)]) == 0
    return sae


def test_the_flow_says_the_next_command(acts, indexed, capsys):
    assert cli.main(["evaluate", str(indexed)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"FVU 0\.\d+.* features silent over [\d,]+ tokens; CE .* nats with the SAE in place", out)
    assert cli.main(["evaluate", str(indexed), "--json", "--tiers", "1"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["format"] == "saekit-evaluation" and set(content["tiers"]) == {"1", "2"}
    assert cli.main(["feature", str(indexed), "5"]) == 0
    assert "5" in capsys.readouterr().out
    for folder, kind in ((acts, "store"), (indexed, "SAE"), (indexed / "index", "index")):
        assert cli.main(["check", str(folder)]) == 0
        assert f"{kind} is sound" in capsys.readouterr().out


def test_one_file_export(indexed, tmp_path, capsys):
    assert cli.main(["feature", str(indexed), "1", "2", "--html", str(tmp_path / "f.html")]) == 0
    page = (tmp_path / "f.html").read_text(encoding="utf-8")
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")


def test_help_of_every_verb(capsys):
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"\n  {verb} " in overview
        assert cli.main([verb, "--help"]) == 0
        assert capsys.readouterr().out.strip()
    assert cli.main(["train", "topk", "--help"]) == 0
    assert "--k " in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"saekit {sk.__version__}\n"


def test_counts_may_be_written_short():
    assert cli._plain_number("--tokens", "10M") == "10000000"
    assert cli._plain_number("--lm-tokens", "1.5k") == "1500"
    assert cli._plain_number("--text", "10M") == "10M"


def collect_line(tmp_path, model, text, site=SITE, out=None):
    return [
        "collect",
        str(model),
        "--site",
        site,
        "--text",
        str(text),
        "--context",
        "64",
        "--out",
        str(out or tmp_path / "new"),
    ]


def copied(sae, tmp_path, **changes):
    """A copy of an SAE folder with entries of config.json changed."""
    loaded = sk.SAE.load(sae)
    loaded.config = {**loaded.config, **changes}
    loaded.save(tmp_path / "other")
    (tmp_path / "other/run.json").write_bytes((sae / "run.json").read_bytes())
    return tmp_path / "other"


# name → (arguments, what the line must say, a file or folder that must not exist afterwards)
def bad_inputs(tmp_path, tiny_model, tiny_text, acts, sae):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"caf\xe9")
    other = {"id": "other", "revision": None, "weights_fingerprint": "sha256:" + "0" * 64, "processing": "raw"}
    new = tmp_path / "new"
    return {
        "unknown verb": (["colect"], "no verb colect; nearest: collect", None),
        "no model": (collect_line(tmp_path, tmp_path / "nowhere", tiny_text), "cannot load model .*nowhere", new),
        "no site": (
            collect_line(tmp_path, tiny_model, tiny_text, "blocks.1.hook_resid_pst"),
            r"no site blocks.1.hook_resid_pst; nearest: .*blocks.1.hook_resid_post",
            new,
        ),
        "layer out of range": (
            collect_line(tmp_path, tiny_model, tiny_text, "blocks.40.hook_resid_post"),
            r"the model has 2 layers \(0 to 1\)",
            new,
        ),
        "no text file": (collect_line(tmp_path, tiny_model, "missing.txt"), "no such file: missing.txt", new),
        "empty text": (
            collect_line(tmp_path, tiny_model, empty),
            r"empty.txt holds no text \(0 non-empty documents\)",
            new,
        ),
        "not UTF-8": (collect_line(tmp_path, tiny_model, binary), "binary.txt: byte 3 is not UTF-8", new),
        "unknown extension": (
            collect_line(tmp_path, tiny_model, tiny_model / "model.safetensors"),
            "cannot read .*known are .txt",
            new,
        ),
        "finished store": (
            collect_line(tmp_path, tiny_model, tiny_text, out=acts),
            "is a finished store .* choose another --out",
            None,
        ),
        "foreign out": (
            collect_line(tmp_path, tiny_model, tiny_text, out=tmp_path),
            "is not empty and not a store; choose another --out",
            None,
        ),
        "no store": (["train", "topk", str(tmp_path), "--out", str(new)], "is not an activation store", new),
        "missing store": (["train", "topk", str(tmp_path / "nope"), "--out", str(new)], "nope", new),
        "k above F": (
            ["train", "topk", str(acts), "--out", str(new), "--k", "512", "--d-sae", "256"],
            r"k = 512 exceeds d_sae = 256; lower --k or raise --d-sae",
            new,
        ),
        "unknown variant": (["train", "topkk", str(acts), "--out", str(new)], "no variant topkk; nearest: topk", new),
        "train into foreign": (
            ["train", "topk", str(acts), "--out", str(tmp_path)],
            "is not empty and not a run",
            None,
        ),
        "other model": (
            ["evaluate", str(copied(sae, tmp_path, model=other))],
            "SAE was trained on weights sha256:00000000..., .* holds sha256:",
            None,
        ),
        "index of other model": (
            ["index", str(tmp_path / "other")],
            "SAE was trained on weights",
            tmp_path / "other/index",
        ),
        "no SAE": (["evaluate", str(tmp_path / "none")], "no such SAE folder", None),
        "not an SAE": (["evaluate", str(acts)], "is not an SAE folder", None),
        "no index": (["feature", str(tmp_path / "other"), "3"], "has no index yet: run  saekit index", None),
        "browse without index": (["browse", str(tmp_path / "other")], "has no index yet: run  saekit index", None),
        "browse nothing": (["browse", str(tmp_path / "none")], "no such folder", None),
        "browse an empty folder": (["browse", str(tiny_model)], "holds no SAE folder", None),
        "demo into foreign": (["demo", "--no-browser", "--out", str(tiny_model)], "is not empty and not a demo", None),
        "check nothing": (["check", str(tmp_path / "none")], "none", None),
    }


NAMES = (
    "unknown verb",
    "no model",
    "no site",
    "layer out of range",
    "no text file",
    "empty text",
    "not UTF-8",
    "unknown extension",
    "finished store",
    "foreign out",
    "no store",
    "missing store",
    "k above F",
    "unknown variant",
    "train into foreign",
    "other model",
    "index of other model",
    "no SAE",
    "not an SAE",
    "no index",
    "browse without index",
    "browse nothing",
    "browse an empty folder",
    "demo into foreign",
    "check nothing",
)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_gets_one_line_and_exit_code_2(name, tmp_path, tiny_model, tiny_text, acts, sae, capsys):
    cases = bad_inputs(tmp_path, tiny_model, tiny_text, acts, sae)
    assert set(cases) == set(NAMES)
    argv, message, absent = cases[name]
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    capsys.readouterr()
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert re.search(message, err), err
    assert absent is None or not absent.exists()
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_feature_out_of_range_and_wrong_options(indexed, acts, tmp_path, capsys):
    assert cli.main(["feature", str(indexed), "999999"]) == 2
    assert "feature 999,999 does not exist; this SAE has 0 to 127" in capsys.readouterr().err
    assert cli.main(["train", "topk", str(acts), "--out", str(tmp_path / "x"), "--kk", "3"]) == 2
    assert not (tmp_path / "x").exists()


def test_ctrl_c_is_130(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt("stopped after step 8 of 20, saved; the same command continues")

    monkeypatch.setitem(cli.VERBS, "train", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "saekit: stopped after step 8 of 20, saved; the same command continues\n"


def test_a_damaged_sae_is_named(sae, tmp_path, capsys):
    import shutil

    shutil.copytree(sae, tmp_path / "sae", ignore=shutil.ignore_patterns("index", "checkpoints"))
    weights = tmp_path / "sae/sae.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-3] ^= 0xFF
    weights.write_bytes(blob)
    assert cli.main(["check", str(tmp_path / "sae")]) == 2
    assert "sae.safetensors" in capsys.readouterr().err
    weights.write_bytes(blob[:-8])
    with pytest.raises(SaekitError, match="bytes, config.json says"):
        sk.SAE.load(tmp_path / "sae")
