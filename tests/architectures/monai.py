"""Networks of monai: volumes and slices of medical images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.architectures.architecture import Architecture, get, image


def built(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: get("monai.networks.nets", name)(**settings)


TWO = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
THREE = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}

ARCHITECTURES = {
    "unet": Architecture(
        built("UNet", **THREE, channels=(4, 8, 16), strides=(2, 2), num_res_units=2), image(1, 1, 16, 16, 16)
    ),
    "dynunet": Architecture(
        built(
            "DynUNet",
            **TWO,
            kernel_size=[3, 3, 3],
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            filters=[4, 8, 16],
            res_block=True,
        ),
        image(2, 1, 32, 32),
    ),
    "segresnet": Architecture(built("SegResNet", **TWO, init_filters=8), image(2, 1, 32, 32)),
    "unetr": Architecture(
        built("UNETR", **TWO, img_size=32, feature_size=4, hidden_size=12, mlp_dim=24, num_heads=2), image(2, 1, 32, 32)
    ),
    "swin-unetr": Architecture(
        built("SwinUNETR", **TWO, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)), image(1, 1, 64, 64)
    ),
    "vnet": Architecture(built("VNet", spatial_dims=2, in_channels=1, out_channels=2), image(1, 1, 32, 32)),
    "attention-unet": Architecture(
        built("AttentionUnet", **TWO, channels=(4, 8, 16), strides=(2, 2)), image(2, 1, 32, 32)
    ),
    "unet-plus-plus": Architecture(
        built("BasicUNetPlusPlus", **TWO, features=(4, 4, 8, 8, 16, 4)), image(2, 1, 32, 32)
    ),
    "densenet": Architecture(
        built("DenseNet", **THREE, init_features=8, growth_rate=4, block_config=(2, 2)), image(2, 1, 16, 16, 16)
    ),
    "vit": Architecture(
        built(
            "ViT",
            in_channels=1,
            img_size=(16, 16, 16),
            patch_size=(8, 8, 8),
            hidden_size=12,
            mlp_dim=24,
            num_layers=2,
            num_heads=2,
            classification=True,
        ),
        image(2, 1, 16, 16, 16),
    ),
    "diffusion-unet": Architecture(
        built(
            "DiffusionModelUNet",
            **{**TWO, "out_channels": 1},
            channels=(8, 8),
            attention_levels=(False, True),
            num_res_blocks=1,
            norm_num_groups=4,
            num_head_channels=4,
        ),
        lambda: (torch.randn(2, 1, 16, 16), torch.tensor([3, 7])),
    ),
    "autoencoder-kl": Architecture(
        built(
            "AutoencoderKL",
            **{**TWO, "out_channels": 1},
            channels=(8, 8),
            num_res_blocks=(1, 1),
            attention_levels=(False, False),
            latent_channels=4,
            norm_num_groups=4,
        ),
        image(2, 1, 16, 16),
    ),
    "vqvae": Architecture(
        built(
            "VQVAE",
            **{**TWO, "out_channels": 1},
            channels=(8, 8),
            num_res_channels=(8, 8),
            num_res_layers=1,
            downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
            upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
            num_embeddings=8,
            embedding_dim=4,
        ),
        image(2, 1, 16, 16),
    ),
    "mednext": Architecture(
        built("MedNeXt", **TWO, init_filters=4, kernel_size=3, deep_supervision=False), image(1, 1, 32, 32)
    ),
    "regressor": Architecture(
        built("Regressor", in_shape=(1, 16, 16), out_shape=(3,), channels=(4, 8), strides=(2, 2)), image(2, 1, 16, 16)
    ),
}
