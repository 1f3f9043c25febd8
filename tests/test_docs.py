"""README and docs say what is true: snippets run, quoted help texts are current, named files exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def swapped(code: str, swaps: dict[str, str]) -> str:
    """The code with what is too large for a test replaced; each of it must be there."""
    for old, new in swaps.items():
        assert old in code
        code = code.replace(old, new)
    return code


def test_quoted_help_is_current():
    result = subprocess.run([sys.executable, "docs/rewrite.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}run  make docs"


def test_the_readme_snippet_runs(tiny_model, tiny_text, tmp_path, monkeypatch):
    """The Python flow of the README, word for word, with a tiny model and text in the place of GPT-2's."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "sk.collect" in block)
    swaps = {
        '"gpt2"': repr(str(tiny_model)),
        "blocks.6.hook_resid_post": "blocks.1.hook_resid_post",
        '"data/*.jsonl"': repr(str(tiny_text)),
        'out="acts/gpt2"': 'out="acts/gpt2", context=64',
        'out="saes/gpt2-topk"': 'out="saes/gpt2-topk", batch=512',
        "sk.TopK(k=32)": "sk.TopK(k=4, d_sae=128)",
    }
    code = swapped(code, swaps)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code, names)
    assert len(names["index"]) == 128
    assert (tmp_path / "saes/gpt2-topk/evaluation.json").is_file()


@pytest.mark.filterwarnings("ignore:a window of")
def test_the_snippet_of_modules_and_streams_runs(tiny_model, tiny_text, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "inputs=batches" in block)
    swaps = {
        '"layers.3"': '"1"',
        '"gpt2"': repr(str(tiny_model)),
        "blocks.6.hook_resid_post": "blocks.1.hook_resid_post",
        '("data/*.jsonl",)': f"({str(tiny_text)!r},), context=64",
        'out="saes/gpt2-streamed"': 'out="saes/gpt2-streamed", batch=512',
        "sk.TopK(k=32)": "sk.TopK(k=4, d_sae=128)",
    }
    code = swapped(code, swaps)
    monkeypatch.chdir(tmp_path)
    import torch

    import saekit as sk

    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU())
    names = {"sk": sk, "module": module, "batches": [torch.randn(16, 3) for _ in range(4)]}
    exec(code, names)
    assert names["store"].rows == 64 and (tmp_path / "saes/gpt2-streamed/config.json").is_file()


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert ((ROOT / path).parent / target).exists(), target


def test_the_file_tree_names_every_module():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in [
        *(ROOT / "saekit").glob("*.py"),
        *(p for p in (ROOT / "saekit").iterdir() if p.is_dir() and p.name != "__pycache__"),
    ]:
        if path.name != "__init__.py":
            assert path.name in readme, path.name
