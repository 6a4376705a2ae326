"""Tiny models of other packages, with random weights, to prove fusednorm.accelerate on. Nothing is downloaded.

`MODELS` has them by name. Here are the models of text; model_zoo_media.py has those of images, sound and torch
itself, model_zoo_diffusers.py those of diffusers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"  # before Hugging Face's packages are imported

Batch = dict[str, Tensor]
VOCABULARY, BATCH, LENGTH, PADDED = 67, 2, 12, 3
PAD, BEGIN, END = 0, 1, 2
NEW_TOKENS = 8


@dataclass(frozen=True)
class Model:
    """What a test needs to know of one model."""

    package: str  # which has its class
    make: Callable[[float, str | None], nn.Module]  # of a dropout probability and an attention implementation
    batch: Callable[[int], Batch]  # of a seed; float32, with padding where the model takes it
    run: Callable[[nn.Module, Batch], tuple[Tensor, ...]]  # the loss, then the other outputs
    prompt: Callable[[int], Batch] | None = None  # of a seed: what it generates from
    drops: bool = True  # whether it has dropout

    def build(self, dropout: float = 0.0, attention: str | None = None) -> nn.Module:
        """The same weights every time, in training mode. `attention` names an implementation of Hugging Face's."""
        state = torch.random.get_rng_state()
        model = self.make(dropout, attention)
        torch.random.set_rng_state(state)
        randomise(model)
        return model.train()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.run(model, batch)[0]

    def outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        return self.run(model, batch)[1:]

    @torch.no_grad()
    def generate(self, model: nn.Module, prompt: Batch) -> Tensor | None:
        """Token ids of greedy decoding, always NEW_TOKENS of them."""
        if self.prompt is None:
            return None
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        return model.generate(**prompt, **options)


def randomise(model: nn.Module) -> None:
    """Weights that keep the size of their input, and vectors away from the ones and zeros they start at."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.requires_grad:  # sinusoids
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(noise, alpha=0.1)


def tokens(seed: int, length: int = LENGTH, rows: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(END + 1, VOCABULARY, (rows, length), generator=generator)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask(left: bool = False) -> Tensor:
    """The last PADDED positions of the last row are padding, or the first."""
    made = torch.ones(BATCH, LENGTH, dtype=torch.long)
    made[-1, slice(0, PADDED) if left else slice(LENGTH - PADDED, None)] = 0
    return made


def padded(seed: int, left: bool = False) -> Batch:
    kept = mask(left)
    return {"input_ids": torch.where(kept.bool(), tokens(seed), PAD), "attention_mask": kept}


def labelled(seed: int) -> Batch:
    """Each position has a token to predict, but padding."""
    batch = padded(seed)
    return batch | {"labels": torch.where(batch["attention_mask"].bool(), tokens(seed + 1), -100)}


def left_padded(seed: int) -> Batch:
    return padded(seed, left=True)


def translation(seed: int) -> Batch:
    labels = tokens(seed + 1, LENGTH - 4)
    labels[0, -2:] = -100
    return padded(seed) | {"labels": labels}


def run(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """As every model of Hugging Face that is given labels: the loss is first."""
    return tuple(tensors(model(**batch, return_dict=True).to_tuple()))


def tensors(value: Any) -> Iterator[Tensor]:
    """Those of nested outputs; caches of keys and values are left out."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from tensors(each)
    elif hasattr(value, "to_tuple"):
        yield from tensors(value.to_tuple())


def set_dropout(config: Any, probability: float) -> None:
    """Each probability of dropout in a configuration and those it has; layers are never left out whole."""
    from transformers import PreTrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            set_dropout(value, probability)
        elif "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            setattr(config, name, 0.0 if "layerdrop" in name else probability)


def hugging_face(architecture: str, configuration: str, **settings: Any) -> Callable[[float, str | None], nn.Module]:
    """Makes a class of transformers from a configuration's settings."""

    def make(dropout: float, attention: str | None) -> nn.Module:
        import transformers

        made = {
            name: getattr(transformers, value.pop("configuration"))(**value) if isinstance(value, dict) else value
            for name, value in ((name, dict(v) if name.endswith("_config") else v) for name, v in settings.items())
        }
        config = getattr(transformers, configuration)(**made)
        set_dropout(config, dropout)
        if attention is not None:
            config._attn_implementation = attention
        return getattr(transformers, architecture)(config)

    return make


NAMES = {  # of the settings that every model of text has, in most configurations
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
}
GROUPED = NAMES | {"num_key_value_heads": 2, "head_dim": 8}
PAIR = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "decoder_start_token_id": BEGIN,
    "forced_eos_token_id": None,
    "tie_word_embeddings": False,  # else they repeat the last token
}


def encoder(architecture: str, configuration: str, **settings: Any) -> Model:
    return Model("transformers", hugging_face(architecture, configuration, **settings), labelled, run)


def decoder(architecture: str, configuration: str, **settings: Any) -> Model:
    return Model("transformers", hugging_face(architecture, configuration, **settings), labelled, run, left_padded)


def pair(architecture: str, configuration: str, **settings: Any) -> Model:
    return Model("transformers", hugging_face(architecture, configuration, **settings), translation, run, padded)


TEXT = {
    "BERT": encoder("BertForMaskedLM", "BertConfig", **NAMES),
    "RoBERTa": encoder("RobertaForMaskedLM", "RobertaConfig", **NAMES),
    "DistilBERT": encoder(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=32,
        pad_token_id=PAD,
    ),
    "ELECTRA": encoder("ElectraForMaskedLM", "ElectraConfig", **NAMES, embedding_size=24),
    "DeBERTa-v2": encoder(
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        **NAMES,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_biased_input=False,
    ),
    "ModernBERT": encoder(
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        **NAMES | {"num_hidden_layers": 3},
        cls_token_id=BEGIN,
        sep_token_id=END,
        local_attention=8,
    ),
    "GPT-2": decoder(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        pad_token_id=PAD,
        bos_token_id=BEGIN,
        eos_token_id=END,
    ),
    "GPT-NeoX": decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", **NAMES, use_parallel_residual=True),
    "GPT-NeoX, sequential": decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", **NAMES, use_parallel_residual=False),
    "OPT": decoder(
        "OPTForCausalLM",
        "OPTConfig",
        **{name: value for name, value in NAMES.items() if name != "intermediate_size"},
        ffn_dim=64,
        word_embed_proj_dim=32,
    ),
    "Llama": decoder("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "Mistral": decoder("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=5),
    "Qwen3": decoder("Qwen3ForCausalLM", "Qwen3Config", **GROUPED),
    "Gemma 2": decoder(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        **GROUPED,
        sliding_window=5,
        query_pre_attn_scalar=8,
        tie_word_embeddings=False,  # else it repeats the last token
        attn_logit_softcapping=5.0,
        final_logit_softcapping=5.0,
        attn_implementation="eager",  # sdpa leaves out the soft cap
    ),
    "Gemma 3": decoder(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        **GROUPED,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
        tie_word_embeddings=False,  # else it repeats the last token
        final_logit_softcapping=5.0,
    ),
    "T5": pair(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
    ),
    "BART": pair("BartForConditionalGeneration", "BartConfig", **PAIR),
    "Marian": pair("MarianMTModel", "MarianConfig", **PAIR),
}


def models() -> dict[str, Model]:
    from tests.helpers.model_zoo_media import MEDIA

    return TEXT | MEDIA
