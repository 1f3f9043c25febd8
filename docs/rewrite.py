"""Rewrites what README and docs quote: help texts, between `<!-- help: saekit … -->` and `<!-- end -->`.

make docs            rewrite
docs/rewrite.py --check    say which file is behind, exit code 1
"""

import io
import os
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

from saekit import cli

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- help: saekit((?: [\w-]+)*) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def help_text(words: str) -> str:
    """What `saekit WORDS --help` prints, plain and 100 columns wide."""
    os.environ |= {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    out = io.StringIO()
    with redirect_stdout(out):
        cli.main([*words.split(), "--help"])
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def rewritten(text: str) -> str:
    return BLOCK.sub(lambda m: f"{m[1]}```\n{help_text(m[2])}\n```\n{m[4]}", text)


def main() -> int:
    behind = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        old = path.read_text(encoding="utf-8")
        new = rewritten(old)
        if new != old:
            behind.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    for path in behind:
        print(f"{'behind' if '--check' in sys.argv else 'rewrote'}: {path}")
    return int(bool(behind) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
