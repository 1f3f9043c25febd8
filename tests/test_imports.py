"""Imports point one way, saekit_browser → saekit → saekit_kernels, and what must be quick loads no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "saekit_kernels": ROOT / "kernels/saekit_kernels",
    "saekit": ROOT / "saekit",
    "saekit_browser": ROOT / "apps/saekit_browser",
}
FORBIDDEN = {
    "saekit_kernels": {"saekit", "saekit_browser", "streamlit", "transformers", "numpy"},
    "saekit": {"saekit_browser", "streamlit", "triton"},
    "saekit_browser": {"saekit_kernels", "triton", "transformers"},
}


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): names for f in files if (names := imported(f) & FORBIDDEN[package])}
    assert not wrong


def test_only_model_knows_transformers():
    allowed = {
        "model.py",
        "loading.py",
        "train_lm.py",
        "baselines.py",
    }  # the demo's scripts make a model, they do not look inside
    users = {f.name for f in PACKAGES["saekit"].rglob("*.py") if "transformers" in imported(f)}
    assert users <= allowed


def test_no_package_is_called_kernels_or_apps():
    for folder in ("kernels", "apps", "notebooks", "tests"):
        assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "import saekit",
        "import saekit.cli, saekit.config, saekit.variants",
        "import saekit.cli; saekit.cli.main(['--help'])",
    ],
)
def test_no_torch_is_loaded(statement):
    code = f"{statement}; import sys; sys.exit('torch' in sys.modules or 'streamlit' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
