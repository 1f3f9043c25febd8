"""Sequences of a token table → rows at the sites, by one forward pass per batch that ends at the last site.

    forward = LanguageForward(lm, sites, plan)
    rows = forward(table, 0, 32)            # {site: (n, D)} of sequences 0 to 31, on the device, in the model's dtype

`plan` has the manifest's words, so a store's own manifest does as well. What a sequence sees:

join, separate   itself; shorter sequences of a batch are padded on the right
isolate          each document alone: a sequence is cut where a document begins, and every piece is a row of the batch. So
                 positions restart and no mask is needed, whatever the architecture does with windows and positions

B sequences or pieces in a batch · T positions · D width of a site · n rows
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from saekit.errors import SaekitError
from saekit.model import LanguageModel, Site
from saekit.module import PlainModule
from saekit.store.format import TokenTable


class LanguageForward:
    """Rows of a language model or encoder. Raises SaekitError if a batch does not fit into the device's memory."""

    def __init__(self, lm: LanguageModel, sites: Mapping[str, Site], plan: Mapping):
        self.lm, self.sites, self.device = lm, dict(sites), lm.device
        self.batch: int = plan["batch_sequences"]
        self.isolate = plan["text"]["packing"] == "isolate"
        self._bos = int(plan["special_tokens"]["prepend_bos"])
        self._budget = self.batch * plan["context_length"]

    def __call__(self, table: TokenTable, first: int, last: int) -> dict[str, Tensor]:
        """Rows (n, D) of sequences first to last - 1."""
        try:
            if self.isolate:
                return self._pieces(table, first, last)
            rows, _ = self._pass(table, table.seq_start[first:last], table.seq_start[first + 1 : last + 1])
            return rows
        except torch.OutOfMemoryError as error:
            raise SaekitError(
                f"batch of {self.batch} sequences does not fit; try --batch-sequences {max(1, self.batch // 2)}"
            ) from error

    def _pieces(self, table: TokenTable, first: int, last: int) -> dict[str, Tensor]:
        """As many positions at once as `batch` full sequences have, the longest pieces first."""
        a, b = table.seq_start[first], table.seq_start[last]
        starts, ends = cut_at_documents(table, np.arange(first, last), self._bos)
        rows_before = np.concatenate([[0], np.cumsum(table.stored[a:b])])
        # a piece without a row is not computed
        some = rows_before[ends - a] > rows_before[starts - a]
        starts, ends = starts[some], ends[some]
        order = np.argsort(starts - ends, kind="stable")
        starts, ends = starts[order], ends[order]
        found: dict[str, Tensor] = {}
        i = 0
        while i < len(starts):
            count = max(1, self._budget // int(ends[i] - starts[i]))
            rows, positions_n = self._pass(table, starts[i : i + count], ends[i : i + count])
            place_n = torch.from_numpy(rows_before[positions_n - a]).to(self.device)
            for name, x_nD in rows.items():
                if name not in found:
                    found[name] = x_nD.new_empty(int(rows_before[-1]), x_nD.shape[1])
                found[name].index_copy_(0, place_n, x_nD)
            i += count
        return found or {name: torch.empty(0, site.d, device=self.device) for name, site in self.sites.items()}

    def _pass(self, table: TokenTable, start_B: np.ndarray, end_B: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
        """Rows of the stretches start to end - 1, and the token position of each; one forward pass."""
        T = int((end_B - start_B).max())
        index_BT = start_B[:, None] + np.arange(T)
        real_BT = index_BT < end_B[:, None]
        # what stands behind a causal model's token does not change it, so any id will do there
        index_BT = np.minimum(index_BT, end_B[:, None] - 1)
        kept_n = np.flatnonzero(table.stored[index_BT] & real_BT)
        ids_BT = torch.from_numpy(table.token[index_BT].astype(np.int64)).to(self.device)
        mask_BT = None
        if not self.lm.causal and not real_BT.all():
            mask_BT = torch.from_numpy(real_BT).to(self.device)
        found = self.lm.capture(ids_BT, list(self.sites), mask_BT)
        at_n = torch.from_numpy(kept_n).to(self.device)
        rows = {name: x_BTD.reshape(-1, self.sites[name].d).index_select(0, at_n) for name, x_BTD in found.items()}
        return rows, index_BT.reshape(-1)[kept_n]


class ModuleForward:
    """Rows of any module over the caller's batches; an item is a sequence, and its number stands in place of tokens.

    Batches are read in order, and from the start again where an earlier one is asked for.
    """

    def __init__(self, module: PlainModule, sites: Mapping[str, Site], inputs: Callable[[], Iterable]):
        self.module, self.sites, self.inputs, self.device = module, dict(sites), inputs, module.device
        self._batches: Iterator | None = None
        self._item = 0
        """First item of the next batch."""

    def __call__(self, table: TokenTable, first: int, last: int) -> dict[str, Tensor]:
        """Rows of sequences first to last - 1, which are the items of one batch."""
        item = int(table.token[table.seq_start[first]])
        if self._batches is None or item < self._item:
            self._batches, self._item = iter(self.inputs()), 0
        for batch in self._batches:
            begin, self._item = self._item, self._item + self.module.size(batch)
            if begin == item:
                break
        else:
            raise SaekitError(f"inputs ended before item {item:,}; they must be the same each time they are read")
        if self._item - begin != last - first:
            raise SaekitError(
                f"the batch at item {begin:,} has {self._item - begin} items, {last - first} when it was counted; "
                "inputs must be the same each time they are read"
            )
        found = self.module.capture(batch, list(self.sites))
        rows = {name: x.reshape(-1, x.shape[-1]) for name, x in found.items()}
        expected = int(table.seq_start[last] - table.seq_start[first])
        for name, x_nD in rows.items():
            if len(x_nD) != expected:
                raise SaekitError(
                    f"{name} gives {len(x_nD) // (last - first)} positions per item at item {begin:,}, "
                    f"{expected // (last - first)} at the first; items must be of one size"
                )
        return rows


def cut_at_documents(table: TokenTable, sequences: np.ndarray, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """First token of each piece of some sequences, ascending, and the one behind it: a separator ends its document, BOS
    (`bos` = 1 where there is one) begins the sequence's first."""
    begins, ends = table.seq_start[sequences], table.seq_start[sequences + 1]
    runs = table.run_start
    inside = runs[table.position_in_seq(runs) > bos]
    inside = inside[np.isin(table.seq_of(inside), sequences)]
    starts = np.union1d(begins, inside)
    # a piece ends where the next begins, or with its sequence
    behind = np.append(starts[1:], ends[-1])
    return starts, np.minimum(behind, table.seq_start[table.seq_of(starts) + 1])
