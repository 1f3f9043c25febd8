"""Encoders: loaded without a head and without chance, read like any other model, never taken for causal ones.

Oracles: Transformers' own hidden states, and TransformerLens' bridge for the names. All models are random, 2 layers of
width 64, with weights scaled up so that every token matters to every other.
"""

import pytest
import torch
import transformers as tf

from saekit.errors import SaekitError
from saekit.fingerprints import weights_fingerprint
from saekit.model import load_model

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
BART = {
    "vocab_size": 300,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 128,
}
T5 = {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

CONFIGS = {
    "bert": lambda: tf.BertConfig(**SIZES),
    "roberta": lambda: tf.RobertaConfig(**SIZES),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=300, dim=64, hidden_dim=128, n_layers=2, n_heads=4, max_position_embeddings=128
    ),
    "mpnet": lambda: tf.MPNetConfig(**SIZES),
    "electra": lambda: tf.ElectraConfig(**SIZES, embedding_size=32),
    "modernbert": lambda: tf.ModernBertConfig(**SIZES, **TOKENS),
    "deberta": lambda: tf.DebertaV2Config(**SIZES),
}
RESIDUAL = [f"blocks.{i}.hook_resid_{s}" for i in range(2) for s in ("pre", "post")]


def louder(model, seed: int = 0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.ndim == 2 else p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def tiny(config, auto=tf.AutoModel):
    torch.manual_seed(0)
    return louder(auto.from_config(config))


@pytest.fixture(scope="module")
def ids_BT():
    return torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    """A BERT as it is published: with the head of its pretraining, without a pooler, and a tokenizer with [CLS]."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "bert"
    louder(tf.BertForMaskedLM(tf.BertConfig(**SIZES))).save_pretrained(folder)
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "sat"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max() <= tolerance * b.abs().max()


# What is loaded


def test_a_folder_is_loaded_without_a_fresh_weight(bert_folder, ids_BT):
    """The checkpoint has no pooler: the model has none either, and twice loaded it is twice the same."""
    torch.manual_seed(1)
    lm = load_model(bert_folder, compute="fp32")
    torch.manual_seed(2)
    again = load_model(bert_folder, compute="fp32")
    assert lm.architecture == "BertModel" and lm.hf.pooler is None and not lm.causal
    assert lm.weights_fingerprint == again.weights_fingerprint == weights_fingerprint(lm.hf)
    reference = tf.AutoModelForMaskedLM.from_pretrained(bert_folder).bert
    assert lm.weights_fingerprint == weights_fingerprint(reference)
    with torch.no_grad():
        hidden = reference.eval()(ids_BT, output_hidden_states=True).hidden_states
    assert close(lm.capture(ids_BT, ["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"], hidden[2], 1e-5)


def test_a_pooler_that_is_there_stays(tmp_path):
    model = tiny(CONFIGS["bert"]())
    model.save_pretrained(tmp_path)
    lm = load_model(tmp_path, compute="fp32")
    assert lm.hf.pooler is not None and lm.weights_fingerprint == weights_fingerprint(model)


def test_another_missing_weight_is_an_error(bert_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(bert_folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((bert_folder / "config.json").read_bytes())
    with pytest.raises(SaekitError, match="1 weights are missing in it, encoder.layer.1.output.dense.bias among them"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "make, architecture, causal",
    [
        (lambda: tf.RobertaForMaskedLM(CONFIGS["roberta"]()), "RobertaModel", False),
        (lambda: tf.DistilBertForMaskedLM(CONFIGS["distilbert"]()), "DistilBertModel", False),
        (lambda: tf.ElectraForPreTraining(CONFIGS["electra"]()), "ElectraModel", False),
        # BERT's language-model class is an encoder unless it was made a decoder
        (lambda: tf.BertLMHeadModel(CONFIGS["bert"]()), "BertModel", False),
        (lambda: tf.BertLMHeadModel(tf.BertConfig(**SIZES, is_decoder=True)), "BertLMHeadModel", True),
        (lambda: tf.BartForCausalLM(tf.BartConfig(**BART)), "BartForCausalLM", True),
        # a causal model that was saved without its head has none
        (lambda: tf.LlamaModel(tf.LlamaConfig(**SIZES)), "LlamaModel", True),
        (lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZES, pad_token_id=0)), "LlamaModel", True),
        (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)), "LlamaForCausalLM", True),
    ],
)
def test_which_class_is_loaded(tmp_path, make, architecture, causal):
    louder(make()).save_pretrained(tmp_path)
    lm = load_model(tmp_path, compute="fp32")
    assert (lm.architecture, lm.causal) == (architecture, causal)


@pytest.mark.parametrize("architectures", [None, ["LLaMAForCausalLM"]])
def test_a_configuration_that_does_not_name_its_class(tmp_path, architectures):
    model = louder(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)))
    model.save_pretrained(tmp_path)
    model.config.architectures = architectures
    model.config.save_pretrained(tmp_path)
    assert load_model(tmp_path, compute="fp32").architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    ],
)
def test_encoder_decoders_are_refused_and_their_encoder_works(tmp_path, ids_BT, make):
    model = louder(make())
    model.save_pretrained(tmp_path)
    with pytest.raises(SaekitError, match=r"it is an encoder-decoder \(.*\.get_encoder\(\), tokenizer\)$") as error:
        load_model(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(SaekitError, match=r"ForConditionalGeneration is an encoder-decoder; give its encoder"):
        load_model((model, None))
    encoder = model.get_encoder()
    lm = load_model((encoder, None), compute="fp32")
    assert not lm.causal and lm.sites() == RESIDUAL
    with torch.no_grad():
        hidden = encoder(ids_BT, output_hidden_states=True).hidden_states
    assert close(lm.capture(ids_BT, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"], hidden[1], 1e-5)


def test_models_that_read_no_tokens():
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    vit = tf.ViTModel(tf.ViTConfig(**sizes, image_size=16, patch_size=8))
    with pytest.raises(SaekitError, match="ViTModel reads pixel_values, not token ids; collect from it as a module"):
        load_model((vit, None))
    with pytest.raises(SaekitError, match="Linear is no Transformers model; give one, or collect from it as a module"):
        load_model((torch.nn.Linear(2, 2), None))


def test_cls_and_sep_come_through_the_tokenizer(bert_folder):
    lm = load_model(bert_folder, compute="fp32")
    assert lm.tokenizer.cls_token_id == 1 and lm.tokenizer.sep_token_id == 2
    entry = lm.tokenizer_entry()
    assert (entry["bos"], entry["eos"], entry["pad"], entry["vocab_size"]) == (1, 2, 0, 7)


def test_there_is_no_head(bert_folder, ids_BT):
    lm = load_model(bert_folder, compute="fp32")
    for call in (lm.logits, lambda ids: lm.replace(ids, "blocks.0.hook_resid_post", lambda x: x)):
        with pytest.raises(SaekitError, match="BertModel has no language-model head; give a causal language model"):
            call(ids_BT)


# What it computes


@pytest.mark.parametrize("name", CONFIGS)
def test_residual_stream_is_transformers_hidden_states(ids_BT, name):
    model = tiny(CONFIGS[name]())
    lm = load_model((model, None), compute="fp32")
    assert lm.sites() == RESIDUAL
    x = lm.capture(ids_BT, RESIDUAL)
    with torch.no_grad():
        hidden = model(ids_BT, output_hidden_states=True).hidden_states
    assert close(x["blocks.0.hook_resid_pre"], hidden[0], 1e-5)
    assert close(x["blocks.0.hook_resid_post"], hidden[1], 1e-5)
    assert torch.equal(x["blocks.1.hook_resid_pre"], x["blocks.0.hook_resid_post"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_last_token_changes_the_first_row(ids_BT, name):
    lm = load_model((tiny(CONFIGS[name]()), None), compute="fp32")
    assert not lm.causal
    other_BT = ids_BT.clone()
    other_BT[:, -1] = (other_BT[:, -1] + 1) % 297 + 3
    site = "blocks.1.hook_resid_post"
    a, b = (lm.capture(ids, [site])[site][:, 0] for ids in (ids_BT, other_BT))
    assert ((a - b).norm(dim=1) > 1e-3 * a.norm(dim=1)).all()


def test_causality_is_tried_with_ids_that_are_no_padding():
    """XLM leaves its padding id, 2 here, out of attention unasked; the tried tokens hold none, so all of them are seen."""
    config = tf.XLMConfig(vocab_size=300, emb_dim=64, n_layers=2, n_heads=4)
    assert config.pad_token_id == 2
    assert not load_model((tiny(config), None), compute="fp32").causal


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_padding_never_changes_a_value(ids_BT, name, dtype):
    """Sequences of 24, 10 and 1 tokens, padded with whatever id stands there."""
    lm, lengths = load_model((tiny(CONFIGS[name]()), None), compute="fp32"), (24, 10, 1)
    mask_BT = (torch.arange(24) < torch.tensor(lengths)[:, None]).to(dtype)
    path = {"distilbert": "transformer.layer.0.ffn", "modernbert": "layers.0.mlp"}.get(name, "encoder.layer.0.output")
    sites = ["blocks.1.hook_resid_post", path]
    padded = lm.capture(ids_BT, sites, mask_BT)
    for i, n in enumerate(lengths):
        alone = lm.capture(ids_BT[i : i + 1, :n], sites)
        for site in sites:
            assert close(padded[site][i : i + 1, :n], alone[site], 1e-5), (site, n)


@pytest.mark.parametrize("name, auto", [("bert", tf.BertForMaskedLM), ("roberta", tf.RobertaForMaskedLM)])
def test_names_are_those_of_transformer_lens(tiny_model, ids_BT, name, auto):
    """In a BERT the stream between blocks is what the norm behind the MLP returns; TransformerLens says so too."""
    from transformer_lens.model_bridge import TransformerBridge

    hf = tiny(CONFIGS[name](), tf.AutoModelForMaskedLM)
    assert isinstance(hf, auto)
    x = load_model((hf, None), compute="fp32").capture(ids_BT, RESIDUAL)
    hf.config.architectures = [auto.__name__]
    bridge = TransformerBridge.boot_transformers(
        str(tiny_model), hf_model=hf, tokenizer=tf.AutoTokenizer.from_pretrained(tiny_model)
    )
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids_BT)
    for site, value in x.items():
        assert (value - cache[site]).norm() <= 1e-5 * cache[site].norm(), site


def test_other_hook_names_are_refused(ids_BT):
    """What attention adds is normalised together with the stream: no module of a BERT returns that quantity."""
    lm = load_model((tiny(CONFIGS["bert"]()), None), compute="fp32")
    for kind in ("attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_mlp_out"):
        with pytest.raises(SaekitError) as error:
            lm.check_site(f"blocks.1.{kind}")
        assert str(error.value) == (
            f"blocks.1.{kind} is not known for Bert (bert); use hook_resid_pre or hook_resid_post or a module path"
        )


# Module paths


def test_a_module_path(ids_BT):
    model, path = tiny(CONFIGS["bert"](), tf.AutoModelForMaskedLM), "encoder.layer.1.attention.output"
    lm, seen = load_model((model, None), compute="fp32"), []
    site = lm.check_site(path)
    assert (site.name, site.d, site.layer) == (path, 64, 1)
    handle = model.bert.encoder.layer[1].attention.output.register_forward_hook(lambda _, args, y: seen.append(y))
    with torch.no_grad():
        logits = model(ids_BT).logits
    handle.remove()
    for name in (path, f"bert.{path}"):
        assert torch.equal(lm.capture(ids_BT, [name])[name], seen[0])
    assert torch.equal(lm.replace(ids_BT, path, lambda x: x), logits)
    assert not close(lm.replace(ids_BT, path, lambda x: x.flip(-1)), logits)
    with pytest.raises(SaekitError, match=r"^no site encoder.layer.1.attention.outptu; nearest: encoder.layer.1.att"):
        lm.check_site("encoder.layer.1.attention.outptu")


@pytest.mark.parametrize(
    "path, message",
    [
        ("pooler", "pooler returns shape (2, 64), not (B, T, D) with B = 2, T = 4; nearest: "),
        (
            "embeddings.position_embeddings",
            "embeddings.position_embeddings returns shape (1, 4, 64), not (B, T, D) with B = 2, T = 4; nearest: ",
        ),
        (
            "encoder.layer.0.attention.self.dropout",
            "encoder.layer.0.attention.self.dropout does not run in a forward pass; nearest: encoder.layer.0.attention.",
        ),
        ("encoder", "encoder returns a BaseModelOutput"),
    ],
)
def test_modules_that_are_no_sites(path, message):
    lm = load_model((tiny(CONFIGS["bert"]()), None), compute="fp32")
    with pytest.raises(SaekitError) as error:
        lm.check_site(path)
    assert str(error.value).startswith(message)
    for suggested in str(error.value).partition("nearest: ")[2].split(", "):
        assert lm.check_site(suggested).d > 0


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_layer_that_is_used_again_and_again(blocks):
    """ALBERT runs its one group twice, of one or two blocks: a name inside it would mean two quantities."""
    config = tf.AlbertConfig(**SIZES, embedding_size=32, inner_group_num=blocks)
    lm = load_model((tiny(config), None), compute="fp32")
    assert lm.sites() == []
    with pytest.raises(SaekitError, match="^encoder.albert_layer_groups.0 runs 2 times in one forward pass; nearest: "):
        lm.check_site("encoder.albert_layer_groups.0")
    with pytest.raises(SaekitError, match="^blocks.0.hook_resid_post is not one tensor in Albert; use a module path$"):
        lm.check_site("blocks.0.hook_resid_post")


# Length


@pytest.mark.parametrize("name, longest", [("bert", 128), ("roberta", 126), ("mpnet", 126), ("electra", 128)])
def test_the_longest_sequence(name, longest):
    """128 rows of positions; RoBERTa and MPNet count from the one behind the padding id, 1, so two rows are spare."""
    lm = load_model((tiny(CONFIGS[name]()), None), compute="fp32")
    assert lm.max_context == longest
    ids_BT = torch.full((1, longest + 1), 7)
    assert lm.capture(ids_BT[:, :-1], ["blocks.0.hook_resid_pre"])
    with pytest.raises((IndexError, RuntimeError)):
        lm.capture(ids_BT, ["blocks.0.hook_resid_pre"])


def test_a_length_without_limit():
    """XLNet says -1, T5 says nothing."""
    xlnet = tf.XLNetModel(tf.XLNetConfig(vocab_size=300, d_model=64, n_layer=2, n_head=4, d_inner=128))
    for model in (xlnet, tf.T5EncoderModel(tf.T5Config(**T5))):
        assert load_model((model.eval(), None), compute="fp32").max_context is None
