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


from fusednorm.integrations import transformers as integration  # noqa: E402
from tests.helpers.transformers_models import (  # noqa: E402
    DECODERS,
    GROUPED,
    MODELS,
    TINY,
    WORDS,
    assert_close,
    build,
    inputs_of,
    operands,
    padding,
    pair,
    results,
    sinks,
)

transformers.utils.logging.set_verbosity_error()


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
        (sinks, "attention sinks"),
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
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # the tensor holds 0.3 in float32
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
