"""Activations of any torch module over any batches: an item has the place of a sequence, its number that of a token."""

import numpy as np
import pytest
import torch
from torch import nn

from saekit.collector import collect
from saekit.errors import SaekitError
from saekit.store import check
from saekit.store.writer import StoreWriter

OPTIONS = {"dtype": "float32", "shard_mb": 1}


class Vision(nn.Module):
    """(B, 12) → (B, 3, 8) patches → one vector."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Linear(4, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 5)

    def forward(self, image, scale=None):
        x = self.patch(image.reshape(len(image), 3, 4))
        x = x if scale is None else x * scale[:, None, None]
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x.mean(1))


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n, 12, generator=g) for n in (10, 10, 10, 7)]


def test_positions_of_items(images, tmp_path):
    module = Vision()
    store = collect(module, site="layers.1", inputs=images, out=tmp_path / "a", **OPTIONS)
    assert check(tmp_path / "a") == [] and store.rows == 37 * 3 and store.n_sequences == 37
    x = torch.cat(images).reshape(37, 3, 4)
    hidden = module.layers[1](torch.relu(module.layers[0](module.patch(x)))).reshape(-1, 8)
    assert torch.allclose(store.read("layers.1", 0, store.rows), hidden, atol=1e-6)
    assert store.table.token.tolist() == np.repeat(np.arange(37), 3).tolist()
    m = store.manifest
    assert m["tokenizer"] is None and m["model"]["architecture"] == "Vision" and m["model"]["vocab_size"] == 37
    assert m["text"]["source"] == "inputs" and m["text"]["documents"] == 37 and m["context_length"] == 3
    assert store.tokens(4, 7).documents.tolist() == [1, 1, 2] and store.tokens(4, 7).positions.tolist() == [1, 2, 0]


def test_one_row_per_item_named_arguments_and_a_function(images, tmp_path):
    module = Vision()
    batches = [{"image": x, "scale": torch.arange(len(x)).float()} for x in images]
    store = collect(module, site=("head",), inputs=lambda: iter(batches), out=tmp_path / "a", **OPTIONS)
    expected = torch.cat([module(**b) for b in batches])
    assert store.rows == 37 and torch.allclose(store.read("head", 0, 37), expected.detach(), atol=1e-6)


def test_batches_are_read_for_training_like_any(images, tmp_path):
    store = collect(Vision(), site="layers.1", inputs=images, out=tmp_path / "a", **OPTIONS)
    seen = torch.cat([torch.from_numpy(b.rows) for b in store.batches("layers.1", batch=16, split="all")])
    assert len(set(seen.tolist())) == len(seen) == 111 // 16 * 16


def test_cut_off_and_continued(images, tmp_path, monkeypatch):
    monkeypatch.setattr(StoreWriter, "shard_sequences", 10)
    whole = collect(Vision(), site="layers.1", inputs=images, out=tmp_path / "whole", **OPTIONS)
    put = StoreWriter.put

    def interrupted(self, i, rows):
        if i == 2:
            raise KeyboardInterrupt
        put(self, i, rows)

    with monkeypatch.context() as m:
        m.setattr(StoreWriter, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collect(Vision(), site="layers.1", inputs=images, out=tmp_path / "a", **OPTIONS)
    store = collect(Vision(), site="layers.1", inputs=images, out=tmp_path / "a", **OPTIONS)
    assert store.fingerprint == whole.fingerprint and check(tmp_path / "a") == []


def test_the_module_is_left_as_it_was(images, tmp_path):
    module = Vision().train()
    collect(module, site="layers.1", inputs=images, out=tmp_path / "a", **OPTIONS)
    assert module.training and not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize(
    ("inputs", "site", "message"),
    [
        (lambda i: iter(i), "layers.1", "inputs can be read only once; give a list, a DataLoader, or a function that gives an iterator"),
        (lambda i: [], "layers.1", "inputs hold no item; give at least one batch"),
        (lambda i: [i[0], i[3], i[1]], "layers.1", "batches of inputs have 7, 10 items; all but the last must have as many"),
        (lambda i: i, "layers.7", "no module layers.7; nearest: layers."),
        (lambda i: ["text"], "layers.1", "a batch is a str; give a tensor"),
        (lambda i: i, ("layers.1", "head"), "sites have different numbers of positions per item (layers.1 3, head 1); collect them into stores"),
    ],
)  # fmt: skip
def test_refusals(images, tmp_path, inputs, site, message):
    with pytest.raises(SaekitError) as error:
        collect(Vision(), site=site, inputs=inputs(images), out=tmp_path / "a", **OPTIONS)
    assert str(error.value).startswith(message) and not (tmp_path / "a").exists()


def test_inputs_go_with_a_module(images, tmp_path):
    with pytest.raises(SaekitError, match=r"inputs go with a torch.nn.Module, not str; for a model's name give text"):
        collect("gpt2", site="layers.1", inputs=images, out=tmp_path / "a")


def test_inputs_that_change_are_noticed(images, tmp_path):
    reads = []

    def changing():
        reads.append(1)
        return iter(images if len(reads) < 3 else images[1:])

    with pytest.raises(SaekitError, match="inputs .* the same each time they are read"):
        collect(Vision(), site="layers.1", inputs=changing, out=tmp_path / "a", **OPTIONS)
    assert not (tmp_path / "a" / "manifest.json").exists()
