"""Environments of their own, made from PyPI by `make test-foreign`: one requirements file each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """`environment("numpy_alone")` → the Python of a new environment that has what the file of that name lists."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if not os.environ.get("SAEKIT_FOREIGN"):
            pytest.skip("needs PyPI; `make test-foreign` runs it")
        if name not in made:
            folder = tmp_path_factory.mktemp("foreign") / name
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [folder / "bin/pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, "-r", HERE / f"{name}.txt"], check=True)
            made[name] = folder / "bin/python"
        return made[name]

    return make
