"""Starts the browser: the line that runs Streamlit on the app, and nothing of the app itself."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from saekit.errors import SaekitError


def find_saes(path: Path) -> list[Path]:
    """SAE folders at `path`: itself, or its direct sub-folders. SaekitError if there is none, or none has an index."""
    if not path.is_dir():
        raise SaekitError(f"no such folder: {path}")
    found = [path] if _is_sae(path) else sorted(p for p in path.iterdir() if _is_sae(p))
    if not found:
        raise SaekitError(f"{path} holds no SAE folder; train one with  saekit train topk ACTS --out {path}/topk")
    if not any((sae / "index" / "manifest.json").is_file() for sae in found):
        raise SaekitError(f"{found[0]} has no index yet: run  saekit index {found[0]}")
    return found


def _is_sae(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["format"] == "saekit-sae"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def command(path: Path, *, host: str, port: int, model: bool, variant_file: Path | None = None) -> list[str]:
    """The Streamlit command line: bound to one address, no questions, no statistics, nothing watched."""
    spec = importlib.util.find_spec("saekit_browser")
    if spec is None or not spec.submodule_search_locations:
        raise SaekitError("the package saekit_browser is not installed; install saekit again")
    main = Path(next(iter(spec.submodule_search_locations))) / "main.py"
    options = {
        "server.address": host,
        "server.port": port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
    }
    # against DNS rebinding: a page of another name that resolves to this address gets no session
    hosts = [("server.allowedHosts", name) for name in dict.fromkeys((host, "127.0.0.1", "localhost"))]
    flags = [word for key, value in [*options.items(), *hosts] for word in (f"--{key}", str(value))]
    rest = [str(path.resolve()), *([] if model else ["--no-model"])]
    if variant_file is not None:
        rest += ["--variant-file", str(variant_file.resolve())]
    return [sys.executable, "-m", "streamlit", "run", str(main), *flags, "--", *rest]


def serve(
    path: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8501,
    model: bool = True,
    variant_file: Path | None = None,
    say: Callable[[str], None] = print,
):
    """Serves the SAEs at `path` until Ctrl-C; `say` gets the address. Raises SaekitError before any server starts if
    there is nothing to show."""
    find_saes(path)
    line = command(path, host=host, port=port, model=model, variant_file=variant_file)
    say(f"saekit browser: http://{host}:{port}   (Ctrl-C ends it)")
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise KeyboardInterrupt("browser closed") from None
    if code:
        raise SaekitError(f"the browser ended with code {code}; is port {port} in use? pass --port")
