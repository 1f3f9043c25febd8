# tyro reads annotations at run time, and importing it waits until a verb is parsed:
# pyright: reportInvalidTypeForm=false
"""The command line: one short function per verb; the only place that prints, or turns an error into one line.

Exit codes: 0 done, 2 one line of SaekitError, 130 Ctrl-C, 143 SIGTERM. Options are the dataclasses of config.py and of the
variants, read by tyro; nothing here imports torch before a verb runs.
"""

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from saekit.errors import SaekitError

HELP = """saekit: sparse autoencoders from text to browser

usage: saekit VERB [options]        saekit VERB --help

  collect  MODEL --site S --text T --out ACTS   text → activation store
  train    VARIANT ACTS --out SAE               store → sparse autoencoder
  evaluate SAE                                  held-out error, sparsity, what the language model loses
  index    SAE                                  every firing of every feature, for looking at
  browse   PATH                                 the features in the browser
  feature  SAE 123                              one feature in the terminal
  check    PATH                                 integrity of a store, an SAE folder or an index
  demo                                          all of it on the bundled language model, offline, in minutes

  a first try:  saekit demo
"""


def entry():
    sys.exit(main(sys.argv[1:]))


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if argv[0] == "--version":
        import saekit

        print(f"saekit {saekit.__version__}")
        return 0
    try:
        verb = VERBS.get(argv[0])
        if verb is None:
            raise SaekitError(f"no verb {argv[0]}; {_nearest(argv[0], VERBS)}")
        verb([_plain_number(argv[i - 1], word) for i, word in enumerate(argv) if i > 0])
        return 0
    except SaekitError as error:
        print(f"saekit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"saekit: {stop or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as stop:
        if message := getattr(stop, "message", None):
            print(f"saekit: {message}", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 2 if stop.code else 0


def _nearest(word: str, names) -> str:
    close = difflib.get_close_matches(word, list(names), 1)
    return f"nearest: {close[0]}" if close else f"there are {', '.join(names)}"


def _plain_number(option: str, word: str) -> str:
    """`--tokens 10M` is 10,000,000."""
    match = re.fullmatch(r"([\d_.]+)([kKMG])", word) if option.endswith("tokens") else None
    return str(round(float(match[1]) * {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[match[2]])) if match else word


def _parse(function: Callable, argv: list[str], prog: str):
    import tyro

    summary = (inspect.getdoc(function) or "").split("\n\n")[0]
    return tyro.cli(function, args=argv, prog=prog, description=summary, config=(tyro.conf.OmitArgPrefixes,))


def _positional(kind, metavar: str):
    import tyro

    return Annotated[kind, tyro.conf.Positional, tyro.conf.arg(metavar=metavar)]


def collect(argv: list[str]):
    from saekit.config import CollectOptions

    def parse(model: _positional(str, "MODEL"), *, out: Path, collecting: CollectOptions):
        """Runs a language model over text and writes the activations of one or several sites to disk.

        Args:
            model: A hub name, a local folder in Hugging Face format, a .gguf file, or saekit:demo.
            out: Folder of the new store.
        """
        return model, out, collecting

    model, out, options = _parse(parse, argv, "saekit collect")
    from saekit.collector import collect as collect_
    from saekit.collector import report

    store = collect_(model, out=out, **vars(options))
    if os.environ.get("RANK", "0") != "0":
        return
    next_step = f"saekit train topk {out} --out saes/{out.name}-topk"
    if len(store.sites) > 1:
        next_step += f" --site {store.sites[0]}"
    print(f"{report(store)}\n{store.rows:,} rows of {store.n_tokens:,} tokens in {out}\nnext:  {next_step}")


def train(argv: list[str]):
    from saekit.variants import VARIANTS

    names = [name.replace("_", "-") for name in VARIANTS]
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: saekit train VARIANT STORE --out SAE [options]\n"
            "       saekit train VARIANT --stream MODEL --site SITE --text SOURCE --out SAE [options]\n\n"
            f"variants: {', '.join(names)}\n\nsaekit train topk --help lists the options"
        )
        return
    if argv[0] not in names:
        raise SaekitError(f"no variant {argv[0]}; {_nearest(argv[0], names)}")
    from saekit.config import RunOptions, StreamOptions

    Variant = VARIANTS[argv[0].replace("-", "_")]

    def parse(
        store: _positional(Path | None, "ACTS") = None,
        *,
        out: Path,
        variant: Variant,
        run: RunOptions,
        stream: StreamOptions,
    ):
        return store, out, variant, run, stream

    parse.__doc__ = f"""{(Variant.__doc__ or "").splitlines()[0]}

    Args:
        store: Activation store, from saekit collect; none with --stream.
        out: Folder of the new SAE; an unfinished run there continues.
    """
    store, out, variant, options, stream = _parse(parse, argv[1:], f"saekit train {argv[0]}")
    from saekit.run import Run, open_source

    run = Run(variant, open_source(store, stream, out, options), out, options)
    run.train()
    elsewhere = " --store ACTS" if store is None else ""
    print(f"{run.summary()}\nnext:  saekit evaluate {out}{elsewhere}   and   saekit index {out}{elsewhere}")


def evaluate(argv: list[str]):
    from saekit.config import EvaluateOptions

    def parse(sae: _positional(Path, "SAE"), *, measuring: EvaluateOptions, json: bool = False):
        """Measures an SAE on held-out text.

        Args:
            sae: SAE folder.
            json: Print evaluation.json instead of the table.
        """
        return sae, measuring, json

    sae, options, as_json = _parse(parse, argv, "saekit evaluate")
    from saekit.evaluation import evaluate as evaluate_

    evaluation = evaluate_(sae, **vars(options))
    if as_json:
        from saekit.store.format import pretty_json

        print(pretty_json(evaluation.content).decode(), end="")
    else:
        print(evaluation)


def index(argv: list[str]):
    from saekit.config import IndexOptions

    def parse(sae: _positional(Path, "SAE"), *, indexing: IndexOptions):
        """Encodes a store and writes the feature index: every firing of every feature.

        Args:
            sae: SAE folder; the index goes to its sub-folder index/.
        """
        return sae, indexing

    sae, options = _parse(parse, argv, "saekit index")
    from saekit.feature_index import build_index

    found = build_index(sae, **vars(options))
    m = found.manifest
    print(f"{m['Z']:,} firings of {m['F']:,} features on {m['E']:,} tokens\nnext:  saekit browse {sae}")


def browse(argv: list[str]):
    def parse(path: _positional(Path, "PATH"), *, host: str = "127.0.0.1", port: int = 8501, model: bool = True):
        """Opens the features of an SAE, or of a folder of SAEs, in the browser.

        Args:
            path: SAE folder, or a folder that holds several.
            host: Address to listen on.
            port: Port to listen on.
            model: Offer the panels that need the language model.
        """
        return path, host, port, model

    path, host, port, model = _parse(parse, argv, "saekit browse")
    from saekit.browse import serve

    serve(path, host=host, port=port, model=model, say=lambda line: print(line, file=sys.stderr, flush=True))


def feature(argv: list[str]):
    def parse(
        sae: _positional(Path, "SAE"),
        number: _positional(tuple[int, ...], "NUMBER"),
        *,
        html: Path | None = None,
        view: Literal["top", "quantiles", "random", "near"] = "top",
        zoom: Literal["stacked", "snippet", "full"] = "snippet",
    ):
        """Shows features in the terminal, or writes them as one HTML file.

        Args:
            sae: SAE folder with an index.
            number: One or several features.
            html: Write one self-contained HTML file instead.
            view: Which examples.
            zoom: How much text the HTML file shows around each of them.
        """
        return sae, number, html, view, zoom

    sae, numbers, html, view, zoom = _parse(parse, argv, "saekit feature")
    if not numbers:
        raise SaekitError(f"no feature named; for example  saekit feature {sae} 123")
    from saekit.feature_index import open_index
    from saekit.feature_index.render import page_html

    index = open_index(sae)
    features = [index.feature(number) for number in numbers]
    if html is None:
        print("\n\n".join(one.text(view, color=sys.stdout.isatty()) for one in features))
        return
    html.write_text(page_html(features, view, zoom), encoding="utf-8")
    print(f"{len(features)} feature{'s' if len(features) > 1 else ''} in {html}")


def check(argv: list[str]):
    def parse(
        path: _positional(Path, "PATH"),
        *,
        quick: bool = False,
        repair: bool = False,
        recompute: int = 0,
        model: str | None = None,
        device: str = "auto",
    ):
        """Checks a store, an SAE folder or an index against its own manifest: sizes, checksums, shapes, values.

        Args:
            path: Folder to check.
            quick: Sizes and headers only.
            repair: Compute the damaged shards of a store again; they must come out bit for bit.
            recompute: Compute so many random sequences of a store again and compare.
            model: Language model for repair and recompute; None = the one the store was collected from.
            device: Where it runs; bytes are equal only on the kind of device the store was made on.
        """
        return path, quick, repair, recompute, model, device

    path, quick, repair, recompute, model, device = _parse(parse, argv, "saekit check")
    manifest = path / "manifest.json"
    if (path / "config.json").is_file() or (path / "run.json").is_file():
        from saekit.sae import check_sae

        kind, problems = "SAE", check_sae(path)
    elif manifest.is_file() and '"saekit-index"' in manifest.read_text(encoding="utf-8"):
        from saekit.feature_index import open_index

        kind, problems = "index", open_index(path).check()
    else:
        from saekit.store import check as check_store

        kind = "store"
        if repair:
            from saekit.recompute import repair as repair_

            for name in repair_(path, model, device=device):
                print(f"{name} is restored")
        problems = check_store(path, quick=quick)
        if recompute and not problems:
            from saekit.recompute import recompute as recompute_

            problems = recompute_(path, recompute, model, device=device)
    if kind != "store" and (repair or recompute):
        raise SaekitError(f"{path} is an {kind}; --repair and --recompute are for activation stores")
    if problems:
        raise SaekitError(f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}: " + "; ".join(problems))
    print(f"{path}: {kind} is sound")


def demo(argv: list[str]):
    def parse(*, out: Path = Path("demo"), browser: bool = True, port: int = 8501):
        """All of it on the bundled language model, offline: collect, train, index, evaluate, then the browser.

        Args:
            out: Folder for the store (acts/) and the SAE (saes/topk/); what is finished there is not done again.
            browser: Open the browser at the end.
            port: Port of the browser.
        """
        return out, browser, port

    out, browser, port = _parse(parse, argv, "saekit demo")
    from saekit.demo.flow import run_demo

    run_demo(out, say=lambda line: print(line, flush=True))
    if browser:
        browse([str(out / "saes"), "--port", str(port)])


VERBS = {f.__name__: f for f in (collect, train, evaluate, index, browse, feature, check, demo)}
