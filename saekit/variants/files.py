"""Variants of one's own: a Python file that defines them.

    load_variant_file("my_variant.py")        # its Variant subclasses are in VARIANTS from here on

A file is imported only where the user names it, never because a folder or a configuration asks for it. No torch here: the
command line loads files before it knows which options there are.
"""

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path

from saekit.errors import SaekitError
from saekit.variants import VARIANTS, Variant

MODULE = "saekit_variant_file_"


def load_variant_file(path: str | Path) -> list[type[Variant]]:
    """Imports a file and registers the variants that it defines; returns their classes.

    A class takes part if it is derived from Variant and has a `name` of its own. The same file may be loaded again.

    Raises SaekitError: no such file, an error inside it, no variant in it, or a name that another variant has.
    """
    path = Path(path)
    if not path.is_file():
        raise SaekitError(f"no such file: {path}")
    module_name = MODULE + hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise SaekitError(f"{path} is not a Python file; a variant file ends in .py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up while they are made
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise SaekitError(f"{path}{_line_of(error, path)}: {type(error).__name__}: {error}") from error
    found = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, Variant) and cls.__module__ == module_name and "name" in vars(cls)
    ]
    if not found:
        raise SaekitError(f"{path} defines no variant: a class derived from saekit.variants.Variant, with a name")
    for cls in found:
        taken = VARIANTS.get(cls.name)
        if taken is not None and taken.__module__ != module_name:
            raise SaekitError(
                f"{path}: the name {cls.name} is taken by {taken.__module__}; give {cls.__name__} another"
            )
    VARIANTS.update({cls.name: cls for cls in found})
    return found


def variant_file(cls: type[Variant]) -> Path | None:
    """The file that a class was loaded from; None for one that was not."""
    if not cls.__module__.startswith(MODULE):
        return None
    return Path(str(sys.modules[cls.__module__].__file__)).resolve()


def _line_of(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""
