"""Fixtures shared by all tests: quiet progress, no network, a tiny language model in Hugging Face format."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
# tiny tensors gain nothing from threads, and processes that share cores lose much by waiting for each other's
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

TINY_TEXT = [
    "def add(a, b):\n    return a + b\n",
    "class Dog:\n    def bark(self):\n        print('woof')\n",
    "import os\n\nfor name in os.listdir('.'):\n    print(name)\n",
]


@pytest.fixture(autouse=True)
def quiet_progress(monkeypatch):
    from saekit.progress import Progress

    monkeypatch.setattr(Progress, "quiet", True)


def bf16_units(patch: pytest.MonkeyPatch, present: bool):
    """From here on this machine seems to have matrix units for bf16, or none."""
    import torch

    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        patch.setattr(torch.cpu, name, lambda: present)


@pytest.fixture(scope="session", autouse=True)
def fp32_on_every_machine():
    """`auto` means fp32 in this process, whatever the machine has; tests of bf16 ask for it."""
    with pytest.MonkeyPatch.context() as patch:
        bf16_units(patch, False)
        yield


@pytest.fixture
def bf16_by_default(monkeypatch):
    """`auto` means bf16 in this test. Without the units it is slow and right."""
    bf16_units(monkeypatch, True)


@pytest.fixture
def nan_in_fresh_memory_one_thread_one_seed():
    """For kernels: memory that nobody wrote shows, since torch fills fresh tensors with NaN (integers: the largest one).

    One thread: on a busy machine a second one costs a wait for the scheduler in every tiny product.
    """
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def captured_step(monkeypatch):
    """`captured_step(trainer, raw_BD)`: the losses of a step, and the gradients that it hands to Adam; nothing moves."""
    import torch
    from saekit_kernels import segment_weight_grads

    def run(trainer, raw_BD):
        seen, parameters = {}, trainer.parameters()
        names = {p.data_ptr(): name for name, p in parameters.items()}

        def rows(w, m, v, g, *, grad_scale=None, **_):
            seen[names[w.data_ptr()]] = g * (1 if grad_scale is None else grad_scale)

        def segments(*sums_and_matrices, extra, **_):
            *sums, W_dec, W_enc, _, _ = sums_and_matrices
            grads = segment_weight_grads(*sums, extra=extra, project_onto=W_dec)
            for name, part, g in (("W_dec", W_dec, grads.W_dec_FD), ("W_enc", W_enc, grads.W_enc_FD)):
                whole = seen.setdefault(name, torch.full_like(parameters[name], torch.nan))
                first = (part.data_ptr() - parameters[name].data_ptr()) // (4 * g.shape[1])
                whole[first : first + len(g)] = g
            return grads.row_sq_F

        with monkeypatch.context() as patch:
            patch.setattr("saekit.trainer.row_adam_", rows)
            patch.setattr("saekit.trainer.segment_adam_", segments)
            named = trainer.step(raw_BD)
        return named, {name: g.view_as(parameters[name]) for name, g in seen.items()}

    return run


def make_tiny_model(folder: Path, *, layers: int = 2, width: int = 64, seed: int = 0, **config) -> Path:
    """A random Llama with a byte-level tokenizer of 300 ids (BOS 0, EOS 1), weights scaled up so that it has opinions."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TINY_TEXT * 20,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|bos|>", "<|eos|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 300,
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 128,
                "bos_token_id": 0,
                "eos_token_id": 1,
                "tie_word_embeddings": True,
                **config,
            }
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4.0)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a random Llama: 2 layers, width 64, 4 heads, context 128, 300 ids."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A .jsonl file of 400 short Python-like documents, about 60,000 bytes."""
    path = tmp_path_factory.mktemp("text") / "tiny.jsonl"
    lines = []
    for i in range(400):
        body = "".join(
            TINY_TEXT[(i + j) % 3].replace("name", f"name{i % 17}").replace("Dog", f"Dog{j}") for j in range(3)
        )
        lines.append(json.dumps({"text": body}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Demo(NamedTuple):
    folder: Path
    """What `saekit demo --no-browser --out` left: acts/ and saes/topk/."""
    log: str
    """What it printed, on both streams."""
    seconds: float


# every way out to the network raises; the command line runs on as a user's would
OFFLINE = """
import socket, sys
def blocked(*args, **kwargs):
    raise RuntimeError("the demo tried to reach the network")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = blocked
from saekit import cli
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Demo:
    """The demo, built once for all tests that look at it, in a process whose sockets are blocked."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    start = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")}
    line = [sys.executable, "-c", OFFLINE, "demo", "--no-browser", "--out", str(folder)]
    result = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    return Demo(folder, result.stdout + result.stderr, time.monotonic() - start)
