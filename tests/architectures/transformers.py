"""Networks of transformers: its own classes, with configurations of a few channels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.architectures.architecture import VOCABULARY, Architecture, get, ids

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 0}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8}
SPEECH = {
    **SIZES,
    "vocab_size": 20,
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


def built(configuration: str, model: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: get("transformers", model)(get("transformers", configuration)(**settings))


def detection(backbone: str, model: str, configuration: str, **settings: Any) -> Callable[[], nn.Module]:
    """A network with a small ResNet in front."""

    def build() -> nn.Module:
        features = get("transformers", backbone)(
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage4"],
        )
        options = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
        return get("transformers", model)(
            get("transformers", configuration)(backbone_config=features, **options, **settings)
        )

    return build


def tokens() -> dict[str, Any]:
    return {"input_ids": ids(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}


def sequence() -> dict[str, Any]:
    return {"input_ids": ids(2, 12)}


def pair_of_sequences() -> dict[str, Any]:
    return {"input_ids": ids(2, 12), "decoder_input_ids": ids(2, 7)}


def pictures(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def waveforms() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 800)}


def classes() -> dict[str, Any]:
    return {"labels": torch.tensor([0, 1])}


def next_tokens() -> dict[str, Any]:
    return {"labels": ids(2, 12)}


def classes_of_tokens() -> dict[str, Any]:
    return {"labels": torch.randint(0, 2, (2, 12))}


def clip() -> nn.Module:
    text, vision = {**TEXT, "projection_dim": 8, "eos_token_id": 2}, {**IMAGES, "projection_dim": 8}
    return get("transformers", "CLIPModel")(
        get("transformers", "CLIPConfig")(text_config=text, vision_config=vision, projection_dim=8)
    )


SMALL_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
SMALL_BART = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
LLAMA = {**TEXT, "num_key_value_heads": 1}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES = {
    "bert": Architecture(built("BertConfig", "BertForSequenceClassification", **TEXT), tokens, classes),
    "bert-masked": Architecture(built("BertConfig", "BertForMaskedLM", **TEXT), tokens, next_tokens),
    "roberta-tokens": Architecture(
        built("RobertaConfig", "RobertaForTokenClassification", **TEXT), tokens, classes_of_tokens
    ),
    "distilbert-answers": Architecture(
        built(
            "DistilBertConfig",
            "DistilBertForQuestionAnswering",
            vocab_size=VOCABULARY,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=40,
        ),
        tokens,
        lambda: {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    ),
    "albert": Architecture(
        built("AlbertConfig", "AlbertForSequenceClassification", **TEXT, embedding_size=8), tokens, classes
    ),
    "electra-discriminator": Architecture(
        built("ElectraConfig", "ElectraForPreTraining", **TEXT, embedding_size=8),
        tokens,
        lambda: {"labels": torch.randint(0, 2, (2, 12))},
    ),
    "deberta-v2": Architecture(
        built(
            "DebertaV2Config",
            "DebertaV2ForSequenceClassification",
            **TEXT,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
        ),
        tokens,
        classes,
    ),
    "fnet": Architecture(built("FNetConfig", "FNetForSequenceClassification", **TEXT), sequence, classes),
    "longformer": Architecture(
        built("LongformerConfig", "LongformerForSequenceClassification", **TEXT, attention_window=4), tokens, classes
    ),
    "gpt2": Architecture(built("GPT2Config", "GPT2LMHeadModel", **GPT2), sequence, next_tokens),
    "gpt-neox": Architecture(built("GPTNeoXConfig", "GPTNeoXForCausalLM", **TEXT), sequence, next_tokens),
    "llama": Architecture(built("LlamaConfig", "LlamaForCausalLM", **LLAMA), sequence, next_tokens),
    "mistral-classes": Architecture(
        built("MistralConfig", "MistralForSequenceClassification", **LLAMA), sequence, classes
    ),
    "mixtral": Architecture(
        built("MixtralConfig", "MixtralForCausalLM", **LLAMA, num_local_experts=3), sequence, next_tokens
    ),
    "qwen3-moe": Architecture(
        built(
            "Qwen3MoeConfig",
            "Qwen3MoeForCausalLM",
            **LLAMA,
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=8,
            head_dim=8,
        ),
        sequence,
        next_tokens,
    ),
    "mamba": Architecture(
        built(
            "MambaConfig",
            "MambaForCausalLM",
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
            time_step_rank=4,
        ),
        sequence,
        next_tokens,
    ),
    "t5": Architecture(
        built("T5Config", "T5ForConditionalGeneration", **SMALL_T5),
        pair_of_sequences,
        lambda: {"labels": ids(2, 7)},
    ),
    "bart": Architecture(
        built("BartConfig", "BartForConditionalGeneration", **SMALL_BART),
        pair_of_sequences,
        lambda: {"labels": ids(2, 7)},
    ),
    "vit": Architecture(built("ViTConfig", "ViTForImageClassification", **IMAGES), pictures(), classes),
    "beit": Architecture(
        built("BeitConfig", "BeitForImageClassification", **IMAGES, use_relative_position_bias=True),
        pictures(),
        classes,
    ),
    "swin": Architecture(
        built(
            "SwinConfig",
            "SwinForImageClassification",
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
        ),
        pictures(),
        classes,
    ),
    "convnext": Architecture(
        built(
            "ConvNextConfig",
            "ConvNextForImageClassification",
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
        ),
        pictures(),
        classes,
    ),
    "regnet": Architecture(
        built(
            "RegNetConfig",
            "RegNetForImageClassification",
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            groups_width=4,
        ),
        pictures(),
        classes,
    ),
    "mobilevit": Architecture(
        built(
            "MobileViTConfig",
            "MobileViTForImageClassification",
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
            num_attention_heads=2,
        ),
        pictures(64),
        classes,
    ),
    "segformer": Architecture(
        built(
            "SegformerConfig",
            "SegformerForSemanticSegmentation",
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
            num_labels=3,
        ),
        pictures(64),
        lambda: {"labels": torch.randint(0, 3, (2, 64, 64))},
    ),
    "dpt": Architecture(
        built(
            "DPTConfig",
            "DPTForSemanticSegmentation",
            **{**IMAGES, "num_hidden_layers": 4},
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
            num_labels=3,
            use_auxiliary_head=True,
        ),
        pictures(),
    ),
    "detr": Architecture(
        detection(
            "ResNetConfig",
            "DetrForObjectDetection",
            "DetrConfig",
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            num_queries=5,
            num_labels=4,
        ),
        pictures(64),
        lambda: {
            "labels": [{"class_labels": torch.tensor([1]), "boxes": torch.rand(1, 4) / 2 + 0.1} for _ in range(2)]
        },
    ),
    "masked-autoencoder": Architecture(
        built(
            "ViTMAEConfig",
            "ViTMAEForPreTraining",
            **IMAGES,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=24,
        ),
        pictures(),
    ),
    "yolos": Architecture(
        built(
            "YolosConfig",
            "YolosForObjectDetection",
            **{**IMAGES, "image_size": [32, 32]},
            num_detection_tokens=5,
            num_labels=4,
        ),
        pictures(),
    ),
    "clip": Architecture(clip, lambda: {**tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}),
    "wav2vec2": Architecture(
        built("Wav2Vec2Config", "Wav2Vec2ForCTC", **SPEECH),
        waveforms,
        lambda: {"labels": torch.randint(1, 20, (2, 4))},
    ),
    "hubert": Architecture(built("HubertConfig", "HubertForSequenceClassification", **SPEECH), waveforms, classes),
    "whisper": Architecture(
        built(
            "WhisperConfig",
            "WhisperForConditionalGeneration",
            **{**SMALL_BART, "max_position_embeddings": 40},
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=20,
            decoder_start_token_id=3,
        ),
        lambda: {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids(2, 6)},
        lambda: {"labels": ids(2, 6)},
    ),
    "audio-spectrogram": Architecture(
        built(
            "ASTConfig",
            "ASTForAudioClassification",
            **SIZES,
            num_mel_bins=16,
            max_length=32,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
        ),
        lambda: {"input_values": torch.randn(2, 32, 16)},
        classes,
    ),
    "videomae": Architecture(
        built("VideoMAEConfig", "VideoMAEForVideoClassification", **IMAGES, num_frames=4, tubelet_size=2),
        lambda: {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
        classes,
    ),
    "patch-tst": Architecture(
        built(
            "PatchTSTConfig",
            "PatchTSTForPrediction",
            num_input_channels=3,
            context_length=32,
            prediction_length=4,
            d_model=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_length=8,
            patch_stride=8,
        ),
        lambda: {"past_values": torch.randn(2, 32, 3)},
        lambda: {"future_values": torch.randn(2, 4, 3)},
    ),
    "vilt": Architecture(
        built("ViltConfig", "ViltForQuestionAnswering", **{**TEXT, **IMAGES}, num_labels=5),
        lambda: {**tokens(), "pixel_values": torch.randn(2, 3, 32, 32)},
        lambda: {"labels": torch.rand(2, 5)},
    ),
}
