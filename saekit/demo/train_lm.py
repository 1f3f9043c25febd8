"""Trains the bundled language model: a small Llama that writes Python, from the standard library's source.

    python -m saekit.demo.train_lm --out saekit/demo/model --tokens 16M

1. Text: every .py file of the running interpreter's standard library, test folders included where present, without
   repeats. Modules whose path hash is 0 modulo 10 are held out, the same ones on every installation.
2. A byte-level BPE of 4,096 tokens, learned on the training part. A line's indentation is one token with its line
   break, digits are single tokens.
3. Windows of 256 tokens that begin with BOS; documents are joined with EOS, as `saekit collect` joins them.
4. Muon for the matrices of the layers, AdamW for the embedding and the norms, in fp32; saved in bf16.

The choices behind the numbers, the figures reached and what they are compared with: docs/demo-model.md.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saekit.text import stdlib_documents

BOS, EOS = "<|bos|>", "<|eos|>"
CONTEXT = 256
# identifiers · digits one by one · punctuation · line break(s) with the next line's indentation · other blanks
SPLIT = r" ?[\p{L}_]+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|(?:[^\S\n]*\n)+[^\S\n]*|[^\S\n]+"


def train_tokenizer(texts: list[str], vocabulary: int = 4096) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` tokens, ids 0 and 1 being BOS and EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def joined(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Token ids of all documents, an EOS after each."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    eos = np.array([1], np.int32)
    return np.concatenate([part for e in encodings for part in (np.array(e.ids, np.int32), eos)])


def orthogonal(g: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor of g, roughly, by five Newton–Schulz steps of the quintic used by Muon.

    In fp32: `torch.optim.Muon` works in bf16, which processors without bf16 units compute a hundred times slower.
    """
    x = g / (g.norm() + 1e-7)
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix, scaled to the root mean square of an Adam step (arXiv 2502.16982)."""

    def __init__(self, matrices, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                m = self.state[w].setdefault("momentum", torch.zeros_like(w))
                m.lerp_(w.grad, 1 - group["momentum"])
                update = orthogonal(w.grad.lerp(m, group["momentum"])) * 0.2 * math.sqrt(max(w.shape))
                w.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])


def build_model(args, vocabulary: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=args.width,
            intermediate_size=args.mlp,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def windows(stream: np.ndarray, batch: int, rng: np.random.Generator) -> torch.Tensor:
    """(batch, CONTEXT) ids: BOS, then a random stretch of the stream."""
    starts = rng.integers(0, len(stream) - CONTEXT, batch)
    rows = stream[starts[:, None] + np.arange(CONTEXT - 1)]
    return torch.from_numpy(np.concatenate([np.zeros((batch, 1), np.int32), rows], 1)).long()


@torch.no_grad()
def nats_per_token(model, stream: np.ndarray, batch: int = 32) -> float:
    """Mean loss over the whole stream, cut into full windows without overlap."""
    model.eval()
    rows = stream[: len(stream) // (CONTEXT - 1) * (CONTEXT - 1)].reshape(-1, CONTEXT - 1)
    ids = torch.from_numpy(np.concatenate([np.zeros((len(rows), 1), np.int32), rows], 1)).long()
    total = 0.0
    for part in ids.split(batch):
        logits = model(input_ids=part).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / rows.size


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path):
    half = LlamaForCausalLM(model.config)
    half = half.bfloat16()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", default="16M", help="training tokens, e.g. 16M")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32, help="windows of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--init", type=Path, default=None, help="weights to go on from, saved by an earlier call")
    parser.add_argument("--from-step", type=int, default=0, help="step those weights were saved at; momenta start anew")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng([args.seed, args.from_step])

    train = [d.text for d in stdlib_documents(tests=True) if not d.held_out]
    held = [d.text for d in stdlib_documents() if d.held_out]
    tokenizer = train_tokenizer(train)
    stream, held_stream = joined(tokenizer, train), joined(tokenizer, held)
    held_bytes = sum(len(t.encode()) for t in held)
    print(
        f"{len(train)} training documents, {len(stream):,} tokens; {len(held)} held out, {len(held_stream):,} tokens, "
        f"{held_bytes / len(held_stream):.3f} bytes per token",
        flush=True,
    )

    model = build_model(args, len(tokenizer))
    if args.init:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32).state_dict())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        Muon(matrices, lr=args.lr),
        torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    steps = int(float(args.tokens.rstrip("M")) * 1e6) // (args.batch * CONTEXT)
    log, start, running = [], time.time(), 0.0

    @torch.compile(disable=args.no_compile)  # 1.8 times the tokens per second on two cores
    def loss_of(ids):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    for step in range(args.from_step, steps):
        share = step / steps
        scale = min(1.0, (step - args.from_step + 1) / 60) * min(1.0, (1 - share) / 0.6)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * scale
        loss = loss_of(windows(stream, args.batch, rng))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if (step + 1) % 25 == 0:
            seconds = time.time() - start
            log.append({"step": step + 1, "tokens": (step + 1) * args.batch * CONTEXT, "loss": round(running / 25, 4)})
            print(
                f"step {step + 1}/{steps} loss {running / 25:.3f} {(step + 1 - args.from_step) * args.batch * CONTEXT / seconds:,.0f} tokens/s "
                f"{seconds / (step + 1 - args.from_step) * (steps - step - 1) / 60:.0f} min left",
                flush=True,
            )
            running = 0.0
        if (step + 1) % 400 == 0 or step + 1 == steps:
            log[-1]["held_out"] = round(nats_per_token(model, held_stream[: 200 * (CONTEXT - 1)]), 4)
            print(f"  held out {log[-1]['held_out']}", flush=True)
            save(model, tokenizer, args.out)

    nats = nats_per_token(LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32), held_stream)
    bits = nats / math.log(2) * len(held_stream) / held_bytes
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_documents": len(train),
        "train_tokens": len(stream),
        "tokens_seen": steps * args.batch * CONTEXT,
        "held_out_documents": len(held),
        "held_out_tokens": len(held_stream),
        "held_out_bytes": held_bytes,
        "nats_per_token": round(nats, 4),
        "bits_per_byte": round(bits, 4),
        "log": log,
        "options": {k: str(v) for k, v in vars(args).items() if k != "out"},
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"held out: {nats:.4f} nats per token, {bits:.4f} bits per byte")


if __name__ == "__main__":
    main()
