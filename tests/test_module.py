"""Any module as a source of activations: the path names what the module returns, and nothing of the caller's changes.

The network doubles, adds 1 and halves along D, so every value can be worked out by hand.
"""

import pytest
import torch
from torch import nn

from saekit.errors import SaekitError
from saekit.fingerprints import weights_fingerprint
from saekit.module import PlainModule


class Affine(nn.Module):
    """y = a x + b."""

    def __init__(self, a: float, b: float):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x):
        return self.a * x + self.b


class Network(nn.Module):
    """(B, D) or (B, T, D) -> double, plus one, at most five (written in place), half; a gate that is asked for by name."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Affine(2.0, 0.0), Affine(1.0, 1.0), nn.Hardtanh(-5.0, 5.0, inplace=True)])
        self.halve = Affine(0.5, 0.0)
        self.pair = Pair()
        self.unused = nn.Linear(4, 4)
        self.total = Total()
        self.calls = []

    def forward(self, x, gate=None):
        for layer in self.layers:
            x = layer(x)
        self.calls.append("halve")
        x = self.halve(x)
        x = self.halve(x) if gate is None else x * gate
        x, _ = self.pair(x)
        self.calls.append("total")
        return self.total(x)


class Pair(nn.Module):
    def forward(self, x):
        return x, {"note": 1}


class Total(nn.Module):
    def forward(self, x):
        return x.sum(0, keepdim=True)


X_BD = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-1.0, -2.0, 0.5, 10.0], [1.0, 1.0, 1.0, 1.0]])
# 2 x, then 2 x + 1
DOUBLE = [[0.0, 2.0, 4.0, 6.0], [-2.0, -4.0, 1.0, 20.0], [2.0, 2.0, 2.0, 2.0]]
PLUS_ONE = [[1.0, 3.0, 5.0, 7.0], [-1.0, -3.0, 2.0, 21.0], [3.0, 3.0, 3.0, 3.0]]


def refusal(call) -> str:
    with pytest.raises(SaekitError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_values_at_two_sites_by_hand():
    plain = PlainModule(Network())
    site = plain.check_site("layers.1", X_BD)
    assert (site.name, site.d, site.layer, site.heads) == ("layers.1", 4, -1, None)
    x = plain.capture(X_BD, ["layers.1", "layers.0"])
    assert list(x) == ["layers.1", "layers.0"]
    assert x["layers.0"].tolist() == DOUBLE and x["layers.1"].tolist() == PLUS_ONE
    assert not x["layers.0"].requires_grad


def test_a_value_is_kept_as_it_was_returned():
    """The third layer writes 5 over what the second returned as 7 and 21."""
    x = PlainModule(Network()).capture(X_BD, ["layers.1", "layers.2"])
    assert x["layers.1"].tolist() == PLUS_ONE
    assert x["layers.2"].tolist() == torch.tensor(PLUS_ONE).clamp(-5, 5).tolist()


def test_the_batch_is_left_as_it_was():
    """A network that writes into what it is given gives the same values each time."""
    plain = PlainModule(nn.Sequential(nn.Hardtanh(-0.5, 0.5, inplace=True), nn.Identity()))
    batch = X_BD.clone()
    for _ in range(2):
        assert torch.equal(plain.capture(batch, ["1"])["1"], X_BD.clamp(-0.5, 0.5))
    assert torch.equal(batch, X_BD)


def test_positions_of_an_item():
    plain, x_BTD = PlainModule(Network()), X_BD[:, None].expand(3, 2, 4)
    assert plain.check_site("layers.0", x_BTD).d == 4
    found = plain.capture(x_BTD, ["layers.0"])["layers.0"]
    assert found.shape == (3, 2, 4) and found[:, 1].tolist() == DOUBLE


@pytest.mark.parametrize(
    "batch",
    [X_BD, (X_BD,), [X_BD, torch.ones(3, 4)], {"x": X_BD}, {"gate": torch.ones(3, 4), "x": X_BD}],
    ids=["tensor", "tuple", "list of two", "dict", "dict of two"],
)
def test_kinds_of_batches(batch):
    plain = PlainModule(Network())
    assert plain.size(batch) == 3
    assert plain.capture(batch, ["layers.0"])["layers.0"].tolist() == DOUBLE


def test_the_first_of_a_tuple():
    plain, batch = PlainModule(Network()), {"x": X_BD, "gate": torch.ones(3, 4)}
    assert plain.check_site("pair", batch).d == 4
    expected = torch.tensor(PLUS_ONE).clamp(-5, 5) / 2
    assert torch.equal(plain.capture(batch, ["pair"])["pair"], expected)


def test_the_call_ends_at_the_last_site():
    network = Network()
    plain = PlainModule(network)
    plain.capture(X_BD, ["layers.1"])
    assert network.calls == []
    plain.capture(X_BD, ["layers.1", "pair"])
    assert network.calls == ["halve"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("layers.7", "no module layers.7; nearest: layers.2, layers.1, layers.0"),
        ("layerz.1", "no module layerz.1; nearest: layers.1, "),
        ("", "no module ; nearest: "),
        ("unused", "unused does not run in a forward pass; nearest: "),
        ("layers", "layers does not run in a forward pass; nearest: layers.2, layers.1, layers.0"),
        ("halve", "halve runs 2 times in one forward pass; nearest: "),
        # the sum over the items has one row for three of them
        ("total", "total returns shape (1, 4), not (B, D) or (B, T, D) with B = 3; nearest: "),
    ],
)
def test_what_is_no_site(name, message):
    plain = PlainModule(Network())
    text = refusal(lambda: plain.check_site(name, X_BD))
    assert text.startswith(message)
    for suggested in text.partition("nearest: ")[2].split(", "):
        assert plain.check_site(suggested, X_BD).d == 4


def test_shapes_of_images_are_refused():
    plain = PlainModule(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)))
    images = torch.zeros(2, 3, 8, 8)
    assert refusal(lambda: plain.check_site("0", images)) == (
        "0 returns shape (2, 8, 6, 6), not (B, D) or (B, T, D) with B = 2; nearest: 2, 1"
    )
    assert plain.check_site("1", images).d == 288


def test_a_network_that_holds_no_site():
    plain = PlainModule(nn.Sequential(nn.Conv2d(3, 8, 3)))
    assert refusal(lambda: plain.check_site("0", torch.zeros(2, 3, 8, 8))).endswith("; nearest: none")


def test_capture_refuses_what_was_not_checked():
    plain = PlainModule(Network())
    assert refusal(lambda: plain.capture(X_BD, ["layers.9"])).startswith("no module layers.9; nearest: layers.")
    assert refusal(lambda: plain.capture(X_BD, ["unused"])).startswith("unused: the model did not come past there")
    assert refusal(lambda: plain.capture(X_BD, ["total"])) == (
        "total returns shape (1, 4) for a batch of 3, not (B, D) or (B, T, D)"
    )


class Numbers(nn.Module):
    def forward(self, x):
        return (x > 0).long()


class Named(nn.Module):
    def forward(self, x):
        return {"x": x}


@pytest.mark.parametrize("part, message", [(Numbers(), "numbers of type int64"), (Named(), "a dict")])
def test_what_is_no_tensor_of_numbers(part, message):
    plain = PlainModule(nn.Sequential(nn.Identity(), part))
    assert refusal(lambda: plain.check_site("1", X_BD)) == f"1 returns {message}; nearest: 0"
    if isinstance(part, Named):
        assert refusal(lambda: plain.capture(X_BD, ["1"])) == "1 is a dict, not a tensor; choose another site"


@pytest.mark.parametrize("batch", [[1, 2], {"x": "text"}, "text", torch.tensor(1.0), (), {}])
def test_what_is_no_batch(batch):
    assert refusal(lambda: PlainModule(Network()).size(batch)).startswith("a batch ")


def test_only_modules_are_taken():
    assert refusal(lambda: PlainModule("gpt2")) == ("inputs are for a torch.nn.Module, not for a str; give the module")


def state_of(network):
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in network.modules()]


def test_the_module_is_left_as_it_was_found():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    network[2].eval()
    plain = PlainModule(network)
    before, fingerprint = state_of(network), weights_fingerprint(network)
    plain.check_site("3", X_BD)
    x = plain.capture(X_BD, ["2"])["2"]
    # evaluation mode: no dropout, and the running statistics stay
    assert torch.equal(x, plain.capture(X_BD, ["1"])["1"])
    assert state_of(network) == before and weights_fingerprint(network) == fingerprint
    with pytest.raises(RuntimeError):
        plain.capture(torch.zeros(3, 5), ["3"])
    with pytest.raises(RuntimeError):
        plain.check_site("3", torch.zeros(3, 5))
    assert state_of(network) == before and torch.is_grad_enabled()


def test_what_the_store_records():
    network = Network()
    assert PlainModule(network).manifest_entry() == {
        "id": "Network",
        "revision": None,
        "weights_fingerprint": weights_fingerprint(network),
        "architecture": "Network",
        "layers": None,
        "d_model": None,
        "processing": "raw",
        "compute": "fp32",
        "attention": None,
    }
    assert PlainModule(nn.Linear(2, 2).to(torch.bfloat16)).manifest_entry()["compute"] == "bf16"
    assert PlainModule(nn.Linear(2, 2).half()).manifest_entry()["compute"] == "float16"
    # nothing to fingerprint is still the same nothing: sha256 of no bytes
    empty = PlainModule(nn.ReLU())
    assert empty.manifest_entry()["weights_fingerprint"].startswith("sha256:e3b0c44298fc1c14")
    assert empty.manifest_entry()["compute"] == "fp32" and empty.device == torch.device("cpu")


def test_a_fingerprint_of_what_is_not_only_tensors():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            pass

    torch.manual_seed(0)
    module = Extra(2, 2)
    plain = nn.Linear(2, 2)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if isinstance(v, torch.Tensor)})
    assert weights_fingerprint(module) == weights_fingerprint(plain)
