"""The models of model_zoo.py for images and sound, timm's and torch's own."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.model_zoo import (
    BATCH,
    BEGIN,
    END,
    LENGTH,
    PAD,
    VOCABULARY,
    Batch,
    Model,
    hugging_face,
    mask,
    normal,
    run,
    tokens,
)
from tests.helpers.model_zoo_diffusers import CLASSES, DIFFUSERS, classes

SIDE = 16
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"image_size": SIDE, "patch_size": 4}


def images(seed: int) -> Batch:
    return {"pixel_values": normal(seed, BATCH, 3, SIDE, SIDE), "labels": classes(seed + 1)}


def larger_images(seed: int) -> Batch:
    return images(seed) | {"pixel_values": normal(seed, BATCH, 3, 2 * SIDE, 2 * SIDE)}


def captioned(seed: int) -> Batch:
    """For a loss over pairs; a caption ends with the largest id, which CLIP looks for."""
    ids = tokens(seed)
    ids[:, -1] = VOCABULARY - 1
    return {"input_ids": ids, "pixel_values": images(seed)["pixel_values"], "return_loss": torch.tensor(True)}


def spectrum(seed: int) -> Batch:
    return {"input_features": normal(seed, BATCH, 8, 2 * LENGTH)}


def transcribed(seed: int) -> Batch:
    return spectrum(seed) | {"labels": tokens(seed + 1, LENGTH - 4)}


def waves(seed: int) -> Batch:
    """The second is shorter, and padded; CTC aligns three tokens with each."""
    kept = torch.ones(BATCH, 160, dtype=torch.long)
    kept[-1, 120:] = 0
    return {"input_values": normal(seed, BATCH, 160) * kept, "attention_mask": kept, "labels": tokens(seed + 1, 3)}


def image_classes(architecture: str, configuration: str, **settings: Any) -> Model:
    make = hugging_face(architecture, configuration, **settings, num_labels=CLASSES)
    return Model("transformers", make, images, run)


def image_text(name: str, **settings: Any) -> Model:
    text = LAYERS | {"vocab_size": VOCABULARY, "intermediate_size": 64, "max_position_embeddings": LENGTH}
    text |= {"pad_token_id": PAD, "bos_token_id": BEGIN, "eos_token_id": VOCABULARY - 1}
    settings["text_config"] = text | {"configuration": f"{name}TextConfig"} | settings.pop("text", {})
    settings["vision_config"] = LAYERS | IMAGES | {"intermediate_size": 64, "configuration": f"{name}VisionConfig"}
    return Model("transformers", hugging_face(f"{name}Model", f"{name}Config", **settings), captioned, run)


def speech(architecture: str, configuration: str, **settings: Any) -> Model:
    make = hugging_face(
        architecture,
        configuration,
        **LAYERS,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        conv_dim=(16, 16),
        conv_kernel=(5, 3),
        conv_stride=(4, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        ctc_loss_reduction="mean",
        pad_token_id=PAD,
        **settings,
    )
    return Model("transformers", make, waves, run)


def run_timm(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    logits = model(batch["pixel_values"])
    return F.cross_entropy(logits, batch["labels"]), logits


def make_timm_vit(dropout: float, attention: str | None) -> nn.Module:
    from tests.helpers.torchvision_stub import import_timm

    import_timm()
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=SIDE,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=4,
        num_classes=CLASSES,
        qkv_bias=True,
        qk_norm=True,
        init_values=0.5,
        drop_rate=dropout,
        pos_drop_rate=dropout,
        proj_drop_rate=dropout,
        attn_drop_rate=dropout,
        drop_path_rate=dropout,
    )


def make_timm_convnext(dropout: float, attention: str | None) -> nn.Module:
    from tests.helpers.torchvision_stub import import_timm

    import_timm()
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(
        depths=(1, 1, 1, 2),
        dims=(8, 16, 24, 32),
        num_classes=CLASSES,
        patch_size=2,
        drop_rate=dropout,
        drop_path_rate=dropout,
    )


def sequences(seed: int) -> Batch:
    hidden = mask() == 0
    return {
        "src": normal(seed, BATCH, LENGTH, 32),
        "tgt": normal(seed + 1, BATCH, LENGTH, 32),
        "tgt_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1),
        "src_key_padding_mask": hidden,
        "memory_key_padding_mask": hidden,
        "target": normal(seed + 2, BATCH, LENGTH, 32),
    }


def run_sequences(model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
    inputs = {name: value for name, value in batch.items() if name != "target"}
    made = model(**inputs)
    return F.mse_loss(made, batch["target"]), made


def make_transformer(norm_first: bool) -> Any:
    def make(dropout: float, attention: str | None) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "enable_nested_tensor")  # said of every pre-norm model
            return nn.Transformer(32, 4, 2, 2, 64, dropout, "gelu", batch_first=True, norm_first=norm_first)

    return make


MEDIA = {
    "ViT": image_classes("ViTForImageClassification", "ViTConfig", **LAYERS, **IMAGES, intermediate_size=64),
    "DINOv2": image_classes(
        "Dinov2ForImageClassification", "Dinov2Config", **LAYERS, **IMAGES, mlp_ratio=2, layerscale_value=0.5
    ),
    "Swin": image_classes(
        "SwinForImageClassification",
        "SwinConfig",
        image_size=SIDE,
        patch_size=2,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        mlp_ratio=2.0,
    ),
    "CLIP": image_text("CLIP", projection_dim=24),
    "SigLIP": image_text("Siglip", text={"projection_size": 32}),
    "Whisper": Model(
        "transformers",
        hugging_face(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            d_model=32,
            max_source_positions=LENGTH,
            max_target_positions=32,
            decoder_start_token_id=BEGIN,
            pad_token_id=PAD,
            bos_token_id=BEGIN,
            eos_token_id=END,
            begin_suppress_tokens=None,
        ),
        transcribed,
        run,
        spectrum,
    ),
    "Wav2Vec2": speech("Wav2Vec2ForCTC", "Wav2Vec2Config"),
    "Wav2Vec2, stable": speech(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", do_stable_layer_norm=True, feat_extract_norm="layer"
    ),
    "HuBERT": speech("HubertForCTC", "HubertConfig"),
    "timm ViT": Model("timm", make_timm_vit, images, run_timm),
    "timm ConvNeXt": Model("timm", make_timm_convnext, larger_images, run_timm),
    **DIFFUSERS,
    "nn.Transformer, post-norm": Model("torch", make_transformer(False), sequences, run_sequences),
    "nn.Transformer, pre-norm": Model("torch", make_transformer(True), sequences, run_sequences),
}
