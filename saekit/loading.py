"""A name → the Transformers model and tokenizer that it stands for, or one line that says why not.

    hf, tokenizer = load("gpt2", device=torch.device("cpu"))
    hf, tokenizer = load("./ckpt", device=torch.device("cuda"), tokenizer="gpt2")

1. Name: `saekit:demo`, a `.gguf` file, a local folder in Hugging Face format, else the hub.
2. Class: a causal language model keeps its head; everything else, encoders above all, is loaded without one.
3. Weights: as they are in the checkpoint, each of them. A missing one is an error, never a fresh one.
"""

from pathlib import Path
from typing import Any

import torch

from saekit.errors import SaekitError
from saekit.progress import Progress
from saekit.store.format import human_bytes

DEMO = Path(__file__).parent / "demo" / "model"
FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError)
"""What Transformers raises for folders and names it cannot read."""


def load(
    name: str, *, device: torch.device, attention: str = "auto", tokenizer: str | None = None
) -> tuple[Any, Any | None]:
    """Model on the device, and its tokenizer, or the one named; None for a folder that holds none.

    Raises SaekitError if one of them cannot be loaded, if a weight is missing, or for an encoder-decoder.
    """
    import transformers
    from transformers.utils import logging

    folder, gguf = _where(name)
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    if attention == "eager":
        options["attn_implementation"] = attention
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        auto = transformers.AutoModelForCausalLM
        if gguf is None:
            options["config"] = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            auto = _door(name, options["config"])
        # without the flag, Transformers asks on the terminal whether to run a checkpoint's own code
        loaded: Any = auto.from_pretrained(
            folder, dtype="auto", output_loading_info=True, trust_remote_code=False, **options
        )
        hf, info = loaded
        found = load_tokenizer(tokenizer) if tokenizer else _tokenizer_beside(folder, gguf)
    except FAILURES as error:
        raise SaekitError(f"cannot load model {name}: {_why(error, folder)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    missing = set(info["missing_keys"])
    pooler = {key for key in missing if key.startswith("pooler.")}
    if pooler:
        # it stands behind all sites; many checkpoints lack it, and a fresh one would be other weights each time
        hf.pooler = None
        missing -= pooler
    if missing:
        raise SaekitError(
            f"cannot load model {name}: {len(missing)} weights are missing in it, {min(missing)} among them; "
            f"they would be random (loaded as {type(hf).__name__})"
        )
    return hf.to(device), found


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name. Raises SaekitError if there is none."""
    import transformers

    path = Path(name).expanduser()
    folder = path if path.is_dir() else name
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except FAILURES as error:
        raise SaekitError(f"cannot load tokenizer {name}: {_why(error, folder)}") from error


def _door(name: str, config) -> Any:
    """The class that loads it: with the head of a causal language model, or without any."""
    import transformers
    from transformers.models.auto import modeling_auto

    if config.is_encoder_decoder:
        raise SaekitError(
            f"cannot load model {name}: it is an encoder-decoder ({config.model_type}); load it in Python and pass its "
            f"encoder, (AutoModel.from_pretrained({name!r}).get_encoder(), tokenizer)"
        )
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    # a name that Transformers does not know says nothing about the attention
    named = [a for a in config.architectures or [] if hasattr(transformers, a)]
    encoder = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.model_type not in causal or (encoder and not getattr(config, "is_decoder", False)):
        return transformers.AutoModel
    if named and not any(a in causal.values() for a in named):
        return transformers.AutoModel
    return transformers.AutoModelForCausalLM


def _where(name: str) -> tuple[str | Path, str | None]:
    """Folder or hub name, and the .gguf file in it if that is what to read."""
    if name == "saekit:demo":
        if not (DEMO / "config.json").is_file():
            raise SaekitError(
                "saekit:demo is not part of this installation; install saekit again or name another model"
            )
        return DEMO, None
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise SaekitError(f"cannot load model {name}: no such file")
        _announce_gguf(path)
        return path.parent, path.name
    if path.is_dir():
        if (path / "config.json").is_file():
            return path, None
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            _announce_gguf(files[0])
            return path, files[0].name
        raise SaekitError(f"cannot load model {name}: no config.json there")
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SaekitError(f"cannot load model {name}: no such folder; give a folder, a .gguf file or a hub name")
    return name, None


def _announce_gguf(path: Path):
    """Says what the file will take, which may be eight times its size: its weights are unpacked to float32."""
    from importlib.util import find_spec

    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise SaekitError(f"reading {path} needs gguf and accelerate: pip install 'saekit[gguf]'")
    from gguf import GGUFReader

    try:
        weights = sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    except (ValueError, KeyError, IndexError) as error:
        raise SaekitError(f"cannot load model {path}: {one_line(error)}") from error
    Progress.say(f"{path}: {weights:,} weights, {human_bytes(4 * weights)} once unpacked to float32")


def _tokenizer_beside(folder: str | Path, gguf: str | None) -> Any | None:
    """The model's own tokenizer; None for a folder that holds none."""
    import transformers

    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
    if isinstance(folder, Path) and gguf is None and not any((folder / f).is_file() for f in files):
        return None
    options = {"gguf_file": gguf} if gguf else {}
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def _why(error: BaseException, folder: str | Path) -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if isinstance(folder, Path) or not isinstance(error, OSError):
        return one_line(error)
    if HF_HUB_OFFLINE:
        return "no such folder, and it is not in the local cache while HF_HUB_OFFLINE is set"
    return f"no such folder, and the hub says: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """The first line of its message that says something, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
