"""The models of model_zoo.py of diffusers: blocks whose norms take a scale and a shift, and branches a gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.model_zoo import BATCH, LENGTH, Batch, Model, mask, normal

CLASSES = 5


def classes(seed: int) -> Tensor:
    return torch.randint(CLASSES, (BATCH,), generator=torch.Generator().manual_seed(seed))


def run_dit_block(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    inputs = {name: value for name, value in batch.items() if name != "target"}
    made = model(**inputs)
    return F.mse_loss(made, batch["target"]), made


def dit_block(seed: int) -> Batch:
    return {
        "hidden_states": normal(seed, BATCH, 8, 32),
        "timestep": torch.tensor([3, 40]),
        "class_labels": classes(seed + 1),
        "target": normal(seed + 2, BATCH, 8, 32),
    }


def make_dit_block(dropout: float, attention: str | None) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    form = {"norm_type": "ada_norm_zero", "attention_bias": True, "activation_fn": "gelu-approximate"}  # as DiT's
    made = BasicTransformerBlock(32, 4, 8, dropout=dropout, num_embeds_ada_norm=CLASSES, **form)
    return label_dropout(made, dropout)


def label_dropout(model: nn.Module, dropout: float) -> nn.Module:
    """It is a constant of the package, 0.1."""
    for module in model.modules():
        if type(module).__name__ == "LabelEmbedding":
            module.dropout_prob = dropout
    return model


def cross_block(seed: int) -> Batch:
    return {
        "hidden_states": normal(seed, BATCH, 8, 32),
        "encoder_hidden_states": normal(seed + 1, BATCH, LENGTH, 24),
        "encoder_attention_mask": mask()[:, None].bool(),
        "target": normal(seed + 2, BATCH, 8, 32),
    }


def make_cross_block(dropout: float, attention: str | None) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    return BasicTransformerBlock(32, 4, 8, dropout=dropout, cross_attention_dim=24, activation_fn="gelu-approximate")


def latents(seed: int) -> Batch:
    return {
        "hidden_states": normal(seed, BATCH, 4, 8, 8),
        "timestep": torch.tensor([3, 40]),
        "class_labels": classes(seed + 1),
        "target": normal(seed + 2, BATCH, 4, 8, 8),
    }


def make_dit(dropout: float, attention: str | None) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    made = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        dropout=dropout,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    return label_dropout(made, dropout)


def run_dit(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    inputs = {name: value for name, value in batch.items() if name != "target"}
    made = model(**inputs).sample
    return F.mse_loss(made, batch["target"]), made


def pixart_block(seed: int) -> Batch:
    """The time of a sample is six vectors, which the block adds to a table of its own."""
    return {"timestep": normal(seed + 3, BATCH, 6 * 32)} | cross_block(seed)


def make_pixart_block(dropout: float, attention: str | None) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    form = {"norm_type": "ada_norm_single", "attention_bias": True, "activation_fn": "gelu-approximate"}
    return BasicTransformerBlock(32, 4, 8, dropout=dropout, cross_attention_dim=24, **form)


def two_streams(seed: int) -> Batch:
    return {
        "hidden_states": normal(seed, BATCH, 8, 32),
        "encoder_hidden_states": normal(seed + 1, BATCH, LENGTH, 32),
        "temb": normal(seed + 3, BATCH, 32),
        "target": normal(seed + 2, BATCH, 8, 32),
    }


def run_two_streams(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    """Both streams are in the loss."""
    inputs = {name: value for name, value in batch.items() if name != "target"}
    text, image = model(**inputs)
    return F.mse_loss(image, batch["target"]) + text.square().mean(), image, text


def make_sd3_block(dropout: float, attention: str | None) -> nn.Module:
    from diffusers.models.attention import JointTransformerBlock

    return JointTransformerBlock(32, 4, 8, qk_norm="rms_norm")


def make_sd35_block(dropout: float, attention: str | None) -> nn.Module:
    from diffusers.models.attention import JointTransformerBlock

    return JointTransformerBlock(32, 4, 8, qk_norm="rms_norm", use_dual_attention=True)


def make_flux_block(dropout: float, attention: str | None) -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

    return FluxTransformerBlock(32, 4, 8)


def make_flux_single_block(dropout: float, attention: str | None) -> nn.Module:
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    return FluxSingleTransformerBlock(32, 4, 8)


def wan_block(seed: int) -> Batch:
    angles = normal(seed + 4, 1, 8, 1, 4).repeat_interleave(2, -1)
    return {
        "hidden_states": normal(seed, BATCH, 8, 32),
        "encoder_hidden_states": normal(seed + 1, BATCH, LENGTH, 32),
        "temb": normal(seed + 3, BATCH, 6, 32),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "target": normal(seed + 2, BATCH, 8, 32),
    }


def wan_block_by_token(seed: int) -> Batch:
    """As in Wan 2.2: vectors for each token."""
    return wan_block(seed) | {"temb": normal(seed + 3, BATCH, 8, 6, 32)}


def run_wan_block(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    rotary = batch["cos"], batch["sin"]
    made = model(batch["hidden_states"], batch["encoder_hidden_states"], batch["temb"], rotary)
    return F.mse_loss(made, batch["target"]), made


def make_wan_block(dropout: float, attention: str | None) -> nn.Module:
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    return WanTransformerBlock(32, 64, 4, cross_attn_norm=True)


def without_dropout(make: Any, batch: Any, run: Any) -> Model:
    return Model("diffusers", make, batch, run, drops=False)


DIFFUSERS = {
    "diffusers block, adaptive": Model("diffusers", make_dit_block, dit_block, run_dit_block),
    "diffusers block, cross": Model("diffusers", make_cross_block, cross_block, run_dit_block),
    "PixArt block": Model("diffusers", make_pixart_block, pixart_block, run_dit_block),
    "SD3 block": without_dropout(make_sd3_block, two_streams, run_two_streams),
    "SD3.5 block": without_dropout(make_sd35_block, two_streams, run_two_streams),
    "Flux block": without_dropout(make_flux_block, two_streams, run_two_streams),
    "Flux single block": without_dropout(make_flux_single_block, two_streams, run_two_streams),
    "Wan block": without_dropout(make_wan_block, wan_block, run_wan_block),
    "Wan 2.2 block": without_dropout(make_wan_block, wan_block_by_token, run_wan_block),
    "diffusers DiT": Model("diffusers", make_dit, latents, run_dit),
}
