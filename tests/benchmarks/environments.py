"""Environments of their own for peers, made once under ~/.cache/saekit-benchmarks."""

import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path.home() / ".cache" / "saekit-benchmarks"


def python_of(name: str, without: tuple[str, ...] = ()) -> Path:
    """The interpreter of the environment with what `name`.txt beside this file lists.

    `without`: packages that a requirement pulls in for nothing, and in a build that does not fit torch's.
    """
    requirements, environment = Path(__file__).with_name(f"{name}.txt"), CACHE / name
    ready, wanted = environment / "ready", requirements.read_text()
    if not ready.is_file() or ready.read_text() != wanted:
        shutil.rmtree(environment, ignore_errors=True)
        pip = [environment / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([*pip, "install", "-r", requirements], check=True)
        if without:
            subprocess.run([*pip, "uninstall", "--yes", *without], check=True)
        ready.write_text(wanted)
    return environment / "bin" / "python"
