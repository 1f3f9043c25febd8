"""Which store and which language model an SAE belongs to; artefacts that do not belong together are refused by name."""

import json
from pathlib import Path

from saekit.errors import SaekitError
from saekit.store import Store, open_store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from saekit.model import LanguageModel
    from saekit.sae import SAE
    from saekit.store.rows import RowSource


def find_store(sae: "SAE", store: "Store | str | Path | None", *, force: bool = False) -> Store:
    """The store asked for, else the one that the SAE's `run.json` names (absolute path first, then as typed).

    Raises SaekitError if there is none, if it is not the one the SAE was trained on (unless it was asked for), or if it
    was collected from another model (unless `force`).
    """
    if store is None:
        store = _trained_on(sae)
    elif not isinstance(store, Store):
        store = open_store(store)
    trained = (sae.config.get("model") or {}).get("weights_fingerprint")
    collected = store.manifest["model"]["weights_fingerprint"]
    if trained and trained != collected and not force:
        raise SaekitError(
            f"SAE was trained on weights {short(trained)}, {store.path} holds {short(collected)}; "
            "pass --force to compare anyway"
        )
    return store


def _trained_on(sae: "SAE") -> Store:
    name = sae.path or "this SAE"
    path = sae.path / "run.json" if sae.path else None
    if path is None or not path.is_file():
        raise SaekitError(f"{name} does not say which store it was trained on; pass --store")
    recorded = json.loads(path.read_text(encoding="utf-8"))["store"]
    if recorded.get("streamed"):
        raise SaekitError(f"{name} was trained from a stream, of which no store is left; collect one and pass --store")
    for candidate in (recorded["absolute"], recorded["path"]):
        if Path(candidate).is_dir():
            store = open_store(candidate)
            if store.fingerprint != recorded["fingerprint"]:
                raise SaekitError(
                    f"{name} was trained on store {short(recorded['fingerprint'])}, {candidate} is now "
                    f"{short(store.fingerprint)}; pass --store"
                )
            return store
    raise SaekitError(f"the store of {name}, {recorded['absolute']}, is not there; pass --store")


def only_site(store: "RowSource") -> str:
    """The store's one site; SaekitError with the choice if it holds several."""
    if len(store.sites) > 1:
        raise SaekitError(f"{store.path} holds {len(store.sites)} sites: {', '.join(store.sites)}; pass --site")
    return next(iter(store.sites))


def find_site(sae: "SAE", store: Store, site: str | None) -> str:
    """The site asked for, else the SAE's own; SaekitError if the store does not hold it, or another width."""
    site = site or sae.site or only_site(store)
    if store.d(site) != sae.d_in:
        raise SaekitError(f"SAE expects D = {sae.d_in}, site {site} has {store.d(site)}")
    return site


def find_model(store: Store, model, *, device: str = "auto", force: bool = False) -> "LanguageModel":
    """The language model asked for, else the one the store was collected from; refused if its weights differ."""
    from saekit.model import LanguageModel, load_model

    entry = store.manifest["model"]
    if model is None and entry["layers"] is None:
        raise SaekitError(f"{store.path} was collected from {entry['id']}, which is no language model; pass --tiers 1")
    if isinstance(model, LanguageModel):
        lm = model
    else:
        named = (store.manifest["tokenizer"] or {}).get("id")
        tokenizer = named if named != entry["id"] and model is None else None
        lm = load_model(model or entry["id"], device=device, compute="fp32", tokenizer=tokenizer)
    if lm.weights_fingerprint != entry["weights_fingerprint"] and not force:
        raise SaekitError(
            f"weights fingerprint of {lm.id} is {short(lm.weights_fingerprint)}, {store.path} was collected from "
            f"{short(entry['weights_fingerprint'])}; pass --model"
        )
    return lm


def short(fingerprint: str) -> str:
    """`sha256:51b2c09d...`, enough to tell two apart."""
    return f"{fingerprint[:15]}..."
