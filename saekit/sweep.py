"""Many SAEs that learn in one pass over the rows: which they are, and what they are called.

    sweep = read_sweep(Path("sweep.toml"))                    # sweep.variants: {"topk-k16": TopK(…), …}
    variants = named([TopK(k=16), TopK(k=32)])                # {"topk-k16": …, "topk-k32": …}

    [common]                  # options of the run, and defaults for every SAE that has such an option
    d_sae = 4096
    [[sae]]
    name = "topk"             # topk-k16, topk-k32, topk-k64; without a name that of the variant
    variant = "topk"
    k = [16, 32, 64]          # a list is expanded, several give the product; widths, a list itself, from a list of lists

No torch here: the command line reads the file before it parses its options.
"""

import dataclasses
import difflib
import itertools
import re
import tomllib
import types
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from saekit.config import RunOptions, StreamOptions
from saekit.errors import SaekitError
from saekit.variants import VARIANTS, Variant

# what sets the sparsity is called k here and l0 there
SPARSITY = {"k": "l0", "l0": "k"}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
RESERVED = ("stream",)


class Sweep(NamedTuple):
    """A sweep file."""

    variants: dict[str, Variant]
    """By the name of the folder."""
    options: dict
    """Of RunOptions, what [common] says."""
    stream: dict
    """Of StreamOptions, likewise."""


def read_sweep(path: Path) -> Sweep:
    """Raises SaekitError, one line that names file and entry, for everything that does not fit."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SaekitError(
            f"no such file: {path}" if isinstance(error, FileNotFoundError) else f"cannot read {path}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SaekitError(f"{path} is not valid TOML ({error})") from None
    common, entries = content.pop("common", {}), content.pop("sae", [])
    if content:
        raise SaekitError(
            f"{path}: {next(iter(content))} stands outside [common] and [[sae]]; move it into one of them"
        )
    if not isinstance(common, dict) or not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise SaekitError(f"{path}: write [common] once and [[sae]] for each SAE")
    if not entries:
        raise SaekitError(f"{path} has no [[sae]]; write one for each SAE, with its variant")

    classes = [_variant_of(path, i, entry) for i, entry in enumerate(entries, 1)]
    options, stream, defaults = {}, {}, {}
    for key, value in common.items():
        for cls, into in ((RunOptions, options), (StreamOptions, stream)):
            if key in _fields(cls):
                into[key] = _fitted(f"{path}: [common]", key, _fields(cls)[key], value)
                break
        else:
            if not any(key in _fields(cls) for cls in classes):
                known = [*_fields(RunOptions), *_fields(StreamOptions), *(k for cls in classes for k in _fields(cls))]
                raise SaekitError(f"{path}: [common]: {no_option('this sweep', key, known)}")
            defaults[key] = value
    found = []
    for i, (cls, entry) in enumerate(zip(classes, entries), 1):
        own = {key: value for key, value in defaults.items() if key in _fields(cls)}
        found += _expanded(f"{path}: [[sae]] {i}", cls, entry.get("name"), {**own, **entry})
    for name, count in Counter(name for name, _ in found).items():
        if count > 1:
            raise SaekitError(f"{path}: two SAEs are called {name}; give their entries different names")
    return Sweep(dict(found), options, stream)


def named(variants: Sequence[Variant]) -> dict[str, Variant]:
    """Variants by the name of their folder: the variant's, and the fields in which those of one variant differ."""
    found: dict[str, Variant] = {}
    for one in variants:
        kin = [other for other in variants if type(other) is type(one)]
        differ = {field for field in _fields(type(one)) if any(getattr(v, field) != getattr(one, field) for v in kin)}
        name = "-".join([one.name.replace("_", "-"), *_parts(one, differ)])
        if name in found:
            raise SaekitError(f"two SAEs are called {name}: their options are equal")
        found[name] = one
    if not found:
        raise SaekitError("no SAE named; give a list of variants, such as [sk.TopK(k=16), sk.TopK(k=32)]")
    return found


def check_name(name: str):
    """Refuses what is no name of a folder beside others."""
    if not isinstance(name, str) or not NAME.fullmatch(name) or name in RESERVED:
        raise SaekitError(
            f"{name!r} cannot be the name of a folder; use letters, digits, - and _, but not {RESERVED[0]}"
        )


def no_option(what: str, name: str, known: Iterable[str], prefix: str = "") -> str:
    """`jumprelu has no option --k; did you mean --l0`"""
    known = list(dict.fromkeys(known))
    other = SPARSITY.get(name)
    close = [other] if other in known else difflib.get_close_matches(name, known, 1)
    if prefix:
        name, close = name.replace("_", "-"), [word.replace("_", "-") for word in close]
    return f"{what} has no option {prefix}{name}" + (f"; did you mean {prefix}{close[0]}" if close else "")


def _variant_of(path: Path, i: int, entry: dict) -> type[Variant]:
    where = f"{path}: [[sae]] {i}"
    names = ", ".join(name.replace("_", "-") for name in VARIANTS)
    if "variant" not in entry:
        raise SaekitError(f"{where} has no variant; there are {names}")
    cls = VARIANTS.get(str(entry["variant"]).replace("-", "_"))
    if cls is None:
        close = difflib.get_close_matches(str(entry["variant"]), [name.replace("_", "-") for name in VARIANTS], 1)
        raise SaekitError(
            f"{where}: no variant {entry['variant']}; " + (f"nearest: {close[0]}" if close else f"there are {names}")
        )
    for key in entry:
        if key in ("name", "variant") or key in _fields(cls):
            continue
        if key in _fields(RunOptions) or key in _fields(StreamOptions):
            raise SaekitError(f"{where}: {key} belongs to [common]")
        raise SaekitError(f"{where}: {no_option(cls.name.replace('_', '-'), key, _fields(cls))}")
    return cls


def _expanded(where: str, cls: type[Variant], name: str | None, entry: dict) -> list[tuple[str, Variant]]:
    """The SAEs of one entry: the product of its lists."""
    hints = _fields(cls)
    base = cls.name.replace("_", "-") if name is None else name
    choices, several = {}, set()
    for key in hints:
        if key not in entry:
            continue
        value = entry[key]
        nested = isinstance(value, list) and any(isinstance(item, list) for item in value)
        if isinstance(value, list) and (nested or not _takes_list(hints[key])):
            if not value:
                raise SaekitError(f"{where}: {key} = [] names no value")
            several.add(key)
            values = list(value)
        else:
            values = [value]
        choices[key] = [_fitted(where, key, hints[key], item) for item in values]
    found = []
    for values in itertools.product(*choices.values()):
        try:
            one = cls(**dict(zip(choices, values)))
            check_name(base)
        except SaekitError as error:
            raise SaekitError(f"{where}: {error}") from None
        found.append(("-".join([base, *_parts(one, several)]), one))
    return found


def _parts(variant: Variant, fields: set[str]) -> list[str]:
    """`k16`, `lr0.001`, `normalise-none`, `widths64x256`: what tells one from its kin, in the order of the fields."""
    parts = []
    for key in _fields(type(variant)):
        if key in fields:
            value = getattr(variant, key)
            text = "x".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
            number = isinstance(value, (int, float, tuple)) and not isinstance(value, bool)
            parts.append(key.replace("_", "-") + ("" if number else "-") + text)
    return parts


# Values of a TOML file as the fields want them


def _fields(cls: type) -> dict[str, object]:
    """Field → type, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _kinds(hint) -> tuple:
    """The members of a union, without None."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(kind for kind in members if kind is not type(None))


def _takes_list(hint) -> bool:
    return any(get_origin(kind) is tuple for kind in _kinds(hint))


def _fitted(where: str, key: str, hint, value) -> object:
    for kind in _kinds(hint):
        origin = get_origin(kind)
        if origin is Literal and any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            return value
        if origin is tuple:
            item = get_args(kind)[0]
            items = value if isinstance(value, list) else [value]
            if items and all(type(one) is item for one in items):
                return tuple(items)
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if type(value) is kind:
            return value
    raise SaekitError(f"{where}: {key} = {value!r} does not fit; it takes {' or '.join(map(_said, _kinds(hint)))}")


def _said(kind) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {_said(get_args(kind)[0]).removeprefix('a ')}s"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, str(kind))
