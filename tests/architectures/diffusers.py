"""Networks of diffusers: denoisers and autoencoders."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.architectures.architecture import Architecture, get


def built(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: get("diffusers", name)(**settings)


def noise(*shape: int) -> dict[str, Any]:
    return {"sample": torch.randn(shape), "timestep": torch.tensor(5)}


BLOCKS = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
CONDITIONED = {"cross_attention_dim": 8, "attention_head_dim": 4}

ARCHITECTURES = {
    "unet-2d": Architecture(
        built(
            "UNet2DModel",
            **BLOCKS,
            sample_size=16,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
        ),
        lambda: noise(2, 3, 16, 16),
    ),
    "unet-2d-condition": Architecture(
        built(
            "UNet2DConditionModel",
            **BLOCKS,
            **CONDITIONED,
            sample_size=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        lambda: {**noise(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 5, 8)},
    ),
    "controlnet": Architecture(
        built(
            "ControlNetModel",
            **BLOCKS,
            **CONDITIONED,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            conditioning_embedding_out_channels=(4, 8),
        ),
        lambda: {
            **noise(2, 4, 16, 16),
            "encoder_hidden_states": torch.randn(2, 5, 8),
            "controlnet_cond": torch.randn(2, 3, 32, 32),
        },
    ),
    "autoencoder-kl": Architecture(
        built(
            "AutoencoderKL",
            **BLOCKS,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
    ),
    "vq": Architecture(
        built(
            "VQModel",
            **BLOCKS,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            num_vq_embeddings=8,
        ),
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
    ),
    "dit": Architecture(
        built(
            "DiTTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
            norm_num_groups=4,
        ),
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([1, 2]),
            "class_labels": torch.tensor([1, 2]),
        },
    ),
    "pixart": Architecture(
        built(
            "PixArtTransformer2DModel",
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
            cross_attention_dim=16,
            caption_channels=8,
            use_additional_conditions=False,
        ),
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 5, 8),
            "timestep": torch.tensor([1, 2]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "sd3": Architecture(
        built(
            "SD3Transformer2DModel",
            sample_size=8,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=8,
            out_channels=4,
        ),
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": torch.randn(2, 5, 8),
            "pooled_projections": torch.randn(2, 8),
            "timestep": torch.tensor([1, 2]),
        },
    ),
    "flux": Architecture(
        built(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=[2, 2, 4],
        ),
        lambda: {
            "hidden_states": torch.randn(2, 16, 4),
            "encoder_hidden_states": torch.randn(2, 5, 8),
            "pooled_projections": torch.randn(2, 8),
            "timestep": torch.tensor([0.1, 0.2]),
            "img_ids": torch.randn(16, 3),
            "txt_ids": torch.randn(5, 3),
        },
    ),
    "prior": Architecture(
        built(
            "PriorTransformer",
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            embedding_dim=8,
            num_embeddings=5,
            additional_embeddings=4,
        ),
        lambda: {
            "hidden_states": torch.randn(2, 8),
            "timestep": torch.tensor([1, 2]),
            "proj_embedding": torch.randn(2, 8),
            "encoder_hidden_states": torch.randn(2, 5, 8),
        },
    ),
    "unet-1d": Architecture(
        built(
            "UNet1DModel",
            sample_size=64,
            in_channels=2,
            out_channels=2,
            extra_in_channels=64,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
        ),
        lambda: noise(2, 2, 64),
    ),
    "wan": Architecture(
        built(
            "WanTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=24,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        lambda: {
            "hidden_states": torch.randn(1, 4, 2, 8, 8),
            "timestep": torch.tensor([1]),
            "encoder_hidden_states": torch.randn(1, 5, 8),
        },
    ),
}
