"""The activation store: `open_store` to read, `StoreWriter` to write, `saekit.store.format` for the layout."""

from importlib import import_module

_HOME = {"open_store": "reader", "Store": "reader", "StoreWriter": "writer", "TokenTable": "format", "check": "format"}
__all__ = ["Store", "StoreWriter", "TokenTable", "check", "open_store"]


def __getattr__(name: str):
    # Late, because the format needs only numpy and the reader needs torch.
    if name in _HOME:
        return getattr(import_module(f"saekit.store.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
