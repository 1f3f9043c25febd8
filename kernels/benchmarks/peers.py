"""The training steps that are timed, saekit's and its peers', and the process that runs one of them for step.py.

    provider = PROVIDERS["sparsify"](problem, W_enc_FD, W_dec_FD)    # installed from PyPI; nothing of it is copied here
    provider.step(x_BD)                              # forward, backward, its own optimizer and constraints
    provider.losses()                                # of that step, in its own scale; `expected` gives what they must be

    python kernels/benchmarks/peers.py NAME          # requests as JSON lines on stdin, answers on stdout: see `Worker`

Runs in the environment of the provider: no import of saekit or of a peer outside its class. All start from the same weights,
W_enc = W_dec with unit rows (the encoder's rows of dead features are made small), biases 0, and see the same batches.

B tokens in a batch · D model width · F features · K kept per token · A dead features
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import statistics
import sys
import time
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor

# so small that dead features stay dead and the others keep their frequencies in all rounds; Adam's work does not depend on it
LR = 1e-4
# of AuxK, in the scale of the paper (arXiv 2406.04093); SAELens has its own default, 1, in another scale
AUX = 1 / 32


@dataclass
class Problem:
    """What a provider trains on."""

    D: int
    F: int
    K: int
    dead_A: Tensor
    """Features that count as dead before every step; empty = AuxK is off."""
    precision: str
    """`fp32`, `tf32` or `bf16`: of saekit the encoder's product, of the others autocast or the matrix products."""

    @property
    def device(self) -> torch.device:
        return self.dead_A.device


def autocast(problem: Problem):
    return torch.autocast(problem.device.type, torch.bfloat16, enabled=problem.precision == "bf16")


def fused(optimizer: torch.optim.Optimizer):
    """The same Adam, its parameters updated in one pass."""
    for group in optimizer.param_groups:
        group |= {"fused": True, "foreach": False}


def few(truth: dict[str, float]) -> float:
    """Where fewer features are dead than AuxK keeps, two peers weigh it down by that share."""
    return min(1.0, truth["dead"] / (truth["D"] // 2))


class Provider(ABC):
    """One training step. `prepare` is not timed: it marks the dead features again."""

    package: str

    def __init__(self, problem: Problem, W_enc_FD: Tensor, W_dec_FD: Tensor):
        """Copies the weights."""
        self.problem = problem

    def prepare(self) -> None:  # noqa: B027  (not every provider keeps counters)
        """Marks the dead features again."""

    @abstractmethod
    def step(self, x_BD: Tensor) -> None:
        """The whole step on a batch (B, D)."""

    @abstractmethod
    def losses(self) -> dict[str, float]:
        """Of the last step, in the provider's own scale."""

    @abstractmethod
    def weights(self) -> tuple[Tensor, Tensor]:
        """W_enc and W_dec, (F, D)."""

    @staticmethod
    @abstractmethod
    def expected(truth: dict[str, float]) -> dict[str, float]:
        """The losses of the first step, from `truth`: means over tokens of ‖e‖² (`sq`), of ‖x − mean‖² (`var`), of ‖e − mean‖²
        (`spread`), and with AuxK of ‖e − ê‖² where ê is made of the largest positive (`aux`) or signed (`aux_signed`)
        pre-activations of dead features; e = x − x̂; D, and how many are `dead`."""


class Saekit(Provider):
    package = "saekit"

    def __init__(self, problem, W_enc_FD, W_dec_FD):
        super().__init__(problem, W_enc_FD, W_dec_FD)
        import saekit as sk
        from saekit.progress import Progress
        from saekit.trainer import Trainer

        Progress.quiet = True
        D, F = problem.D, problem.F
        variant = sk.TopK(
            k=problem.K, d_sae=F, aux=AUX if len(problem.dead_A) else 0, lr=LR, normalise="none", enc_init="tied"
        )
        self.trainer = Trainer(variant, d_model=D, device=str(problem.device), compute=problem.precision)
        for own, given in zip(self.weights(), (W_enc_FD, W_dec_FD)):
            own.copy_(given)

    def prepare(self):
        self.trainer.idle_F[self.problem.dead_A] = self.trainer.dead_after

    def step(self, x_BD):
        self.named = self.trainer.step(x_BD)

    def losses(self):
        return {name: float(loss) for name, loss in self.named.items()}

    def weights(self):
        return self.trainer.W_enc, self.trainer.W_dec

    @staticmethod
    def expected(truth):
        # V = D where no statistics are given
        aux = {"aux": AUX * truth["aux"] / truth["spread"]} if "aux" in truth else {}
        return {"rec": truth["sq"] / truth["D"], **aux}

    def product(self, x_BD: Tensor):
        """A function that does the encoder's matrix product alone, into memory that is kept, in saekit's precision."""
        dtype = torch.bfloat16 if self.trainer.compute == "bf16" else torch.float32
        x, W = x_BD.to(dtype), self.trainer.W_enc.to(dtype)
        out = torch.empty(len(x), len(W), dtype=dtype, device=x.device)
        return lambda: torch.mm(x, W.T, out=out)


class SAELens(Provider):
    package = "sae-lens"
    fused_adam = False

    def __init__(self, problem, W_enc_FD, W_dec_FD):
        super().__init__(problem, W_enc_FD, W_dec_FD)
        from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig

        D, F = problem.D, problem.F
        device, aux = str(problem.device), {} if len(problem.dead_A) else {"aux_loss_coefficient": 0.0}
        options = TopKTrainingSAEConfig(d_in=D, d_sae=F, k=problem.K, device=device, **aux)
        sae = TopKTrainingSAE(options)
        training = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=4096,
            lr=LR,
            lr_end=LR,
            device=device,
            autocast=problem.precision == "bf16",
            dead_feature_window=10**6,
            logger=LoggingConfig(log_to_wandb=False),
        )
        self.trainer = SAETrainer(cfg=training, sae=sae, data_provider=iter(()))
        self.sae = sae.train()
        with torch.no_grad():
            self.sae.W_enc.copy_(W_enc_FD.T)
            self.sae.W_dec.copy_(W_dec_FD)
        if self.fused_adam:
            fused(self.trainer.optimizer)

    def prepare(self):
        self.trainer.n_forward_passes_since_fired[self.problem.dead_A] = 2 * 10**6

    def step(self, x_BD):
        # the losses alone are kept: codes of the last step must not count as memory of the next
        self.named = {name: loss.detach() for name, loss in self.trainer.step(x_BD).losses.items()}
        self.trainer.n_training_steps += 1

    def losses(self):
        return {name: float(loss) for name, loss in self.named.items()}

    def weights(self):
        return self.sae.W_enc.detach().T, self.sae.W_dec.detach()

    @staticmethod
    def expected(truth):
        return {"mse_loss": truth["sq"], "auxiliary_reconstruction_loss": few(truth) * truth.get("aux_signed", 0.0)}


class SAELensFused(SAELens):
    fused_adam = True


class DictionaryLearning(Provider):
    package = "dictionary-learning"
    fused_adam = False

    def __init__(self, problem, W_enc_FD, W_dec_FD):
        super().__init__(problem, W_enc_FD, W_dec_FD)
        from dictionary_learning.trainers.top_k import TopKTrainer

        D, F = problem.D, problem.F
        self.trainer = TopKTrainer(
            steps=10**6,
            activation_dim=D,
            dict_size=F,
            k=problem.K,
            layer=0,
            lm_name="none",
            lr=LR,
            warmup_steps=1,
            auxk_alpha=AUX if len(problem.dead_A) else 0.0,
            device=str(problem.device),
        )
        with torch.no_grad():
            for own, given in zip(self.weights(), (W_enc_FD, W_dec_FD)):
                own.copy_(given)
        # in step 0 it would take b_dec from the batch
        self.steps = 0
        if self.fused_adam:
            fused(self.trainer.optimizer)

    def prepare(self):
        self.trainer.num_tokens_since_fired[self.problem.dead_A] = 2 * self.trainer.dead_feature_threshold

    def step(self, x_BD):
        self.steps += 1
        with autocast(self.problem):
            self.loss = self.trainer.update(self.steps, x_BD)

    def losses(self):
        return {"loss": float(self.loss)}

    def weights(self):
        return self.trainer.ae.encoder.weight.detach(), self.trainer.ae.decoder.weight.detach().T

    @staticmethod
    def expected(truth):
        return {"loss": truth["sq"] + (AUX * truth["aux"] / truth["spread"] if "aux" in truth else 0.0)}


class DictionaryLearningFused(DictionaryLearning):
    fused_adam = True


class Sparsify(Provider):
    """Its Trainer trains inside a language model, so one of a few rows is made for it: it builds SAE and optimizer, and its
    public methods are called in the order of a step."""

    package = "eai-sparsify"
    optimizer_name, fused_adam = "signum", False

    def __init__(self, problem, W_enc_FD, W_dec_FD):
        super().__init__(problem, W_enc_FD, W_dec_FD)
        from datasets import Dataset
        from sparsify import SparseCoderConfig, TrainConfig, Trainer
        from transformers import LlamaConfig, LlamaForCausalLM

        D, F = problem.D, problem.F
        tiny = {"vocab_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(hidden_size=D, num_hidden_layers=1, **tiny)).to(problem.device)
        data = Dataset.from_dict({"input_ids": [[0, 1, 2, 3]] * 4}).with_format("torch")
        options = TrainConfig(
            SparseCoderConfig(num_latents=F, k=problem.K),
            batch_size=1,
            optimizer=self.optimizer_name,
            layers=[0],
            log_to_wandb=False,
        )
        trainer = Trainer(options, data, model)
        (self.sae,), (self.optimizer,) = trainer.saes.values(), trainer.optimizers
        assert self.sae.encoder.weight.dtype == torch.float32
        with torch.no_grad():
            for own, given in zip(self.weights(), (W_enc_FD, W_dec_FD)):
                own.copy_(given)
        for group in self.optimizer.param_groups:
            group["lr"] = LR
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        if self.fused_adam:
            fused(self.optimizer)
        self.idle_F = torch.zeros(F, dtype=torch.long, device=problem.device)

    def prepare(self):
        self.idle_F[self.problem.dead_A] = 2 * 10**7

    def step(self, x_BD):
        dead_F = self.idle_F > 10**7 if len(self.problem.dead_A) else None
        with autocast(self.problem):
            out = self.sae(x_BD, dead_mask=dead_F)
        (out.fvu + AUX * out.auxk_loss).backward()
        self.fvu, self.aux = out.fvu.detach(), out.auxk_loss.detach()
        fired_F = torch.zeros_like(self.idle_F, dtype=torch.bool)
        fired_F[out.latent_indices.flatten()] = True
        self.idle_F += len(x_BD)
        self.idle_F[fired_F] = 0
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.sae.set_decoder_norm_to_unit_norm()

    def losses(self):
        return {"fvu": float(self.fvu), "auxk_loss": float(self.aux)}

    def weights(self):
        return self.sae.encoder.weight.detach(), self.sae.W_dec.detach()

    @staticmethod
    def expected(truth):
        return {"fvu": truth["sq"] / truth["var"], "auxk_loss": few(truth) * truth.get("aux", 0.0) / truth["var"]}


class SparsifyAdam(Sparsify):
    optimizer_name = "adam"


class SparsifyFused(SparsifyAdam):
    fused_adam = True


class Dense(Provider):
    """Plain PyTorch: autograd on (B, F), `torch.topk`, fused Adam, projection, unit norm. `bag`: decode by `embedding_bag`."""

    package = "torch"
    bag = compiled = False

    def __init__(self, problem, W_enc_FD, W_dec_FD):
        super().__init__(problem, W_enc_FD, W_dec_FD)
        D, F = problem.D, problem.F
        self.W_enc, self.W_dec = W_enc_FD.clone(), W_dec_FD.clone()
        self.b_enc, self.b_dec = self.W_enc.new_zeros(F), self.W_enc.new_zeros(D)
        self.parameters = [p.requires_grad_() for p in (self.W_enc, self.W_dec, self.b_enc, self.b_dec)]
        self.adam = torch.optim.Adam(self.parameters, lr=LR, eps=6.25e-10, fused=True)
        self.idle_F = torch.zeros(F, dtype=torch.long, device=problem.device)
        self.loss = torch.compile(self._loss, dynamic=False) if self.compiled else self._loss

    def _loss(self, x_BD: Tensor, dead_A: Tensor):
        pre = torch.addmm(self.b_enc, x_BD - self.b_dec, self.W_enc.T)
        top = pre.topk(self.problem.K, dim=1)
        if self.bag:
            kept = torch.nn.functional.embedding_bag(
                top.indices, self.W_dec, mode="sum", per_sample_weights=top.values.relu().to(self.W_dec.dtype)
            )
        else:
            kept = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ self.W_dec
        e = x_BD - kept - self.b_dec
        rec, aux = e.square().sum(1).mean(), x_BD.new_zeros(())
        if len(dead_A):
            best = pre[:, dead_A].topk(min(x_BD.shape[1] // 2, len(dead_A)), dim=1)
            dead = torch.zeros_like(pre[:, : len(dead_A)]).scatter(1, best.indices, best.values.relu())
            e = e.detach()
            aux = (e - dead @ self.W_dec[dead_A]).square().sum() / (e - e.mean(0)).square().sum()
        return rec, aux, top.indices

    def prepare(self):
        self.idle_F[self.problem.dead_A] = 2 * 10**7

    def step(self, x_BD):
        dead_A = self.problem.dead_A
        if len(dead_A):
            dead_A = (self.idle_F > 10**7).nonzero().squeeze(1)
        with autocast(self.problem):
            rec, aux, indices = self.loss(x_BD, dead_A)
        (rec + AUX * aux).backward()
        self.rec, self.aux = rec.detach(), aux.detach()
        with torch.no_grad():
            self.idle_F += len(x_BD)
            self.idle_F[indices.flatten()] = 0
            g = self.W_dec.grad
            g.addcmul_(torch.linalg.vecdot(g, self.W_dec)[:, None], self.W_dec, value=-1)
            self.adam.step()
            self.adam.zero_grad()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def losses(self):
        return {"rec": float(self.rec), "aux": float(self.aux)}

    def weights(self):
        return self.W_enc.detach(), self.W_dec.detach()

    @staticmethod
    def expected(truth):
        return {"rec": truth["sq"], "aux": truth["aux"] / truth["spread"] if "aux" in truth else 0.0}


class DenseCompiled(Dense):
    compiled = True


class Bag(Dense):
    bag = True


class BagCompiled(Bag):
    compiled = True


PROVIDERS: dict[str, type[Provider]] = {
    "saekit": Saekit,
    "sae-lens": SAELens,
    "sae-lens-fused": SAELensFused,
    "dictionary-learning": DictionaryLearning,
    "dictionary-learning-fused": DictionaryLearningFused,
    "sparsify": Sparsify,
    "sparsify-adam": SparsifyAdam,
    "sparsify-fused": SparsifyFused,
    "dense": Dense,
    "dense-compiled": DenseCompiled,
    "bag": Bag,
    "bag-compiled": BagCompiled,
}
LABELS = {
    "saekit": "saekit",
    "sae-lens": "SAELens",
    "sae-lens-fused": "SAELens, fused Adam",
    "dictionary-learning": "dictionary_learning",
    "dictionary-learning-fused": "dictionary_learning, fused Adam",
    "sparsify": "sparsify (signum, its default)",
    "sparsify-adam": "sparsify, its Adam",
    "sparsify-fused": "sparsify, fused Adam",
    "dense": "dense PyTorch",
    "dense-compiled": "dense PyTorch, compiled",
    "bag": "PyTorch, embedding_bag",
    "bag-compiled": "PyTorch, embedding_bag, compiled",
}


def from_peers(name: str) -> bool:
    """Whether a provider lives in the environment of the peers."""
    return PROVIDERS[name].package not in ("saekit", "torch")


class Worker:
    """Answers one request at a time and does nothing in between. Each public method is a request."""

    def __init__(self, name: str):
        self.kind = PROVIDERS[name]
        self.at = 0

    def load(self, threads: int, device: str, precision: str) -> dict:
        """Imports, and two steps at a tiny shape, so that what they leave in memory is not counted later."""
        torch.set_num_threads(threads)
        self.device, self.precision = torch.device(device), precision
        if precision != "fp32":
            torch.set_float32_matmul_precision("high")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this environment's torch sees no GPU")
        W = torch.nn.functional.normalize(torch.randn(64, 16), dim=1).to(self.device)
        tiny = self.kind(Problem(16, 64, 4, torch.arange(8, device=self.device), precision), W, W)
        for _ in range(2):
            tiny.prepare()
            tiny.step(torch.randn(32, 16).to(self.device))
        tiny.losses()
        try:
            number = version(self.kind.package)
        except PackageNotFoundError:
            number = ""
        return {"version": number, "torch": torch.__version__, "threads": torch.get_num_threads()}

    def make(self, folder: str, K: int) -> dict:
        """Reads W_enc, W_dec, dead features and batches from a folder; builds the provider on them."""
        self.folder = folder

        def read(name):
            return torch.from_numpy(np.load(f"{folder}/{name}.npy")).to(self.device)

        self.batches = list(read("x").unbind(0))
        _settle()
        self.before = self._held()
        W_dec_FD = read("W_dec")
        F, D = W_dec_FD.shape
        self.provider = self.kind(Problem(D, F, K, read("dead"), self.precision), read("W_enc"), W_dec_FD)
        return {}

    def first(self) -> dict:
        """The first step: its losses, to be compared."""
        self._step()
        return {"losses": self.provider.losses()}

    def memory(self) -> dict:
        """MB that a step holds at its peak: growth since before the weights were read."""
        _settle()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                _write("/proc/self/clear_refs", "5")
        ms = self._step()
        return {"peak_mb": (self._held(peak=True) - self.before) / 1e6, "ms": ms}

    def steps(self, warm: int, count: int) -> dict:
        """Mean milliseconds of `count` steps behind `warm` others."""
        for _ in range(warm):
            self._step()
        return {"ms": statistics.fmean(self._step() for _ in range(count))}

    def product(self, count: int) -> dict:
        """Milliseconds of the encoder's matrix product alone, median."""
        run = self.provider.product(self.batches[0])
        return {"ms": statistics.median([self._timed(run) for _ in range(count + 1)][1:])}

    def moved(self) -> dict:
        """‖W − start‖ / ‖start‖ of both matrices, and the losses of the last step."""
        found = {}
        for name, own in zip(("W_enc", "W_dec"), self.provider.weights()):
            start = torch.from_numpy(np.load(f"{self.folder}/{name}.npy")).to(self.device)
            found[name] = float((own - start).norm() / start.norm())
        return {"moved": found, "losses": self.provider.losses()}

    def _step(self) -> float:
        x_BD = self.batches[self.at % len(self.batches)]
        self.at += 1
        self.provider.prepare()
        return self._timed(lambda: self.provider.step(x_BD))

    def _timed(self, run) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    def _held(self, peak: bool = False) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        try:
            with open("/proc/self/status") as f:
                fields = dict(line.split(":", 1) for line in f)
            return 1024 * int(fields["VmHWM" if peak else "VmRSS"].split()[0])
        except OSError:
            return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _settle():
    """Gives freed memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _write(path: str, text: str):
    with open(path, "w") as f:
        f.write(text)


def main():
    # what a library prints must not mix with the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            answer = {"error": f"{type(error).__name__} in {where}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
