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
from functools import partial
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
  compare  SAE SAE ...                          what was measured of several, side by side
  steer    SAE 123 --prompt TEXT                what the model writes with doses of a feature
  check    PATH                                 integrity of a store, an SAE folder or an index
  doctor                                        versions, devices, kernels, a self-test: for a bug report
  demo                                          all of it on the bundled language model, offline, in minutes

  a first try:  saekit demo
"""

TRAIN_HELP = """usage: saekit train VARIANT STORE --out SAE [options]
       saekit train VARIANT --stream MODEL --site SITE --text SOURCE --out SAE [options]
       saekit train sweep FILE.toml STORE --out DIR [options]

variants: {variants}

saekit train topk --help lists the options, saekit train sweep --help those of several SAEs in one pass;
torchrun --nproc-per-node N -m saekit train ... uses N processes
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

    argv, file = _taken(argv, "--variant-file")
    first = os.environ.get("RANK", "0") == "0"
    try:
        _register(Path(file) if file is not None else None)
        names = [name.replace("_", "-") for name in VARIANTS]
        if not argv or argv[0] in ("-h", "--help"):
            print(TRAIN_HELP.format(variants=", ".join(names)), end="")
            return
        if argv[0] not in (*names, "sweep"):
            raise SaekitError(f"no variant {argv[0]}; {_nearest(argv[0], [*names, 'sweep'])}")
        parse = _parse_sweep if argv[0] == "sweep" else _parse_variant
        variant, store, out, options, stream, dry = parse(argv[0], argv[1:])
    except SaekitError:
        # every process of torchrun finds the same, and the first one says it
        if not first:
            raise SystemExit(2) from None
        raise
    if dry:
        from saekit.dry_run import dry_run

        table = dry_run(variant, store, out=out, stream=stream, **vars(options))
        if first:
            print(table)
        return
    from saekit.run import train as train_
    from saekit.run_folder import summary

    train_(variant, store, out=out, stream=stream, **vars(options))
    if not first:
        return
    elsewhere = (" --store ACTS" if store is None else "") + (f" --variant-file {file}" if file else "")
    if isinstance(variant, dict):
        for name in variant:
            print(f"{name}: {summary(out / name)}")
        print(f"next:  saekit evaluate {out / next(iter(variant))}{elsewhere}")
    else:
        print(f"{summary(out)}\nnext:  saekit evaluate {out}{elsewhere}   and   saekit index {out}{elsewhere}")


def _parse_variant(name: str, argv: list[str]):
    from saekit.config import RunOptions, StreamOptions
    from saekit.variants import VARIANTS

    Variant = VARIANTS[name.replace("-", "_")]

    def parse(
        store: _positional(Path | None, "ACTS") = None,
        *,
        out: Path,
        dry_run: bool = False,
        variant_file: Path | None = None,
        variant: Variant,
        run: RunOptions,
        stream: StreamOptions,
    ):
        return variant, store, out, run, stream, dry_run

    parse.__doc__ = f"""{(Variant.__doc__ or "").splitlines()[0]}

    Args:
        store: Activation store, from saekit collect; none with --stream.
        out: Folder of the new SAE; an unfinished run there continues.
        dry_run: Say what the run would take, from a few steps; write nothing.
        variant_file: Python file that defines the variant.
    """
    return _parse_train(parse, name, argv, (Variant, RunOptions, StreamOptions))


def _parse_sweep(name: str, argv: list[str]):
    from saekit.config import RunOptions, StreamOptions
    from saekit.sweep import read_sweep

    file = next((word for word in argv if word.endswith(".toml")), None)
    if file is None and not {"-h", "--help"} & set(argv):
        raise SaekitError("no sweep file named, it ends in .toml: saekit train sweep FILE.toml STORE --out DIR")
    sweep = read_sweep(Path(file)) if file is not None else None
    defaults = RunOptions(**sweep.options) if sweep else RunOptions()
    stream_defaults = StreamOptions(**sweep.stream) if sweep else StreamOptions()

    def parse(
        file: _positional(Path, "FILE.toml"),
        store: _positional(Path | None, "ACTS") = None,
        *,
        out: Path,
        dry_run: bool = False,
        variant_file: Path | None = None,
        run: RunOptions = defaults,
        stream: StreamOptions = stream_defaults,
    ):
        """Trains several SAEs in one pass over the rows; each is the one it would be alone.

        Args:
            file: The SAEs and what is common to them (docs/training.md); an option typed here goes before [common].
            store: Activation store, from saekit collect; none with --stream.
            out: Folder that gets a folder for each SAE; unfinished ones there continue, finished ones are left alone.
            dry_run: Say what the run would take, from a few steps; write nothing.
            variant_file: Python file that defines a variant.
        """
        return sweep.variants if sweep else {}, store, out, run, stream, dry_run

    return _parse_train(parse, name, argv, (RunOptions, StreamOptions))


def _parse_train(parse: Callable, name: str, argv: list[str], classes: tuple[type, ...]):
    """As `_parse`, with one line for what does not fit: an unknown option gets the nearest one."""
    import dataclasses
    import io
    from contextlib import redirect_stderr

    from saekit.sweep import no_option

    known = ["out", "dry_run", "variant_file", *(field.name for cls in classes for field in dataclasses.fields(cls))]
    for word in argv:
        option = word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and option.removeprefix("no_") not in (*known, "help"):
            message = no_option(name, option, known, "--")
            raise SaekitError(message + ("" if ";" in message else f"; saekit train {name} --help lists them"))
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return _parse(parse, argv, f"saekit train {name}")
    except SystemExit as stop:
        if not stop.code:
            raise
        raise SaekitError(f"{_boxed(said.getvalue())} saekit train {name} --help lists the options") from None


def _boxed(text: str) -> str:
    """The sentence in tyro's box of an error: behind the title, up to a rule; drawn in either character set."""
    words = []
    for line in text.splitlines()[1:]:
        line = line.strip("│ ")
        if line.strip("─-"):
            words.append(line)
        elif words:
            break
    return " ".join(words).rstrip(".") + ";"


def _taken(argv: list[str], option: str) -> tuple[list[str], str | None]:
    """The words without an option that must be known before the others are parsed, and its value."""
    for i, word in enumerate(argv):
        if word == option and i + 1 < len(argv):
            return argv[:i] + argv[i + 2 :], argv[i + 1]
        if word.startswith(f"{option}="):
            return argv[:i] + argv[i + 1 :], word.split("=", 1)[1]
    return argv, None


def _register(variant_file: Path | None):
    """Makes the variants of a file known."""
    if variant_file is not None:
        from saekit.variants.files import load_variant_file

        load_variant_file(variant_file)


def evaluate(argv: list[str]):
    from saekit.config import EvaluateOptions

    def parse(
        sae: _positional(Path, "SAE"),
        *,
        measuring: EvaluateOptions,
        json: bool = False,
        variant_file: Path | None = None,
    ):
        """Measures an SAE on held-out text.

        Args:
            sae: SAE folder.
            json: Print evaluation.json instead of the table.
            variant_file: Python file that defines the variant, for one that is not built in.
        """
        return sae, measuring, json, variant_file

    sae, options, as_json, variant_file = _parse(parse, argv, "saekit evaluate")
    _register(variant_file)
    from saekit.evaluation import evaluate as evaluate_

    evaluation = evaluate_(sae, **vars(options))
    if as_json:
        from saekit.store.format import pretty_json

        print(pretty_json(evaluation.content).decode(), end="")
    else:
        print(evaluation)


def index(argv: list[str]):
    from saekit.config import IndexOptions

    def parse(sae: _positional(Path, "SAE"), *, indexing: IndexOptions, variant_file: Path | None = None):
        """Encodes a store and writes the feature index: every firing of every feature.

        Args:
            sae: SAE folder; the index goes to its sub-folder index/.
            variant_file: Python file that defines the variant, for one that is not built in.
        """
        return sae, indexing, variant_file

    sae, options, variant_file = _parse(parse, argv, "saekit index")
    _register(variant_file)
    from saekit.feature_index import build_index

    found = build_index(sae, **vars(options))
    if os.environ.get("RANK", "0") != "0":
        return
    m = found.manifest
    named = "" if variant_file is None else f" --variant-file {variant_file}"
    print(f"{m['Z']:,} firings of {m['F']:,} features on {m['E']:,} tokens\nnext:  saekit browse {sae}{named}")


def browse(argv: list[str]):
    def parse(
        path: _positional(Path, "PATH"),
        *,
        host: str = "127.0.0.1",
        port: int = 8501,
        model: bool = True,
        variant_file: Path | None = None,
    ):
        """Opens the features of an SAE, or of a folder of SAEs, in the browser.

        Args:
            path: SAE folder, or a folder that holds several.
            host: Address to listen on.
            port: Port to listen on.
            model: Offer the panels that need the language model.
            variant_file: Python file that defines the variant, for one that is not built in.
        """
        return path, host, port, model, variant_file

    path, host, port, model, variant_file = _parse(parse, argv, "saekit browse")
    # an error in the file is one line here, before any server starts
    _register(variant_file)
    from saekit.browse import serve

    say = partial(print, file=sys.stderr, flush=True)
    serve(path, host=host, port=port, model=model, variant_file=variant_file, say=say)


def feature(argv: list[str]):
    def parse(
        sae: _positional(Path, "SAE"),
        number: _positional(tuple[int, ...], "NUMBER"),
        *,
        html: Path | None = None,
        view: Literal["top", "quantiles", "random", "near"] = "top",
        zoom: Literal["stacked", "snippet", "full"] = "snippet",
        variant_file: Path | None = None,
    ):
        """Shows features in the terminal, or writes them as one HTML file.

        Args:
            sae: SAE folder with an index.
            number: One or several features.
            html: Write one self-contained HTML file instead.
            view: Which examples.
            zoom: How much text the HTML file shows around each of them.
            variant_file: Python file that defines the variant, for one that is not built in.
        """
        return sae, number, html, view, zoom, variant_file

    sae, numbers, html, view, zoom, variant_file = _parse(parse, argv, "saekit feature")
    _register(variant_file)
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


def compare(argv: list[str]):
    def parse(
        sae: _positional(tuple[Path, ...], "SAE"),
        *,
        html: Path | None = None,
        csv: bool = False,
        json: bool = False,
        features: bool = False,
    ):
        """Prints the stored evaluations of several SAEs side by side, seeds of one recipe as one row.

        Args:
            sae: SAE folders, each with an evaluation.
            html: Write one HTML file with L0 against FVU and against the added loss.
            csv: Print comma-separated values instead.
            json: Print JSON instead.
            features: Match the features of two indexed SAEs by their decoder rows instead.
        """
        return sae, html, csv, json, features

    folders, html, as_csv, as_json, features = _parse(parse, argv, "saekit compare")
    if features:
        _match(folders, html, as_csv, as_json)
        return
    from saekit.evaluation.comparison import compare as compare_
    from saekit.store.format import pretty_json

    found = compare_(folders)
    if html is not None:
        html.write_text(found.html(), encoding="utf-8")
        print(f"{len(folders)} SAEs in {html}")
    elif as_csv:
        print(found.to_csv(), end="")
    else:
        print(pretty_json(found.to_dict()).decode() if as_json else found)


def _match(folders: tuple[Path, ...], html: Path | None, as_csv: bool, as_json: bool):
    """`saekit compare A B --features`."""
    if len(folders) != 2:
        raise SaekitError(f"--features matches two SAEs, {len(folders)} named")
    if html is not None or as_csv:
        raise SaekitError("--features prints one line, or JSON with --json; without it --html and --csv")
    from saekit.feature_index import open_index
    from saekit.store.format import pretty_json

    first, second = map(open_index, folders)
    found = first.compare(second)
    print(pretty_json(found.to_dict()).decode() if as_json else found.summary(), end="" if as_json else "\n")


def steer(argv: list[str]):
    from saekit.config import SteerMode

    def parse(
        sae: _positional(Path, "SAE"),
        feature: _positional(int, "FEATURE"),
        *,
        prompt: tuple[str, ...],
        mode: SteerMode = "add",
        dose: tuple[float, ...] = (-4.0, 4.0),
        unit: float | None = None,
        new_tokens: int = 40,
        seed: int = 0,
        seeds: int = 1,
        temperature: float = 0.8,
        cache: bool = True,
        json: bool = False,
        model: str | None = None,
        device: str = "auto",
        force: bool = False,
        variant_file: Path | None = None,
    ):
        """Shows what the language model writes without and with doses of a feature, and what a dose costs.

        Args:
            sae: SAE folder.
            feature: Number of the feature.
            prompt: One or several beginnings of a text.
            mode: add = dose × unit of its direction at every token; set = its code clamped to that; ablate = its part taken away where it fires; project = nothing of its direction left.
            dose: One or several doses, in units; of either sign.
            unit: Of a dose, as a code; None = the 95th percentile of the feature's magnitudes in the index.
            new_tokens: Tokens to write.
            seed: First seed of the random numbers.
            seeds: So many seeds, from the first on.
            temperature: 0 = always the most probable token.
            cache: Keep keys and values of what was read; the text is the same without, and slower.
            json: Print all of it as JSON.
            model: Language model; None = the one the SAE was trained on.
            device: Where it runs.
            force: Steer a model of other weights than the SAE was trained on.
            variant_file: Python file that defines the variant, for one that is not built in.
        """
        return locals()

    found = _parse(parse, argv, "saekit steer")
    _register(found.pop("variant_file"))
    as_json, first, count = found.pop("json"), found.pop("seed"), found.pop("seeds")
    if count < 1:
        raise SaekitError(f"--seeds {count}; it must be at least 1")
    from saekit.feature_index.render_steering import steering_text
    from saekit.steering import steer as steer_

    results = steer_(
        found.pop("sae"),
        found.pop("feature"),
        list(found.pop("prompt")),
        doses=found.pop("dose"),
        seeds=range(first, first + count),
        **found,
    )
    assert isinstance(results, list)
    if as_json:
        from saekit.store.format import pretty_json

        print(pretty_json([one.to_dict() for one in results]).decode(), end="")
    else:
        print("\n".join(steering_text(one, sys.stdout.isatty()) for one in results), end="")


def check(argv: list[str]):
    def parse(
        path: _positional(Path, "PATH"),
        *,
        quick: bool = False,
        repair: bool = False,
        recompute: int = 0,
        model: str | None = None,
        device: str = "auto",
        variant_file: Path | None = None,
    ):
        """Checks a store, an SAE folder or an index against its own manifest: sizes, checksums, shapes, values.

        Args:
            path: Folder to check.
            quick: Sizes and headers only.
            repair: Compute the damaged shards of a store again; they must come out bit for bit.
            recompute: Compute so many random sequences of a store again and compare.
            model: Language model for repair and recompute; None = the one the store was collected from.
            device: Where it runs; bytes are equal only on the kind of device the store was made on.
            variant_file: Python file that defines the variant of an SAE, for one that is not built in.
        """
        return path, quick, repair, recompute, model, device, variant_file

    path, quick, repair, recompute, model, device, variant_file = _parse(parse, argv, "saekit check")
    _register(variant_file)
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


def doctor(argv: list[str]):
    def parse(*, device: str = "auto"):
        """What to paste into a bug report: versions, devices, the kernels chosen and why, free disk, and a self-test of
        some seconds. No paths, no names. Ends with code 2 if the self-test fails.

        Args:
            device: Where the self-test runs; auto = a GPU if there is one.
        """
        return device

    device = _parse(parse, argv, "saekit doctor")
    from saekit.doctor import doctor

    report, problems = doctor(device)
    print(report)
    if problems:
        raise SaekitError("self-test failed: " + "; ".join(problems))


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


VERBS = {f.__name__: f for f in (collect, train, evaluate, index, browse, feature, compare, steer, check, doctor, demo)}
