"""The activation store: `open_store` to read, `StoreWriter` to write, `check`, and `format` for the layout."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "Store": "saekit.store.reader",
    "StoreWriter": "saekit.store.writer",
    "TokenTable": "saekit.store.format",
    "check": "saekit.store.integrity",
    "open_store": "saekit.store.reader",
}
__all__ = ["Store", "StoreWriter", "TokenTable", "check", "open_store"]

if TYPE_CHECKING:
    from saekit.store.format import TokenTable
    from saekit.store.integrity import check
    from saekit.store.reader import Store, open_store
    from saekit.store.writer import StoreWriter


def __getattr__(name: str):
    # Late, because the format needs only numpy and the reader needs torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'saekit.store' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
