"""Sites mean the same in every architecture, replacing does what it says, and the caller's model stays as it was.

Oracles: Transformers' own hidden states under eager attention, TransformerLens' bridge for the names, and the residual
stream's arithmetic. All models are random, 2 layers of width 64, with weights scaled up so that nothing is negligible.
"""

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers as tf
from torch import nn

from saekit.errors import SaekitError
from saekit.fingerprints import tokenizer_fingerprint, weights_fingerprint
from saekit.model import LAYOUTS, load_model
from saekit.progress import Progress

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
PLAIN = {k: v for k, v in SIZES.items() if k != "intermediate_size"}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**GROUPED),
    "mistral": lambda: tf.MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "qwen3": lambda: tf.Qwen3Config(**GROUPED),
    "gemma": lambda: tf.GemmaConfig(**GROUPED, pad_token_id=0),
    "gemma2": lambda: tf.Gemma2Config(**GROUPED, pad_token_id=0, sliding_window=8, final_logit_softcapping=5.0),
    "gemma3_text": lambda: tf.Gemma3TextConfig(**GROUPED, pad_token_id=0, sliding_window=8),
    "olmo2": lambda: tf.Olmo2Config(**GROUPED, pad_token_id=0),
    "granite": lambda: tf.GraniteConfig(
        **GROUPED, embedding_multiplier=12.0, residual_multiplier=0.25, logits_scaling=8.0, attention_multiplier=0.1
    ),
    "phi": lambda: tf.PhiConfig(**SIZES),
    "gpt2": lambda: tf.GPT2Config(**PLAIN),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZES),
    "gpt_neox, one after the other": lambda: tf.GPTNeoXConfig(**SIZES, use_parallel_residual=False),
    "bloom": lambda: tf.BloomConfig(
        vocab_size=300, hidden_size=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
    ),
}


def tiny(config, seed: int = 0):
    """A random causal model: matrices four times as large as fresh ones, gains and biases moved off 1 and 0."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.ndim == 2 else p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads have nothing to share in tensors this small, and wait for each other where other programs run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models():
    """name -> LanguageModel, each built once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = load_model((tiny(CONFIGS[name]()), None), compute="fp32")
        return made[name]

    return get


@pytest.fixture(scope="module")
def ids_BT():
    return torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(1))


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max() <= tolerance * b.abs().max()


def test_every_layout_is_proven_here():
    assert set(LAYOUTS) == {name.split(",")[0] for name in CONFIGS}


@pytest.mark.parametrize("name", CONFIGS)
def test_residual_stream_is_transformers_hidden_states(models, ids_BT, name):
    lm = models(name)
    reference = copy.deepcopy(lm.hf)
    # eager is another implementation than the one that collects, wherever the model has both
    reference.set_attn_implementation("eager")
    with torch.no_grad():
        hidden = reference(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
    x = lm.capture(ids_BT, lm.sites())
    for i in range(2):
        assert close(x[f"blocks.{i}.hook_resid_pre"], hidden[i])
    assert close(x["blocks.0.hook_resid_post"], hidden[1])
    # behind the last layer Transformers has applied the final norm
    final = lm._decoder.get_submodule(lm._layout.norm)
    with torch.no_grad():
        assert close(final(x["blocks.1.hook_resid_post"]), hidden[2])


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_add_up_to_the_stream(models, ids_BT, name):
    lm = models(name)
    x = lm.capture(ids_BT, lm.sites())
    parallel = "blocks.0.hook_resid_mid" not in x
    assert parallel == (name in ("phi", "gpt_neox"))
    position = lm.hf.transformer.wpe(torch.arange(24)) if name == "gpt2" else 0
    assert close(x["hook_embed"] + position, x["blocks.0.hook_resid_pre"], 1e-6)
    for i in range(2):
        pre, post, attn, mlp = (x[f"blocks.{i}.hook_{s}"] for s in ("resid_pre", "resid_post", "attn_out", "mlp_out"))
        assert close(pre + attn + mlp, post, 1e-5)
        if not parallel:
            assert close(pre + attn, x[f"blocks.{i}.hook_resid_mid"], 1e-5)
            assert close(x[f"blocks.{i}.hook_resid_mid"] + mlp, post, 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_and_neurons_are_what_the_last_projections_read(models, ids_BT, name):
    lm = models(name)
    x = lm.capture(ids_BT, lm.sites())
    block, layout = lm._blocks[1], lm._layout
    scale = 0.25 if name == "granite" else 1.0
    for site, path, out, behind in (
        ("attn.hook_z", layout.z, "hook_attn_out", layout.attn_out),
        ("mlp.hook_post", layout.post, "hook_mlp_out", layout.mlp_out),
    ):
        with torch.no_grad():
            y = block.get_submodule(path)(x[f"blocks.1.{site}"])
            # Gemma 2, Gemma 3 and OLMo 2 normalise what a part adds
            y = block.get_submodule(behind)(y) if "norm" in behind else y
        assert close(y * scale, x[f"blocks.1.{out}"], 1e-5)
    z = lm.check_site("blocks.1.attn.hook_z")
    assert (z.d, z.heads, z.d_head) == (64, 4, 16)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "granite", "phi", "gpt2", "gpt_neox", "bloom"])
def test_names_are_those_of_transformer_lens(models, ids_BT, tiny_model, name):
    from transformer_lens.model_bridge import TransformerBridge

    lm = models(name)
    x = lm.capture(ids_BT, lm.sites())
    hf = copy.deepcopy(lm.hf)
    hf.config.architectures = [lm.architecture]
    bridge = TransformerBridge.boot_transformers(
        str(tiny_model), hf_model=hf, tokenizer=tf.AutoTokenizer.from_pretrained(tiny_model)
    )
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids_BT)
    for site, value in x.items():
        theirs = cache[site].reshape(value.shape)
        assert (value - theirs).norm() <= 1e-5 * theirs.norm(), site


@pytest.mark.parametrize("name", CONFIGS)
def test_each_offered_site_is_there(models, ids_BT, name):
    lm = models(name)
    for site, x in lm.capture(ids_BT, lm.sites()).items():
        assert x.shape == (2, 24, lm.check_site(site).d), site
        assert x.isfinite().all() and (x.abs().sum(-1) > 0).all(), site
    logits = lm.logits(ids_BT)
    for site in lm.sites():
        if not site.startswith("blocks.0."):
            assert torch.equal(lm.replace(ids_BT, site, lambda x: x), logits), site
            # turned round, because a norm behind the site would hide another length
            assert not close(lm.replace(ids_BT, site, lambda x: x.flip(-1)), logits), site


@pytest.mark.parametrize("name", CONFIGS)
def test_one_change_at_places_that_are_the_same(models, ids_BT, name):
    """x + δ at the embedding is x + δ before block 0; at what a part adds it is x + δ behind the part."""
    lm = models(name)
    delta = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(2))

    def moved(site):
        return lm.replace(ids_BT, site, lambda x: x + delta)

    assert close(moved("hook_embed"), moved("blocks.0.hook_resid_pre"))
    assert close(moved("blocks.0.hook_resid_post"), moved("blocks.1.hook_resid_pre"))
    assert close(moved("blocks.1.hook_mlp_out"), moved("blocks.1.hook_resid_post"))
    if "blocks.1.hook_resid_mid" in lm.sites():
        assert close(moved("blocks.1.hook_attn_out"), moved("blocks.1.hook_resid_mid"))
        assert not close(moved("blocks.1.hook_mlp_out"), moved("blocks.1.hook_resid_mid"))
    else:
        assert close(moved("blocks.1.hook_attn_out"), moved("blocks.1.hook_resid_post"))


def test_replaced_value_arrives_and_leaves_no_trace(models, ids_BT):
    lm = models("llama")
    before = lm.logits(ids_BT)
    seen = {}
    handle = lm.hf.model.layers[1].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: seen.__setitem__("mid", args[0].clone())
    )
    lm.replace(ids_BT, "blocks.1.hook_resid_pre", lambda x: torch.ones_like(x))
    lm.replace(ids_BT, "blocks.1.hook_attn_out", lambda x: torch.zeros_like(x))
    pre = lm.capture(ids_BT, ["blocks.1.hook_resid_pre"])["blocks.1.hook_resid_pre"]
    # without attention the middle of the block is its beginning
    assert torch.equal(seen["mid"], pre)
    handle.remove()
    assert torch.equal(lm.logits(ids_BT), before)


def test_architectures_without_a_layout_have_the_residual_stream_alone(ids_BT):
    configs = [
        tf.MixtralConfig(**{k: v for k, v in GROUPED.items() if k != "head_dim"}, num_local_experts=2),
        # layer 0 has no attention
        tf.Lfm2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}, layer_types=["conv", "full_attention"]),
    ]
    for config in configs:
        lm = load_model((tiny(config), None), compute="fp32")
        assert lm.sites() == [f"blocks.{i}.hook_resid_{s}" for i in range(2) for s in ("pre", "post")]
        x = lm.capture(ids_BT, lm.sites())
        with torch.no_grad():
            hidden = copy.deepcopy(lm.hf)(ids_BT, output_hidden_states=True, use_cache=False).hidden_states
        assert close(x["blocks.1.hook_resid_pre"], hidden[1])
        with pytest.raises(
            SaekitError,
            match=r"blocks.0.hook_attn_out is not known for .*; use hook_resid_pre or hook_resid_post or a module path",
        ):
            lm.check_site("blocks.0.hook_attn_out")


def test_a_hybrid_offers_at_each_layer_what_runs_there(ids_BT):
    """Layer 0 of this LFM2 has a convolution, layer 1 attention: neither has the other's modules."""
    config = tf.Lfm2Config(
        **{k: v for k, v in GROUPED.items() if k != "head_dim"}, layer_types=["conv", "full_attention"]
    )
    lm = load_model((tiny(config), None), compute="fp32")
    paths = ["layers.0.conv", "layers.1.self_attn", "layers.0.feed_forward", "layers.1.feed_forward"]
    for site, x in lm.capture(ids_BT, lm.sites() + paths).items():
        assert x.shape == (2, 24, 64) and (x.abs().sum(-1) > 0).all(), site
    for name in ("layers.0.self_attn", "layers.1.conv", "blocks.0.attn.hook_result", "blocks.1.hook_mlp_in"):
        with pytest.raises(SaekitError, match=f"^no site {name}; nearest: ") as error:
            lm.check_site(name)
        suggested = str(error.value).partition("nearest: ")[2].split(", ")
        for site, x in lm.capture(ids_BT, suggested).items():
            assert (x.abs().sum(-1) > 0).all(), site
    # its forward pass calls the weights of this module, not the module
    with pytest.raises(
        SaekitError, match=r"^layers.0.conv.conv does not run in a forward pass; nearest: layers.0.conv"
    ):
        lm.check_site("layers.0.conv.conv")


def test_one_block_in_two_places_has_no_hook_names(ids_BT):
    """A name inside a block would mean two places of the pass."""
    model = tiny(CONFIGS["llama"]())
    model.model.layers[1] = model.model.layers[0]
    lm = load_model((model, None), compute="fp32")
    assert lm.sites() == []
    with pytest.raises(SaekitError, match="blocks.1.hook_resid_post is not one tensor in Llama; use a module path"):
        lm.check_site("blocks.1.hook_resid_post")
    with pytest.raises(SaekitError, match=r"^layers.0.mlp runs 2 times in one forward pass; nearest: "):
        lm.check_site("layers.0.mlp")


# Module paths


def test_a_module_path_is_what_the_module_returns(models, ids_BT):
    lm, seen = models("llama"), {}
    # from the model as loaded, and from its base model; attention returns a tuple
    paths = {"model.layers.1.self_attn": 64, "layers.1.self_attn": 64, "layers.1.mlp.up_proj": 128, "norm": 64}
    modules = {path: lm.hf.get_submodule(path if path.startswith("model.") else f"model.{path}") for path in paths}
    handles = [
        module.register_forward_hook(
            lambda _, args, y, path=path: seen.__setitem__(path, y[0] if isinstance(y, tuple) else y)
        )
        for path, module in modules.items()
    ]
    with torch.no_grad():
        logits = lm.hf(ids_BT, use_cache=False).logits
    for handle in handles:
        handle.remove()
    x = lm.capture(ids_BT, list(paths))
    for path, d in paths.items():
        assert torch.equal(x[path], seen[path]) and x[path].shape == (2, 24, d) and lm.check_site(path).d == d
    assert (lm.check_site("layers.1.mlp").layer, lm.check_site("norm").layer) == (1, -1)
    # a path may lie in the head
    assert torch.equal(lm.capture(ids_BT, ["lm_head"])["lm_head"], logits)


def test_replacing_at_a_module_path(models, ids_BT):
    """In a Llama these modules return what attention and MLP add, which have hook names as well."""
    lm = models("llama")
    for path, name in (
        ("layers.0.self_attn", "blocks.0.hook_attn_out"),
        ("model.layers.1.mlp", "blocks.1.hook_mlp_out"),
    ):
        assert torch.equal(lm.replace(ids_BT, path, lambda x: x), lm.logits(ids_BT))
        assert torch.equal(lm.replace(ids_BT, path, lambda x: 2 * x), lm.replace(ids_BT, name, lambda x: 2 * x))
        assert not close(lm.replace(ids_BT, path, lambda x: 2 * x), lm.logits(ids_BT))


def test_blocks_may_be_a_module_path_too(ids_BT):
    """The base model of MPT calls its layers `blocks`; TransformerLens' names go first."""
    lm = load_model((tiny(tf.MptConfig(vocab_size=300, d_model=64, n_layers=2, n_heads=4)), None), compute="fp32")
    x = lm.capture(ids_BT, ["blocks.1.ffn.up_proj", "blocks.1.hook_resid_post"])
    assert x["blocks.1.ffn.up_proj"].shape == (2, 24, 256)
    with pytest.raises(SaekitError, match=r"^no site blocks.1.ffn.up; nearest: blocks.1.ffn, blocks.1.ffn.up_proj, "):
        lm.check_site("blocks.1.ffn.up")


def test_a_value_that_is_overwritten_later_in_the_pass(ids_BT):
    """Falcon adds attention to what its MLP returned, in place: several sites in one pass equal each one alone."""
    config = tf.FalconConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    lm = load_model((tiny(config), None), compute="fp32")
    sites = ["h.0.mlp", "h.1.mlp", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    together = lm.capture(ids_BT, sites)
    for site in sites:
        assert torch.equal(together[site], lm.capture(ids_BT, [site])[site]), site


@pytest.mark.parametrize(
    "site, message",
    [
        ("layers.1.mlpp", "no site layers.1.mlpp; nearest: layers.1.mlp, "),
        ("model.layers.2.mlp", "no site model.layers.2.mlp; nearest: model.layers."),
        ("layers", "layers does not run in a forward pass; nearest: layers."),
        ("model", "model returns a BaseModelOutputWithPast; nearest: "),
        ("rotary_emb", "rotary_emb returns shape (1, 4, 16), not (B, T, D) with B = 2, T = 4; nearest: "),
        ("", "no site ; nearest: "),
    ],
)
def test_modules_that_are_no_sites(models, site, message):
    lm = models("llama")
    with pytest.raises(SaekitError) as error:
        lm.check_site(site)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    for suggested in str(error.value).partition("nearest: ")[2].split(", "):
        assert lm.check_site(suggested).name == suggested


@pytest.mark.parametrize(
    "model, site, message",
    [
        (
            "llama",
            "blocks.1.hook_resid_pst",
            "no site blocks.1.hook_resid_pst; nearest: blocks.1.hook_resid_post, blocks.1.hook_resid_pre, "
            "blocks.1.hook_resid_mid",
        ),
        ("llama", "blocks.40.hook_resid_post", "blocks.40.hook_resid_post: the model has 2 layers (0 to 1)"),
        (
            "gpt_neox",
            "blocks.1.hook_resid_mid",
            "blocks.1.hook_resid_mid does not exist in a parallel-attention model (GPTNeoX); "
            "use hook_resid_pre or hook_resid_post",
        ),
        (
            "phi",
            "blocks.0.hook_resid_mid",
            "blocks.0.hook_resid_mid does not exist in a parallel-attention model (Phi)",
        ),
        ("llama", "blocks.1.attn.hook_result", "no site blocks.1.attn.hook_result; nearest: "),
        ("llama", "blocks.1.hook_mlp_in", "no site blocks.1.hook_mlp_in; nearest: "),
        ("llama", "blocks.1.hook_q_input", "no site blocks.1.hook_q_input; nearest: "),
        ("llama", "../x", "no site ../x; nearest: "),
    ],
)
def test_other_names_are_refused_in_one_line(models, model, site, message):
    lm = models(model)
    with pytest.raises(SaekitError) as error:
        lm.check_site(site)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    for suggested in str(error.value).partition("nearest: ")[2].split(", "):
        assert not suggested or lm.check_site(suggested).name == suggested


def test_the_pass_ends_at_the_last_site(models, ids_BT):
    lm = models("llama")
    calls = []
    watched = {"layer 0": lm.hf.model.layers[0], "layer 1": lm.hf.model.layers[1], "norm": lm.hf.model.norm}
    watched |= {"attention 1": lm.hf.model.layers[1].self_attn, "head": lm.hf.lm_head}
    handles = [m.register_forward_pre_hook(lambda *_, n=n: calls.append(n)) for n, m in watched.items()]
    lm.capture(ids_BT, ["hook_embed", "blocks.0.hook_resid_post"])
    assert calls == ["layer 0"]
    calls.clear()
    # the input of block 1 is read at its door
    lm.capture(ids_BT, ["blocks.1.hook_resid_pre", "blocks.0.mlp.hook_post"])
    assert calls == ["layer 0", "layer 1"]
    calls.clear()
    lm.capture(ids_BT, ["blocks.1.hook_resid_post"])
    assert calls == ["layer 0", "layer 1", "attention 1"]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("layers, name", [(1, "mistral"), (1, "gemma3_text")])
def test_a_sliding_window_hides_what_lies_before_it(layers, name):
    """Window 8: position 13 is the first whose eight keys 6 to 13 leave out token 5."""
    config = CONFIGS[name]()
    config.num_hidden_layers = layers
    if name == "gemma3_text":
        config.layer_types = ["sliding_attention"]
    lm = load_model((tiny(config), None), compute="fp32")
    ids_BT = torch.randint(2, 300, (1, 64), generator=torch.Generator().manual_seed(3))
    other_BT = ids_BT.clone()
    other_BT[0, 5] = (other_BT[0, 5] + 1) % 300
    a, b = (lm.capture(ids, ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"][0] for ids in (ids_BT, other_BT))
    changed = (a - b).abs().amax(1) > 1e-5
    assert changed.tolist() == [5 <= p <= 12 for p in range(64)]


def test_batching_never_changes_a_value(models, ids_BT):
    site = "blocks.1.hook_resid_post"
    for name in ("llama", "gpt2", "gemma3_text"):
        lm = models(name)
        whole = lm.capture(ids_BT, [site])[site]
        alone = torch.cat([lm.capture(row[None], [site])[site] for row in ids_BT])
        assert close(alone, whole, 1e-5)
        # right padding stands behind every token that counts
        short = lm.capture(ids_BT[:1, :10], [site])[site]
        assert close(short, whole[:1, :10], 1e-5)


def state_of(model):
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()]
    return hooks, model.config._attn_implementation, model.config.use_cache, next(model.parameters()).dtype


def test_the_callers_model_is_left_as_it_was_found(ids_BT):
    model = tiny(CONFIGS["llama"]())
    model.set_attn_implementation("eager")
    model.train()
    model.model.layers[0].eval()
    before, fingerprint = state_of(model), weights_fingerprint(model)
    lm = load_model((model, None), compute="fp32")
    assert lm.hf is model and lm.attention == "sdpa"

    def inside(x):
        assert model.config._attn_implementation == "sdpa" and not model.training
        return x

    lm.replace(ids_BT, "blocks.0.hook_resid_post", inside)
    lm.capture(ids_BT, lm.sites())
    assert lm.causal
    assert state_of(model) == before

    def fail(x):
        raise KeyError("inside a pass")

    with pytest.raises(KeyError):
        lm.replace(ids_BT, "blocks.0.hook_resid_mid", fail)
    assert state_of(model) == before and weights_fingerprint(model) == fingerprint


def test_which_attention_runs(models, ids_BT, tiny_model):
    site = "blocks.1.hook_resid_post"
    model = tiny(CONFIGS["llama"]())
    before = state_of(model)
    lm = load_model((model, None), compute="fp32", attention="eager")
    assert lm.attention == lm.manifest_entry()["attention"] == "eager"
    # the two compute the same by other arithmetic
    x, y = lm.capture(ids_BT, [site])[site], models("llama").capture(ids_BT, [site])[site]
    assert close(x, y, 1e-5) and not torch.equal(x, y)
    assert state_of(model) == before
    lm = load_model(tiny_model, compute="fp32", attention="eager")
    assert lm.hf.config._attn_implementation == "eager"

    mpt = tiny(tf.MptConfig(vocab_size=300, d_model=64, n_layers=2, n_heads=4))
    assert load_model((mpt, None), compute="fp32").attention == "eager"
    with pytest.raises(SaekitError, match="--attention sdpa: MptForCausalLM has none; use --attention eager"):
        load_model((mpt, None), compute="fp32", attention="sdpa")
    with pytest.raises(SaekitError, match="attention flash is not known; choose auto, sdpa or eager"):
        load_model((mpt, None), compute="fp32", attention="flash")


def test_attention_that_does_not_change_is_refused(monkeypatch):
    """What is recorded is read back: this model ignores the request, as models of an older make do."""
    model = tiny(CONFIGS["llama"]())
    model.set_attn_implementation("eager")
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda self, name: None)
    with pytest.raises(SaekitError, match="attention of LlamaForCausalLM is eager and cannot be changed to sdpa; pass"):
        load_model((model, None), compute="fp32")
    assert load_model((model, None), compute="fp32", attention="eager").attention == "eager"


def test_a_loaded_model_is_not_loaded_again(models, tiny_model):
    lm = models("llama")
    assert load_model(lm, compute="fp32", attention="sdpa") is lm
    for options in ({"compute": "bf16"}, {"attention": "eager"}, {"tokenizer": str(tiny_model)}):
        with pytest.raises(SaekitError, match="LlamaForCausalLM was loaded with .*; give load_model "):
            load_model(lm, **options)


def test_exact_mode_of_a_half_precision_object_with_eager_attention(ids_BT):
    """The copy has the attention that is recorded; the original keeps its own."""
    model = tiny(CONFIGS["llama"]()).to(torch.bfloat16)
    model.set_attn_implementation("eager")
    lm = load_model((model, None), compute="fp32")
    assert lm.attention == "sdpa" and lm.logits(ids_BT).dtype == torch.float32
    assert model.config._attn_implementation == "eager"


def test_a_half_precision_object_is_copied_for_exact_mode():
    model = tiny(CONFIGS["llama"]()).to(torch.bfloat16)
    lm = load_model((model, None), compute="fp32")
    assert lm.compute == "fp32" and lm.hf is not model
    assert next(model.parameters()).dtype == torch.bfloat16 and next(lm.hf.parameters()).dtype == torch.float32
    # taken before the cast
    assert lm.weights_fingerprint == weights_fingerprint(model)


def test_bf16_is_refused_where_it_has_no_units(monkeypatch):
    model = tiny(CONFIGS["llama"]())
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert load_model((model, None)).compute == "fp32"
    with pytest.raises(
        SaekitError, match="--compute bf16: this CPU has neither AMX nor AVX512-BF16.*; use --compute fp32"
    ):
        load_model((model, None), compute="bf16")


def test_which_bf16_runs(monkeypatch, tiny_model):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    model = tiny(CONFIGS["llama"]())
    # a caller's fp32 object is never cast; a checkpoint of small layers is; a bf16 one runs as it is
    assert load_model((model, None)).compute == "bf16-autocast"
    assert load_model((copy.deepcopy(model).to(torch.bfloat16), None)).compute == "bf16"
    lm = load_model(tiny_model)
    assert lm.compute == "bf16" and next(lm.hf.parameters()).dtype == torch.bfloat16
    # rotary angles stay exact
    assert lm.hf.model.rotary_emb.inv_freq.dtype == torch.float32
    assert next(model.parameters()).dtype == torch.float32


# Heads


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gpt2", "phi", "gpt_neox", "olmo2", "bloom"])
def test_unembedding_agrees_with_the_models_logits(models, ids_BT, name):
    """Where no soft cap bends the logits, they are (x − mean) / σ of the last stream times W_U, centred, plus biases."""
    lm = models(name)
    W_U_VD, note = lm.unembedding()
    site = "blocks.1.hook_resid_post"
    x_TD = lm.capture(ids_BT[:1], [site])[site][0]
    logits_TV = lm.logits(ids_BT[:1])[0]
    if name == "gemma2":
        assert note == "before the model's soft cap of the logits at ±5"
        logits_TV = 5 * torch.atanh(logits_TV / 5)
    else:
        assert note == ""
    assert close(lm.unembedding([7, 299, 7]).W_U_VD, W_U_VD[[7, 299, 7]], 1e-5)
    norm = lm._decoder.get_submodule(lm._layout.norm)
    if isinstance(norm, nn.LayerNorm):
        sigma = (x_TD.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
        bias_V = lm.hf.get_output_embeddings().weight @ norm.bias
        head_bias = lm.hf.get_output_embeddings().bias
        bias_V = bias_V if head_bias is None else bias_V + head_bias
    else:
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        sigma, bias_V = (x_TD.square().mean(-1, keepdim=True) + eps).sqrt(), torch.zeros(300)
    expected = (logits_TV - bias_V) - (logits_TV - bias_V).mean(-1, keepdim=True)
    assert close((x_TD / sigma) @ W_U_VD.T, expected, 1e-3)


def test_logits_are_those_of_the_model(models, ids_BT):
    lm = models("gemma2")
    with torch.no_grad():
        assert torch.equal(lm.logits(ids_BT), lm.hf(ids_BT, use_cache=False).logits)


def test_attention_is_tried_for_causality():
    assert load_model((tiny(CONFIGS["gpt2"]()), None), compute="fp32").causal
    encoder = tf.BertLMHeadModel(tf.BertConfig(**SIZES)).eval()
    assert not load_model((encoder, None), compute="fp32").causal
    config = CONFIGS["gemma3_text"]()
    config.use_bidirectional_attention = True
    assert not load_model((tiny(config), None), compute="fp32").causal


# Loading and fingerprints


def test_a_folder(tiny_model, ids_BT):
    lm = load_model(str(tiny_model), compute="fp32")
    reference = tf.AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        assert close(lm.logits(ids_BT), reference(ids_BT).logits, 1e-5)
    assert lm.manifest_entry() == {
        "id": str(tiny_model),
        "revision": None,
        "weights_fingerprint": weights_fingerprint(reference),
        "architecture": "LlamaForCausalLM",
        "layers": 2,
        "d_model": 64,
        "processing": "raw",
        "compute": "fp32",
        "attention": "sdpa",
    }
    entry = lm.tokenizer_entry()
    assert (entry["vocab_size"], entry["bos"], entry["eos"], entry["pad"]) == (300, 0, 1, None)
    assert load_model(lm) is lm


def test_models_that_cannot_be_loaded(tiny_model, tmp_path):
    def message(name, **options):
        with pytest.raises(SaekitError) as error:
            load_model(name, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message("./ckpt").startswith("cannot load model ./ckpt: no such folder")
    (tmp_path / "empty").mkdir()
    assert message(tmp_path / "empty") == f"cannot load model {tmp_path}/empty: no config.json there"
    assert "not in the local cache while HF_HUB_OFFLINE is set" in message("nobody/nothing")
    assert message("x.gguf") == "cannot load model x.gguf: no such file"
    assert message(str(tiny_model), compute="int8") == "compute int8 is not known; choose auto, bf16 or fp32"
    assert message(str(tiny_model), device="cuda:77").startswith("device cuda:77 is not available here; pass --device")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert message(tmp_path / "broken").startswith(f"cannot load model {tmp_path}/broken: ")


def test_a_missing_weight_is_an_error(tiny_model, tmp_path):
    """Never a fresh one: the checkpoint lacks one projection of layer 1."""
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(SaekitError, match=r"1 weights are missing in it, model.layers.1.mlp.up_proj.weight among them"):
        load_model(tmp_path)


def test_a_folder_without_tokenizer(tiny_model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    lm = load_model(tmp_path, compute="fp32")
    assert lm.tokenizer is None and lm.tokenizer_entry() is None and lm.vocab_size == 300


def write_gguf(path, model, tokenizer, kind):
    """A Llama as llama.cpp stores it: its own names, and q and k with the halves of each head interleaved."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 2 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in state["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        w = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                w = w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        quantise = kind != gguf.GGMLQuantizationType.F32 and w.ndim == 2
        stem, _, suffix = name.rpartition(".")
        data = gguf.quants.quantize(w, kind) if quantise else w
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=kind if quantise else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf(tiny_model, tmp_path, ids_BT, monkeypatch, capsys):
    """The same logits from F32, nearly the same from eight bits, as a file or as a folder of only that; memory is said."""
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    monkeypatch.setattr(Progress, "quiet", False)
    original = load_model(tiny_model, compute="fp32")
    logits = original.logits(ids_BT)
    # tied embedding 300 · 64, norms 64 · (2 · 2 + 1), attention 2 · 4 · 64 · 64, MLPs 2 · 3 · 64 · 128; four bytes each
    assert 300 * 64 + 5 * 64 + 8 * 64**2 + 6 * 64 * 128 == 101_440
    for kind, tolerance in (("F32", 1e-4), ("Q8_0", 0.1)):
        (tmp_path / kind).mkdir()
        path = tmp_path / kind / "model.gguf"
        write_gguf(str(path), original.hf, original.tokenizer, gguf.GGMLQuantizationType[kind])
        lm = load_model(path, compute="fp32")
        assert f"{path}: 101,440 weights, 396 KiB once unpacked to float32\n" in capsys.readouterr().err
        assert close(lm.logits(ids_BT), logits, tolerance)
        text = "def add(a, b):\n    return a + b\n"
        assert lm.tokenizer.encode(text, add_special_tokens=False) == original.tokenizer.encode(
            text, add_special_tokens=False
        )
        assert load_model(tmp_path / kind, compute="fp32").weights_fingerprint == lm.weights_fingerprint
    del original.hf.model.layers[1].mlp.up_proj
    write_gguf(str(tmp_path / "broken.gguf"), original.hf, original.tokenizer, gguf.GGMLQuantizationType.F32)
    with pytest.raises(SaekitError, match="1 weights are missing in it, model.layers.1.mlp.up_proj.weight among them"):
        load_model(tmp_path / "broken.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "F32" / "model.gguf").read_bytes()[:64])
    (tmp_path / "text.gguf").write_text("no model at all")
    for name in ("cut.gguf", "text.gguf"):
        with pytest.raises(SaekitError, match=f"^cannot load model {tmp_path}/{name}: ") as error:
            load_model(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_model(tiny_model):
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_model)
    config = CONFIGS["llama"]()
    config.vocab_size = 200
    message = "tokenizer has 300 ids but the model LlamaForCausalLM embeds 200; .* pass --tokenizer$"
    with pytest.raises(SaekitError, match=message):
        load_model((tiny(config), tokenizer))
    with pytest.raises(SaekitError, match=message):
        load_model(tiny(config), tokenizer=str(tiny_model))


def test_a_tokenizer_from_elsewhere(tiny_model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_model / name).read_bytes())
    for model in (tmp_path, tiny(CONFIGS["llama"]())):
        lm = load_model(model, compute="fp32", tokenizer=str(tiny_model))
        own = load_model(tiny_model, compute="fp32")
        assert lm.tokenizer_entry() == own.tokenizer_entry() and lm.tokenizer_entry()["id"] == str(tiny_model)
    with pytest.raises(SaekitError, match=f"cannot load tokenizer {tmp_path}: ") as error:
        load_model(tiny_model, tokenizer=str(tmp_path))
    assert "\n" not in str(error.value)


def test_weights_fingerprint(tmp_path):
    model = tiny(CONFIGS["llama"]())
    first = weights_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path, compute="fp32").weights_fingerprint == first
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    assert weights_fingerprint(model) != first
    assert weights_fingerprint(model.to(torch.bfloat16)) != first

    class Two(nn.Module):
        def __init__(self, order):
            super().__init__()
            for name in order:
                self.register_buffer(name, torch.full((2,), float(ord(name))))

    assert weights_fingerprint(Two("ab")) == weights_fingerprint(Two("ba"))
    # sha256 of the one line `a float32 2 sha256(97.0, 97.0)`, from coreutils:
    #   printf '\0\0\302\102\0\0\302\102' | sha256sum -> 8d4920…; printf 'a float32 2 8d4920…\n' | sha256sum
    assert weights_fingerprint(Two("a")) == "sha256:48dcc6acd208afcd31e46eab55a690d319f26451f2ee527bf6fe7db734151eb4"


def test_tokenizer_fingerprint(tiny_model, tmp_path):
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_model)
    first = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(tf.AutoTokenizer.from_pretrained(tmp_path / "again")) == first
    # how much to cut off is a setting of a call
    tokenizer.backend_tokenizer.enable_truncation(5)
    assert tokenizer_fingerprint(tokenizer) == first
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<new>"])
    assert tokenizer_fingerprint(more) != first
    # two ids of the vocabulary exchanged
    state = json.loads((tiny_model / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "again" / "tokenizer.json").write_text(json.dumps(state))
    assert tokenizer_fingerprint(tf.AutoTokenizer.from_pretrained(tmp_path / "again")) != first


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted for glibc's allocator")
def test_the_memory_of_a_batch_is_kept_for_the_next(tiny_model):
    """By default glibc gives blocks of 40 MB back to the kernel, and every one of their pages comes anew as a fault."""
    code = """
import resource, sys, torch
from saekit.model import load_model
load_model(sys.argv[1])
def faults():
    block, before = torch.ones(10 << 20), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    del block
    torch.ones(10 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    line = [sys.executable, "-c", code, tiny_model]
    assert int(subprocess.run(line, check=True, capture_output=True, text=True).stdout) < 100
