"""The demo: the whole flow on the bundled language model, offline.

    OUT/acts         activations of the model's second layer over the standard library's source
    OUT/saes/topk    the autoencoder, its evaluation, its feature index

Each stage says the command that would do the same by hand. What is finished in OUT is not done again.
"""

import time
from collections.abc import Callable
from pathlib import Path

from saekit.errors import SaekitError
from saekit.progress import duration

MODEL = "saekit:demo"
SITE = "blocks.2.hook_resid_post"
TEXT = "stdlib"
TOKENS = 2_200_000
K = 32
INDEX_TOKENS = 1_000_000
LM_TOKENS = 50_000


def run_demo(out: Path, say: Callable[[str], None] = print):
    """Collect, train, index, evaluate into `out`; ends with one sentence of health and the next command.

    Raises SaekitError if `out` holds something else than a demo.
    """
    if out.exists() and (not out.is_dir() or any(p.name not in ("acts", "saes") for p in out.iterdir())):
        raise SaekitError(f"{out} is not empty and not a demo; choose another --out")
    start = time.monotonic()
    acts, folder = out / "acts", out / "saes" / "topk"

    import saekit as sk
    from saekit.evaluation import load_evaluation

    def stage(command: str, done: bool):
        say(f"\n$ {command}" + ("   (finished before)" if done else ""))
        return not done

    if stage(
        f"saekit collect {MODEL} --site {SITE} --text {TEXT} --tokens {TOKENS} --out {acts}",
        (acts / "manifest.json").is_file(),
    ):
        sk.collect(MODEL, site=SITE, text=TEXT, tokens=TOKENS, out=acts)
    store = sk.open_store(acts)
    if stage(f"saekit train topk {acts} --k {K} --out {folder}", (folder / "config.json").is_file()):
        sk.train(sk.TopK(k=K), store, out=folder)
    sae = sk.SAE.load(folder)
    if stage(f"saekit index {folder} --tokens {INDEX_TOKENS}", (folder / "index" / "manifest.json").is_file()):
        sk.build_index(sae, store, tokens=INDEX_TOKENS)
    if stage(f"saekit evaluate {folder} --lm-tokens {LM_TOKENS}", _evaluated(folder)):
        sk.evaluate(sae, store, lm_tokens=LM_TOKENS)
    evaluation = load_evaluation(folder)
    say(f"\n{evaluation.health()}.")
    for warning in evaluation.warnings():
        say(f"warning: {warning}")
    say(f"All of it in {duration(time.monotonic() - start)}. Next:  saekit browse {out / 'saes'}")


def _evaluated(folder: Path) -> bool:
    """Whether both tiers are stored; a run that was killed between them is not done."""
    from saekit.evaluation import load_evaluation

    return (folder / "evaluation.json").is_file() and load_evaluation(folder).value("ce_sae") is not None
