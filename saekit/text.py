"""Text sources → documents → sequences of token ids."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

TEST_FOLDERS = {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """One name in ten, the same ones on every machine: sha256 of the name is 0 modulo 10."""
        return int(hashlib.sha256(self.name.encode()).hexdigest(), 16) % 10 == 0


def stdlib_documents(tests: bool = False):
    """Source files of the running interpreter's standard library, in byte order of the path, without repeats.

    Test folders, which Debian and container images lack, are left out unless `tests`.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted((p.relative_to(root).as_posix().encode(), p) for p in root.rglob("*.py"))
    seen = set()
    for name, path in paths:
        parts = name.decode().split("/")
        if "site-packages" in parts or "dist-packages" in parts or (not tests and TEST_FOLDERS & set(parts[:-1])):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            yield Document(name.decode(), text)
