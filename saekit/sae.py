"""The one module: a variant, its weights, encode and decode, save and load.

    sae = SAE.load("saes/gpt2-topk")
    codes = sae.encode(x)            # sparse: values, indices
    x_hat = sae.decode(codes)

B tokens · D model width · F features. The folder is `config.json` + `sae.safetensors`; saved weights always apply to raw
activations: a scale used in training is folded in.
"""

import json
from hashlib import sha256
from pathlib import Path

import torch
from saekit_kernels import Codes, decode, encode_select
from torch import Tensor, nn

import saekit
from saekit.errors import SaekitError
from saekit.progress import Progress
from saekit.step import Moment, SparseSlots, inference_step
from saekit.store.format import (
    atomic_write,
    canonical_json,
    map_tensors,
    pretty_json,
    read_header,
    sha256_file,
    write_tensors,
)
from saekit.variants import VARIANTS, FeatureChoice, Variant

FORMAT, FORMAT_VERSION = "saekit-sae", 1
CONFIG, WEIGHTS = "config.json", "sae.safetensors"
# rows are encoded in pieces, so that one (rows, F) buffer of pre-activations stays small
PIECE_ELEMENTS = 1 << 25
# of config.json: what the SAE itself decides
OWN_KEYS = (
    "format",
    "format_version",
    "variant",
    "options",
    "signed",
    "d_in",
    "d_sae",
    "dtype",
    "weights",
    "fingerprint",
)

# a threshold in bf16 would cut elsewhere, budgets would no longer add up
KEPT_WIDE = ("threshold", "budget")


class SAE(nn.Module):
    """codes = select((x − b_dec) W_encᵀ + b_enc) by the variant's inference rule,  x̂ = codes W_dec + b_dec

    Parameters: `W_enc` (F, D), `W_dec` (F, D) with rows of norm 1, `b_enc` (F), `b_dec` (D); `extra`: the variant's own
    tensors. `config` is the content of `config.json`, `options` what it says beside the variant's options. Inference is in the
    dtype of the weights, fp32 inside for narrower ones, and never depends on the rest of the batch.
    """

    def __init__(
        self,
        variant: Variant,
        W_enc_FD: Tensor,
        W_dec_FD: Tensor,
        b_enc_F: Tensor,
        b_dec_D: Tensor,
        config: dict | None = None,
        extra: dict[str, Tensor] | None = None,
        options: dict | None = None,
    ):
        super().__init__()
        self.variant = variant
        self.W_enc = nn.Parameter(W_enc_FD, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec_FD, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc_F, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec_D, requires_grad=False)
        self._extra = tuple(extra or ())
        for name, tensor in (extra or {}).items():
            self.register_buffer(name, tensor)
        self.config = config or {}
        self.options = options or {}
        self.path: Path | None = None

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[0]

    @property
    def site(self) -> str | None:
        return self.config.get("site")

    @property
    def fingerprint(self) -> str | None:
        return self.config.get("fingerprint")

    def has_unit_rows(self) -> bool:
        """Whether the rows of W_dec have norm 1, within 1e-4 and the rounding of their dtype."""
        tolerance = max(1e-4, torch.finfo(self.W_dec.dtype).eps)
        return bool(((self.W_dec.to(torch.float64).norm(dim=1) - 1).abs() <= tolerance).all())

    @property
    def extra(self) -> dict[str, Tensor]:
        """The variant's tensors that inference needs, such as thresholds."""
        return {name: getattr(self, name) for name in self._extra}

    def _apply(self, fn, recurse=True):
        wide = {name: t for name, t in self.extra.items() if name in KEPT_WIDE}
        super()._apply(fn, recurse)
        for name, before in wide.items():
            if torch.finfo(getattr(self, name).dtype).bits < 32:
                setattr(self, name, before.to(self.W_enc.device))
        return self

    def encode(self, x: Tensor) -> Codes:
        """Codes of x (…, D), leading dimensions flattened to tokens first.

        Raises SaekitError if the last dimension is not D.
        """
        if x.shape[-1] != self.d_in:
            raise SaekitError(f"SAE expects D = {self.d_in}, the input has width {x.shape[-1]}")
        x_BD = x.reshape(-1, self.d_in).to(self.W_enc.dtype)
        rows = max(1, PIECE_ELEMENTS // self.d_sae)
        parts = [self._encode(part) for part in x_BD.split(rows)]
        return parts[0] if len(parts) == 1 else Codes.concatenate(parts)

    def _encode(self, x_BD: Tensor) -> Codes:
        variant, dtype = self.variant, torch.promote_types(self.W_enc.dtype, torch.float32)
        # norms and magnitudes of narrow weights are computed in float32, as the products are
        extra = {name: t.to(dtype) for name, t in self.extra.items()}
        x_BD, b_dec = x_BD.to(dtype), self.b_dec.to(dtype)
        at = Moment(x_BD, b_dec, extra, len(x_BD), self.d_sae)
        if variant.select is not None:
            pre_BF = torch.addmm(self.b_enc.to(dtype), x_BD - b_dec, self.W_enc.T.to(dtype))
            codes = variant.select(pre_BF)
            codes = codes if isinstance(codes, Codes) else Codes.of_dense(codes)
            return codes.with_values(codes.values.to(self.W_enc.dtype))
        kept = encode_select(
            x_BD, self.W_enc, self.b_enc, self.b_dec, rule=variant.inference_rule(at), key=variant.key, compute="fp32"
        ).codes
        if variant.own_values and variant.values_at_inference:
            parameters = {**{name: p.to(dtype) for name, p in self.named_parameters()}, **extra}
            kept = kept.with_values(variant.values(inference_step(SparseSlots(kept), at, parameters)))
        return kept.with_values(kept.values.to(self.W_enc.dtype))

    def decode(self, codes: Codes) -> Tensor:
        """x̂ (tokens, D) of the codes."""
        return decode(codes, self.W_dec, self.b_dec).to(self.W_dec.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x̂, in the shape and dtype of x."""
        return self.decode(self.encode(x)).reshape(x.shape).to(x.dtype)

    def save(self, folder: str | Path) -> Path:
        """Writes `sae.safetensors`, then `config.json` with its checksum; each under a temporary name first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu() for name, t in self.state_dict().items()}
        write_tensors(folder / WEIGHTS, {name: _numpy(t) for name, t in tensors.items()})
        blob = (folder / WEIGHTS).read_bytes()
        config = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "variant": self.variant.name,
            "options": {**self.variant.inference_options(), **self.options},
            "signed": self.variant.signed,
            "d_in": self.d_in,
            "d_out": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "subtract_b_dec": True,
            "decoder_norm": "unit",
            "input_norm": {"kind": "none"},
            "heads": None,
            "site": None,
            "site_out": None,
            "model": None,
            "tokenizer": None,
            "context": None,
            "provenance": {"created_by": f"saekit {saekit.__version__}", "converted_from": None, "lost": []},
            **{k: v for k, v in self.config.items() if k not in OWN_KEYS},
            "weights": {"sha256": sha256(blob).hexdigest(), "bytes": len(blob)},
        }
        digest = sha256(canonical_json(config))
        digest.update(blob)
        config["fingerprint"] = f"sha256:{digest.hexdigest()}"
        atomic_write(folder / CONFIG, pretty_json(config))
        self.config, self.path = config, folder
        return folder

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> "SAE":
        """The SAE in `folder`. Raises SaekitError, one line each, for what is missing, foreign, newer or damaged."""
        folder = Path(folder)
        config = read_config(folder)
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise SaekitError(f"{weights} is missing; restore it or train again")
        if weights.stat().st_size != config["weights"]["bytes"]:
            raise SaekitError(
                f"{weights} has {weights.stat().st_size:,} bytes, config.json says {config['weights']['bytes']:,}; "
                "restore it or train again"
            )
        F, D = config["d_sae"], config["d_in"]
        try:
            variant = VARIANTS[config["variant"]].from_inference_options(config["options"], F)
        except KeyError as missing:
            raise SaekitError(f"{folder / CONFIG}: options lack {missing}; restore it or train again") from None
        shapes = {"W_enc": (F, D), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), **variant.saved_shapes(F, D)}
        tensors = _read_tensors(weights)
        for name, shape in shapes.items():
            if name not in tensors:
                raise SaekitError(f"{weights} has no tensor {name}; it is not an SAE of saekit")
            if tuple(tensors[name].shape) != shape:
                raise SaekitError(f"{weights}: {name} is {tuple(tensors[name].shape)}, expected {shape}")
        known = variant.inference_options()
        W_enc, W_dec, b_enc, b_dec = (tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
        extra = {name: tensors[name] for name in variant.saved}
        options = {k: v for k, v in config["options"].items() if k not in known}
        sae = cls(variant, W_enc, W_dec, b_enc, b_dec, config, extra, options)
        if config["decoder_norm"] == "unit" and not sae.has_unit_rows():
            raise SaekitError(f"{weights}: rows of W_dec do not have norm 1 as config.json says; restore it")
        sae.path = folder
        if options.get("threshold_source") == "running average":
            Progress.say(f"{folder}: its thresholds are running averages of training, not calibrated; L0 may be off")
        return sae.to(device)


def _wrong_values(sae: SAE) -> list[str]:
    """What cannot be in the tensors of an SAE."""
    problems = [
        f"{name} holds values that are not finite" for name, t in sae.state_dict().items() if not t.isfinite().all()
    ]
    if (threshold := sae.extra.get("threshold")) is not None:
        if (threshold < 0).any():
            problems.append(f"threshold goes down to {threshold.min():.3g}; it is 0 or more")
        if torch.finfo(threshold.dtype).bits < 32:
            problems.append(f"threshold is {str(threshold.dtype).removeprefix('torch.')}; it is float32 or wider")
    if isinstance(sae.variant, FeatureChoice):
        budget_F, k = sae.extra["budget"], sae.variant.k
        total = float(budget_F.double().sum())
        if (budget_F < 0).any() or (budget_F > 1).any():
            problems.append(
                f"budget goes from {budget_F.min():.3g} to {budget_F.max():.3g}; it is a share of the tokens"
            )
        if not abs(total / k - 1) < 1e-3:
            problems.append(f"budget adds up to {total:.4g} features per token, k is {k}")
    return problems


def _numpy(t: Tensor):
    """An array, or its bits and their tag where numpy lacks the type."""
    return (t.view(torch.uint16).numpy(), "BF16") if t.dtype == torch.bfloat16 else t.numpy()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tags = {name: entry.tag for name, entry in read_header(path).items()}
    tensors = {name: torch.from_numpy(array.copy()) for name, array in map_tensors(path).items()}
    return {name: t.view(torch.bfloat16) if tags[name] == "BF16" else t for name, t in tensors.items()}


def read_config(folder: str | Path) -> dict:
    """`config.json` of an SAE folder; SaekitError for a folder that is none, is unfinished, or is of a newer format."""
    folder = Path(folder)
    path = folder / CONFIG
    if not folder.is_dir():
        raise SaekitError(f"no such SAE folder: {folder}")
    if not path.is_file():
        if (folder / "run.json").is_file():
            raise SaekitError(f"{folder} is an unfinished run; its saekit train command, typed again, continues it")
        raise SaekitError(f"{folder} is not an SAE folder: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SaekitError(f"{path} is not valid JSON ({error}); restore it or train again") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise SaekitError(f"{folder} is not an SAE folder: config.json does not say {FORMAT}")
    if config.get("format_version") != FORMAT_VERSION:
        raise SaekitError(
            f"{folder} has SAE format {config.get('format_version')}, this saekit reads {FORMAT_VERSION}; upgrade saekit"
        )
    if config["variant"] not in VARIANTS:
        raise SaekitError(
            f"{folder}: variant {config['variant']} is not built in; pass --variant-file with the Python file that defines it, "
            "or call saekit.variants.files.load_variant_file"
        )
    return config


def check_sae(folder: str | Path) -> list[str]:
    """What is wrong with an SAE folder: weights against their checksum, names, shapes, values, unit decoder rows, and whether
    evaluation and index belong to it. Empty = sound."""
    folder = Path(folder)
    try:
        sae = SAE.load(folder)
    except SaekitError as error:
        return [str(error)]
    problems = []
    with Progress("check", (folder / WEIGHTS).stat().st_size >> 20, "MiB") as progress:
        digest = sha256_file(folder / WEIGHTS, lambda count: progress.advance(count >> 20))
    if digest != sae.config["weights"]["sha256"]:
        problems.append(f"{WEIGHTS} is damaged (sha256 differs)")
    problems += _wrong_values(sae)
    unknown = read_header(folder / WEIGHTS).keys() - sae.state_dict().keys()
    problems += [f"{WEIGHTS} holds {name}, which {sae.variant.name} does not have" for name in sorted(unknown)]
    for path, read in (
        ("evaluation.json", lambda c: c["sae"]["fingerprint"]),
        ("index/manifest.json", lambda c: c["fingerprints"]["sae"]),
    ):
        if (folder / path).is_file() and read(
            json.loads((folder / path).read_text(encoding="utf-8"))
        ) != sae.fingerprint:
            problems.append(f"{path} belongs to another SAE")
    return problems
