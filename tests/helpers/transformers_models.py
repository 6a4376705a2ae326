"""Tiny models of Hugging Face for tests of attention: how they are built, their inputs and results."""

from __future__ import annotations

import torch
import transformers

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


def operands(n_queries=6, n_keys=6, dim=8):
    shapes = ((2, 4, n_queries, dim), (2, 2, n_keys, dim), (2, 2, n_keys, dim))
    return [torch.randn(shape) for shape in shapes]


def sinks():
    sizes = GROUPED | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes))
