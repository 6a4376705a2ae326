"""Hugging Face models: ``attn_implementation="fusednorm"`` against "eager", and the switch for one model."""

from __future__ import annotations

import copy
import doctest
import inspect
import json

import pytest
import torch
from fresh import interpreter

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils  # noqa: E402

from fusednorm.integrations import _transformers_masks as masks  # noqa: E402
from fusednorm.integrations import transformers as integration  # noqa: E402

transformers.utils.logging.set_verbosity_error()

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 48}
GROUPED = TINY | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
SEQ2SEQ |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 32, "vocab_size": 48, "pad_token_id": 0}
SEQ2SEQ |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
WORDS = {"bos_token_id": 1, "eos_token_id": 2}


def _gemma2(**options):
    sizes = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "attn_logit_softcapping": 1.0}
    return transformers.Gemma2Config(**sizes | options)


def _whisper():
    sizes = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 32, "suppress_tokens": None}
    return transformers.WhisperConfig(**SEQ2SEQ | sizes | {"begin_suppress_tokens": None})


def _t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 48}
    return transformers.T5Config(**sizes, decoder_start_token_id=0)


MODELS = {
    "bert": ("BertModel", lambda: transformers.BertConfig(**TINY)),
    "gpt2": (
        "GPT2LMHeadModel",
        lambda: transformers.GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=48, n_positions=64, **WORDS),
    ),
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**GROUPED)),
    "mistral": ("MistralForCausalLM", lambda: transformers.MistralConfig(**GROUPED, sliding_window=4)),
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "t5": ("T5ForConditionalGeneration", _t5),
    "bart": ("BartForConditionalGeneration", lambda: transformers.BartConfig(**SEQ2SEQ)),
    "whisper": ("WhisperForConditionalGeneration", _whisper),
}
DECODERS = ["gpt2", "llama", "mistral", "gemma2"]


def build(name, implementation, config=None):
    kind, make = MODELS[name]
    torch.manual_seed(0)
    config = make() if config is None else config
    return getattr(transformers, kind)._from_config(config, attn_implementation=implementation).eval()


def pair(name):
    """One model, and its twin that computes attention here."""
    eager, fused = build(name, "eager"), build(name, "fusednorm")
    assert all(torch.equal(a, b) for a, b in zip(eager.parameters(), fused.parameters()))
    return eager, fused


def padding(side):
    """Of nine tokens in three rows: none, some and most padded."""
    mask = torch.ones(3, 9, dtype=torch.long)
    if side == "left":
        mask[1, :3] = mask[2, :7] = 0
    elif side == "right":
        mask[1, -3:] = mask[2, -7:] = 0
    return mask


def inputs_of(name, side):
    """(keyword arguments, bool (B, S): the positions of the output that are not padding)."""
    mask = padding(side)
    ids = torch.randint(3, 48, (3, 9))
    given = {} if side is None else {"attention_mask": mask}
    if name == "whisper":
        return {"input_features": torch.randn(3, 8, 20), "decoder_input_ids": ids}, torch.ones(3, 9, dtype=torch.bool)
    if name in ("t5", "bart"):
        if side is not None:
            given["decoder_attention_mask"] = mask
        return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} | given, mask.bool()
    return {"input_ids": ids} | given, mask.bool()


def results(model, inputs, kept, call=None):
    """The output where nothing is padding, and the gradients of every parameter."""
    model.zero_grad()
    out = (model if call is None else call)(**inputs)[0][kept]
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return {"output": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got, expected):
    """To 1e-5 of the largest value of its kind.

    float32 rounds at 6e-8. Sums of 9 keys, 32 features and 27 positions, in another order, over two layers and back,
    gave at most 6e-7. Gradients that are zero but for rounding (of a key's bias) are compared with the largest.
    """
    assert got.keys() == expected.keys()
    scale = max(value.abs().max() for name, value in expected.items() if name != "output")
    for name, value in expected.items():
        error = (got[name] - value).abs().max() / (value.abs().max() if name == "output" else scale)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("name", "side"),
    [
        (name, side)
        for name in MODELS
        for side in (None, "left", "right")
        # Whisper's features have one length; the positions of the other two count padding on the left
        if side is None or (name != "whisper" and (name not in ("t5", "bart") or side == "right"))
    ],
)
def test_outputs_and_gradients_are_those_of_eager(name, side):
    eager, fused = pair(name)
    inputs, kept = inputs_of(name, side)
    assert_close(results(fused, inputs, kept), results(eager, inputs, kept))


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gemma2"])
def test_a_row_of_padding_alone_changes_no_other_row(name):
    _, fused = pair(name)
    inputs, kept = inputs_of(name, "right")
    inputs["attention_mask"][1] = 0
    kept[1] = False
    got = results(fused, inputs, kept)
    assert all(value.isfinite().all() for value in got.values())
    others = {key: value[::2] for key, value in inputs.items()}
    assert_close(got, results(fused, others, kept[::2]))


@pytest.mark.parametrize("name", ["bert", "llama", "mistral", "gemma2", "t5"])
def test_padding_stays_a_key_mask(name, monkeypatch):
    """No mask of Sq x Sk is built; T5 has a bias of that size."""
    _, fused = pair(name)
    seen = []
    real = integration.scaled_dot_product_attention

    def recorded(query, key, value, attn_mask, *args, **keywords):
        seen.append((attn_mask, keywords["key_mask"]))
        return real(query, key, value, attn_mask, *args, **keywords)

    monkeypatch.setattr(integration, "scaled_dot_product_attention", recorded)
    inputs, _ = inputs_of(name, "right")
    fused(**inputs)
    assert seen
    for attn_mask, key_mask in seen:
        assert torch.equal(key_mask, padding("right").bool())
        assert attn_mask is None or (name == "t5" and attn_mask.is_floating_point())


@pytest.mark.parametrize("name", DECODERS)
def test_a_long_prefix_and_tokens_after_it_are_those_of_the_whole(name):
    """Queries shorter than keys: several tokens are added to a cache at once, then one."""
    _, fused = pair(name)
    ids, mask = torch.randint(3, 48, (3, 9)), padding("left")
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = fused(ids, attention_mask=mask, position_ids=places)[0]
        cache, parts = transformers.DynamicCache(config=fused.config), []
        for start, stop in ((0, 4), (4, 8), (8, 9)):
            step = {"attention_mask": mask[:, :stop], "position_ids": places[:, start:stop], "cache": cache}
            parts.append(fused(ids[:, start:stop], **step)[0])
    kept = mask.bool()
    assert_close({"output": torch.cat(parts, 1)[kept], "": whole}, {"output": whole[kept], "": whole})


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, cache) for name in DECODERS for cache in ("dynamic", "static", None)),
        *(("t5", "dynamic"), ("bart", "dynamic")),
    ],
)
def test_generation_is_that_of_eager_token_for_token(name, cache):
    eager, fused = pair(name)
    inputs = {"input_ids": torch.randint(3, 48, (3, 9)), "attention_mask": padding("left")}
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    options |= {"use_cache": False} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(fused.generate(**inputs, **options), eager.generate(**inputs, **options))


def test_a_static_cache_of_several_tokens_at_once():
    """The cache is longer than what is filled, so no alignment of ends is right."""
    eager, fused = pair("llama")
    ids = torch.randint(3, 48, (2, 8))
    outs = []
    for model in (eager, fused):
        cache = transformers.StaticCache(model.config, max_cache_len=16)
        with torch.no_grad():
            outs.append([model(part, cache=cache)[0] for part in (ids[:, :5], ids[:, 5:7], ids[:, 7:])])
    for got, expected in zip(outs[1], outs[0]):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_packed_sequences_do_not_see_each_other():
    eager, fused = pair("llama")
    ids = torch.randint(3, 48, (1, 9))
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    kept = torch.ones(1, 9, dtype=torch.bool)
    whole = {"input_ids": ids, "use_cache": False}
    by_places = whole | {"position_ids": places}
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 5, "max_length_k": 5}
    expected = results(eager, by_places, kept)
    assert (expected["output"] - results(eager, whole, kept)["output"]).abs().max() > 0.1
    assert_close(results(fused, by_places, kept), expected)
    assert_close(results(fused, by_places | lengths, kept), expected)
    # positions do not say it now: the boundaries do. Rotary embedding sees differences only
    assert_close(results(fused, whole | lengths, kept), expected)
    with pytest.raises(ValueError, match="cu_seq_lens_q: together with a padding mask"):
        fused(**whole, attention_mask=(torch.arange(9) > 1)[None].long(), **lengths)


def test_dropout_runs_in_training_and_is_seeded():
    model = build("bert", "fusednorm").train()
    for module in model.modules():  # of attention only
        if isinstance(module, torch.nn.Dropout) and not hasattr(module, "is_causal"):
            module.p = 0.0
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    inputs, _ = inputs_of("bert", "right")
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(**inputs)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])
    outs[0].sum().backward()
    assert torch.equal(model.eval()(**inputs)[0], model(**inputs)[0])
    module = torch.nn.Module().eval()  # also where a model passes its probability in eval mode
    given = operands()
    kept, dropped = (integration.attention(module, *given, None, dropout=p)[0] for p in (0.0, 0.5))
    assert torch.equal(kept, dropped)


def test_set_attn_implementation_and_from_pretrained(tmp_path):
    model = build("llama", "sdpa")
    ids = torch.randint(3, 48, (2, 9))
    expected = model(ids)[0]
    model.set_attn_implementation("fusednorm")
    assert model.config._attn_implementation == "fusednorm"
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "fusednorm" not in (tmp_path / "config.json").read_text()
    for implementation in ("fusednorm", None):
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
        assert again.config._attn_implementation == (implementation or "sdpa")
        torch.testing.assert_close(again(ids)[0], expected, rtol=1e-5, atol=1e-5)


def test_one_model_is_switched_and_another_of_the_same_config_is_not():
    config = transformers.LlamaConfig(**GROUPED)
    one, other = build("llama", "sdpa", config), build("llama", "sdpa", config)
    assert one.config is other.config is config
    before, held = copy.deepcopy(config.to_dict()), [getattr(m, "config", None) for m in one.modules()]
    said = integration.switch_attention(one)
    assert [s.path for s in said] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(s.fused and s.reason == "" for s in said)
    assert one.config._attn_implementation == "fusednorm"
    assert {id(m.config) for m in one.modules() if getattr(m, "config", None) is not None} == {id(one.config)}
    assert other.config is config and config._attn_implementation == "sdpa" and config.to_dict() == before
    ids = torch.randint(3, 48, (2, 9))
    torch.testing.assert_close(one(ids)[0], other(ids)[0], rtol=1e-5, atol=1e-5)
    integration.restore_attention(one)
    assert all(getattr(m, "config", None) is c for m, c in zip(one.modules(), held))
    with pytest.raises(ValueError, match="not switched"):
        integration.restore_attention(one)


def test_models_within_other_modules_and_models_are_switched():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    text = TINY | {"max_position_embeddings": 16, "pad_token_id": 0, **WORDS}
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    both = torch.nn.ModuleDict({"clip": clip, "llama": build("llama", "eager")})
    inputs = {"input_ids": torch.randint(3, 48, (2, 9)), "pixel_values": torch.randn(2, 3, 8, 8)}
    inputs["attention_mask"] = padding("right")[:2]
    expected = clip(**inputs).logits_per_text
    said = integration.switch_attention(both)
    assert len(said) == 5 and all(s.fused for s in said), said
    assert clip.config.text_config is clip.text_model.config  # sharing within the model stays
    assert clip.text_model.config._attn_implementation == clip.vision_model.config._attn_implementation == "fusednorm"
    torch.testing.assert_close(clip(**inputs).logits_per_text, expected, rtol=1e-5, atol=1e-5)
    assert integration.switch_attention(both) == said  # nothing is left to do
    integration.restore_attention(both)
    assert clip.text_model.config._attn_implementation == "sdpa"
    assert both["llama"].config._attn_implementation == "eager"


def _deberta():
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**TINY))


def _compares():
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sizes |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "index_head_dim": 16}
    sizes |= {"moe_intermediate_size": 16, "num_key_value_heads": 4, "index_n_heads": 2, "first_k_dense_replace": 2}
    return transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**GROUPED | sizes))


def _sinks():
    sizes = GROUPED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))


def _asked_for(implementation):
    def make():
        model = build("llama", "sdpa")
        model.config._attn_implementation_internal = implementation
        return model

    return make


def _weights_wanted():
    model = build("llama", "eager")
    model.config.output_attentions = True
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_deberta, "DisentangledSelfAttention computes attention by code of its own"),
        (_sinks, "attention sinks"),
        (_compares, "DeepseekV32Attention does otherwise where the implementation is not 'sdpa'"),
        (_asked_for("flash_attention_2"), "'flash_attention_2', which was asked for"),
        (_asked_for("flex_attention"), "'flex_attention', which was asked for"),
        (_asked_for("paged|eager"), "'paged|eager', which was asked for"),
        (_weights_wanted, "output_attentions"),
    ],
)
def test_what_is_left_alone_has_a_reason(make, reason):
    model = make()
    configs = [getattr(m, "config", None) for m in model.modules()]
    said = integration.switch_attention(model)
    assert len(said) == 2
    assert all(not s.fused and reason in s.reason for s in said), said
    assert all(getattr(m, "config", None) is c for m, c in zip(model.modules(), configs))


@pytest.mark.parametrize(("implementation", "fused"), [("sdpa", 1), ("eager", 0)])
def test_attention_of_the_models_own_code_takes_masks_of_sdpa_but_not_of_eager(implementation, fused):
    """Both of MiniMax's kinds read one mask. Eager's is added, so it may not become a bool one."""
    sizes = GROUPED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "block_size": 4}
    config = transformers.MiniMaxConfig(**sizes, layer_types=["linear_attention", "full_attention"])
    torch.manual_seed(0)
    model = transformers.MiniMaxForCausalLM._from_config(config, attn_implementation=implementation).eval()
    inputs, kept = inputs_of("llama", "right")
    inputs["use_cache"] = False
    expected = results(model, inputs, kept)
    said = integration.switch_attention(model)
    assert [s.fused for s in said] == [False, bool(fused)]
    assert all("MiniMaxLightningAttention computes attention by code of its own" in s.reason for s in said[: 2 - fused])
    assert_close(results(model, inputs, kept), expected)


def test_dry_run_changes_nothing():
    model = build("llama", "sdpa")
    held = model.config
    assert all(s.fused for s in integration.switch_attention(model, dry_run=True))
    assert model.config is held and held._attn_implementation == "sdpa"


def operands(n_queries=6, n_keys=6, dim=8):
    shapes = ((2, 4, n_queries, dim), (2, 2, n_keys, dim), (2, 2, n_keys, dim))
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"s_aux": torch.zeros(4)}, "s_aux: attention sinks; .*eager"),
        ({"head_mask": torch.ones(4)}, "head_mask: .*eager"),
        ({"indices": torch.zeros(2, 6, 3, dtype=torch.long)}, "indices: sparse attention"),
        ({"alibi": torch.randn(4, 6)}, "alibi: a keyword unknown here"),
        ({"score_mod": max}, "score_mod"),
        ({"block_table": torch.zeros(1, dtype=torch.int32)}, "block_table: a paged cache"),
    ],
)
def test_what_would_change_the_result_is_refused(keywords, said):
    with pytest.raises(ValueError, match=said):
        integration.attention(torch.nn.Module(), *operands(), None, **keywords)


def test_sinks_are_refused_in_a_model():
    model = _sinks()
    model.config._attn_implementation_internal = "fusednorm"
    with pytest.raises(ValueError, match="s_aux: attention sinks"):
        model(torch.randint(3, 48, (1, 5)))


def test_plain_keywords_pass():
    module = torch.nn.Module()
    plain = {"position_ids": torch.arange(6)[None], "use_cache": True, "num_items_in_batch": torch.tensor(3.0)}
    out, weights = integration.attention(module, *operands(), None, s_aux=None, output_attentions=True, **plain)
    assert out.shape == (2, 6, 4, 8) and out.is_contiguous() and weights is None


@pytest.mark.parametrize("dim", [8, 260])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_a_key_mask_or_none_leaves_causality_and_window_to_keywords(masked, causal, window, dim):
    q, k, v = operands(4, 6, dim)
    keys = torch.tensor([[True] * 6, [False] * 2 + [True] * 4]) if masked else None
    module = torch.nn.Module()
    module.is_causal = causal
    out, _ = integration.attention(module, q, k, v, keys, sliding_window=window)
    ahead = torch.arange(6) - torch.arange(4)[:, None] - 2
    seen = (ahead <= 0) if causal else torch.ones_like(ahead, dtype=torch.bool)
    if window is not None:
        seen = seen & (ahead.abs() < window)
    seen = seen if keys is None else seen & keys[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), seen
    )
    expected = expected.nan_to_num(0.0).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if causal:
        said, _ = integration.attention(torch.nn.Module(), q, k, v, keys, sliding_window=window, is_causal=True)
        assert torch.equal(said, out)


def test_a_bias_gets_its_gradient_under_every_mask():
    q, k, v = operands()
    bias = torch.randn(1, 4, 6, 6, requires_grad=True)
    keys = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    full = keys[:, None, None] & torch.ones(6, 6, dtype=torch.bool).tril()
    added = torch.zeros(2, 1, 6, 6).masked_fill(~full, torch.finfo(torch.float32).min)
    grads = []
    for mask in (keys, full, added):
        out, _ = integration.attention(torch.nn.Module(), q, k, v, mask, position_bias=bias, is_causal=True)
        grads.append(torch.autograd.grad(out.square().sum(), bias)[0])
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-5, atol=1e-6)


FUNCTIONS = {
    "causal": (masking_utils.causal_mask_function, None),
    "window": (masking_utils.sliding_window_causal_mask_function(3), 3),
    "a window of all": (masking_utils.sliding_window_causal_mask_function(6), 6),
    "both ways": (masking_utils.bidirectional_mask_function, None),
    "window both ways": (masking_utils.sliding_window_bidirectional_mask_function(2), 2),
    "chunks": (masking_utils.chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long)), 3),
    "a prefix": (masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 2), None),
}


@pytest.mark.parametrize("side", [None, "left", "right", "nothing left"])
@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset"),
    [(6, 6, 0, 0), (2, 6, 4, 0), (1, 6, 5, 0), (2, 6, 6, 2), (6, 9, 0, 0), (2, 9, 4, 0), (1, 9, 0, 0), (1, 9, 4, 0)],
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_mask_says_what_sdpa_mask_says(name, q_length, kv_length, q_offset, kv_offset, side):
    """Also where a cache is longer than what is filled, and in the two cases where there is none."""
    function, local = FUNCTIONS[name]
    mask = None if side is None else torch.ones(2, kv_length + kv_offset, dtype=torch.bool)
    if side == "nothing left":
        mask[1] = False
    elif side is not None:
        mask[1, :3] = mask[0, :1] = False
        mask = mask if side == "left" else mask.flip(1)
    both_ways = "both ways" in name
    given = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    given |= {"kv_offset": kv_offset, "mask_function": function, "attention_mask": mask, "local_size": local}
    given |= {"dtype": torch.float32, "config": None, "a_later_keyword": 1}
    plain = name not in ("chunks", "a prefix")
    skips = {"allow_is_causal_skip": not both_ways and name != "a prefix", "allow_is_bidirectional_skip": both_ways}
    expected = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    got = integration.attention_mask(**given, **skips)
    if got is None:
        assert masking_utils.sdpa_mask(**given, **skips) is None
        got = masks.Pattern(None, not both_ways, None, "lower_right").full(q_length, kv_length, torch.device("cpu"))
    elif side in ("left", "right") and plain and q_offset - kv_offset in (0, kv_length - q_length):
        assert isinstance(got, masks.PatternMask)
        assert got.shape == expected.shape and got.dtype == torch.bool and got._full is None
    assert torch.equal(torch.broadcast_to(got, expected.shape), expected)


def test_operations_see_the_full_mask():
    keys = padding("left").bool()
    make = {"batch_size": 3, "q_length": 9, "kv_length": 9, "attention_mask": keys}
    full = masking_utils.sdpa_mask(**make)
    for read in (
        lambda m: m[:, :, 2:, :4],
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: ~m,
        lambda m: torch.cat([m, m], -1),
        lambda m: torch.stack([m])[0],
        lambda m: m.to(torch.float32),
        lambda m: m.expand(3, 2, 9, 9),
        copy.deepcopy,
    ):
        mask = integration.attention_mask(**make)
        assert isinstance(mask, masks.PatternMask)
        assert type(read(mask)) is torch.Tensor and torch.equal(read(mask), read(full))
    mask = integration.attention_mask(**make)
    assert mask.to("cpu") is mask and mask._full is None
    mask[:, :, :, 8] = False  # written to: the attention function takes what was written
    written = full.clone()
    written[:, :, :, 8] = False
    q, k, v = torch.randn(3, 3, 4, 9, 8).unbind()
    module = torch.nn.Module()
    out, expected = (integration.attention(module, q, k, v, m)[0] for m in (mask, written))
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("name", "side"), [("bert", "right"), ("mistral", None), ("mistral", "right"), ("t5", "right")]
)
def test_a_traced_model_computes_the_same(name, side):
    """In one graph, with masks built in full: nothing looks at values."""
    eager, fused = pair(name)
    inputs, kept = inputs_of(name, side)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    inputs |= {"use_cache": False} if name != "bert" else {}
    assert_close(results(fused, inputs, kept, compiled), results(eager, inputs, kept))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_gradients(reentrant):
    eager, fused = pair("llama")
    inputs, kept = inputs_of("llama", "left")
    expected = results(eager, inputs, kept)
    fused.train()
    fused.activation_checkpointing_enable({"use_reentrant": reentrant})
    fused.enable_input_require_grads()
    assert_close(results(fused, inputs | {"use_cache": False}, kept), expected)


def test_a_scale_that_is_learned_gets_its_gradient():
    q, k, v = operands()
    scale = torch.tensor(0.3, requires_grad=True)
    out, _ = integration.attention(torch.nn.Module(), q, k, v, None, scaling=scale, is_causal=True)
    expected, _ = integration.attention(torch.nn.Module(), q, k, v, None, scaling=0.3, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(out.square().sum(), scale)[0].abs() > 1e-3


def test_a_copy_of_a_switched_model_is_restored_by_itself():
    model = build("llama", "sdpa")
    integration.switch_attention(model)
    twin = copy.deepcopy(model)
    integration.restore_attention(model)
    assert twin.config._attn_implementation == twin.model.config._attn_implementation == "fusednorm"
    integration.restore_attention(twin)
    assert twin.config is twin.model.config is not model.config and twin.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", integration.__all__[1:])
def test_example(name):
    text = inspect.cleandoc(getattr(integration, name).__doc__)
    example = doctest.DocTestParser().get_doctest(text, {"torch": torch}, name, None, None)
    assert example.examples
    said: list[str] = []
    assert doctest.DocTestRunner(verbose=False).run(example, out=said.append).failed == 0, "".join(said)


def test_without_transformers_the_remedy_is_named():
    program = """
import sys
sys.modules["transformers"] = None
import fusednorm, fusednorm.integrations
try:
    import fusednorm.integrations.transformers
except ImportError as fault:
    print(fault)
"""
    assert "pip install" in interpreter("-c", program)


def test_import_of_the_package_leaves_transformers_alone():
    program = """
import sys, json, fusednorm, fusednorm.integrations
print(json.dumps([name for name in sys.modules if name.startswith("transformers")]))
"""
    assert json.loads(interpreter("-c", program)) == []
