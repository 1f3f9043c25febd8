"""Any torch.nn.Module as a source of activations: name a module inside it, read what that returns for a batch.

    plain = PlainModule(network)
    site = plain.check_site("layers.3", batch)
    x_BD = plain.capture(batch, ["layers.3"])["layers.3"]

A batch is a tensor, a tuple or list of tensors for several arguments, or a dict of tensors for named ones; the first axis
of its first tensor counts the items. A site is a module path, and means what the module returns, the first of a tuple.

B items in a batch · T positions of an item · D width of a site
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saekit.device import keep_freed_memory
from saekit.errors import SaekitError
from saekit.fingerprints import weights_fingerprint
from saekit.hooks import Point, Seen, capture, evaluating, observe, unfit
from saekit.model import Site

Batch = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


class PlainModule:
    """A module of the caller's, left as it is found: never moved or cast, train flags and hooks put back."""

    def __init__(self, module: nn.Module):
        if not isinstance(module, nn.Module):
            raise SaekitError(f"inputs are for a torch.nn.Module, not for a {type(module).__name__}; give the module")
        self.module = module
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def device(self) -> torch.device:
        """Of its first parameter or buffer; a module without any runs on the CPU."""
        return next((x.device for x in self._tensors()), torch.device("cpu"))

    def size(self, batch: Batch) -> int:
        """B. Raises SaekitError for what is no batch."""
        args, kwargs = _arguments(batch)
        return [*args, *kwargs.values()][0].shape[0]

    def check_site(self, name: str, batch: Batch) -> Site:
        """The site of that name, tried on the batch.

        Raises SaekitError with the nearest names if there is no such module, or if it does not run exactly once and
        return (B, D) or (B, T, D).
        """
        seen = self._observe(batch)
        module = self._find(name, batch)
        reason = self._unfit(seen.get(module), batch)
        if reason:
            raise SaekitError(f"{name} {reason}; nearest: {', '.join(self._nearest(name, batch, seen)) or 'none'}")
        shape = seen[module].shape
        assert shape is not None, name
        return Site(name, shape[-1], -1)

    @torch.no_grad()
    def capture(self, batch: Batch, sites: Sequence[str]) -> dict[str, Tensor]:
        """Activations at the sites, each (B, D) or (B, T, D) in the module's dtype, from one call of the module.

        The call ends at the last of them. Raises SaekitError for a name that is no site for this batch.
        """
        points = {name: Point(self._find(name, batch)) for name in sites}
        B = self.size(batch)
        with evaluating(self.module):
            found = capture(points, lambda: self._run(batch))
        for name, x in found.items():
            if x.ndim not in (2, 3) or x.shape[0] != B:
                raise SaekitError(f"{name} returns shape {tuple(x.shape)} for a batch of {B}, not (B, D) or (B, T, D)")
        return found

    def manifest_entry(self) -> dict:
        """The `model` of a store's manifest."""
        dtype = next((str(x.dtype).removeprefix("torch.") for x in self._tensors() if x.is_floating_point()), "float32")
        name = type(self.module).__name__
        return {
            "id": name,
            "revision": None,
            "weights_fingerprint": weights_fingerprint(self.module),
            "architecture": name,
            "layers": None,
            "d_model": None,
            "processing": "raw",
            "compute": PRECISIONS.get(dtype, dtype),
            "attention": None,
        }

    def _tensors(self):
        yield from self.module.parameters()
        yield from self.module.buffers()

    def _run(self, batch: Batch) -> Any:
        # copied, because a network may write into what it is given, and batches are read more than once
        args, kwargs = _arguments(batch)
        copies = {name: x.to(self.device, copy=True) for name, x in kwargs.items()}
        return self.module(*(x.to(self.device, copy=True) for x in args), **copies)

    @torch.no_grad()
    def _observe(self, batch: Batch) -> dict[nn.Module, Seen]:
        with evaluating(self.module):
            return observe(self.module, lambda: self._run(batch))

    def _unfit(self, seen: Seen | None, batch: Batch) -> str | None:
        return unfit(seen, (self.size(batch),), ("B D", "B T D"))

    def _find(self, name: str, batch: Batch) -> nn.Module:
        try:
            # the empty path is the whole module, which no folder of a store can be named after
            return self.module.get_submodule(name or " ")
        except AttributeError:
            near = ", ".join(self._nearest(name, batch, self._observe(batch)))
            raise SaekitError(f"no module {name}; nearest: {near or 'none'}") from None

    def _nearest(self, name: str, batch: Batch, seen: Mapping[nn.Module, Seen]) -> list[str]:
        """Up to three names that are sites for this batch."""
        paths = [p for p, m in self.module.named_modules() if p and self._unfit(seen.get(m), batch) is None]
        return difflib.get_close_matches(name, paths, n=3, cutoff=0.0)


def _arguments(batch: Batch) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Positional and named arguments of the call. Raises SaekitError for what is no batch."""
    if isinstance(batch, Tensor):
        args, kwargs = (batch,), {}
    elif isinstance(batch, Mapping):
        args, kwargs = (), dict(batch)
    elif isinstance(batch, (tuple, list)):
        args, kwargs = tuple(batch), {}
    else:
        raise SaekitError(f"a batch is a {type(batch).__name__}; give a tensor, or a tuple or dict of tensors")
    values = [*args, *kwargs.values()]
    other = next((x for x in values if not isinstance(x, Tensor)), None)
    if other is not None:
        raise SaekitError(f"a batch holds a {type(other).__name__}; give a tensor, or a tuple or dict of tensors")
    if not values or values[0].ndim == 0:
        raise SaekitError(
            "a batch has no items: its first tensor has no axis; give a tensor whose first axis counts them"
        )
    return args, kwargs
