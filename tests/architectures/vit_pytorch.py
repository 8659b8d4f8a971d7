"""Networks of vit-pytorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.architectures.architecture import Architecture, get, image


def built(module: str, name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: get(f"vit_pytorch.{module}", name)(**settings)


SIZES = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24}
HEADS = {**SIZES, "dim_head": 8}


ARCHITECTURES = {
    "vit": Architecture(built("vit", "ViT", **HEADS), image(2, 3, 32, 32)),
    "simple-vit": Architecture(built("simple_vit", "SimpleViT", **HEADS), image(2, 3, 32, 32)),
    "normalized-vit": Architecture(built("normalized_vit", "nViT", **HEADS), image(2, 3, 32, 32)),
    "deepvit": Architecture(built("deepvit", "DeepViT", **HEADS), image(2, 3, 32, 32)),
    "cait": Architecture(built("cait", "CaiT", **HEADS, cls_depth=1), image(2, 3, 32, 32)),
    "cct": Architecture(
        built(
            "cct",
            "CCT",
            img_size=32,
            embedding_dim=16,
            n_conv_layers=1,
            kernel_size=3,
            stride=2,
            padding=1,
            num_layers=2,
            num_heads=2,
            mlp_ratio=2,
            num_classes=5,
            positional_embedding="learnable",
        ),
        image(2, 3, 32, 32),
    ),
    "cross-vit": Architecture(
        built(
            "cross_vit",
            "CrossViT",
            image_size=32,
            num_classes=5,
            sm_dim=8,
            lg_dim=16,
            sm_patch_size=8,
            sm_enc_depth=1,
            sm_enc_heads=2,
            sm_enc_mlp_dim=16,
            lg_patch_size=16,
            lg_enc_depth=1,
            lg_enc_heads=2,
            lg_enc_mlp_dim=16,
            cross_attn_depth=1,
            cross_attn_heads=2,
            depth=1,
        ),
        image(2, 3, 32, 32),
    ),
    "xcit": Architecture(built("xcit", "XCiT", **HEADS, cls_depth=1, local_patch_kernel_size=3), image(2, 3, 32, 32)),
    "max-vit": Architecture(
        built(
            "max_vit",
            "MaxViT",
            num_classes=5,
            dim=8,
            depth=(1, 1),
            dim_head=8,
            dim_conv_stem=8,
            window_size=4,
        ),
        image(2, 3, 32, 32),
    ),
    "mobile-vit": Architecture(
        built(
            "mobile_vit",
            "MobileViT",
            image_size=(64, 64),
            dims=[8, 12, 16],
            channels=[8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 16],
            num_classes=5,
        ),
        image(2, 3, 64, 64),
    ),
    "look-vit": Architecture(
        built(
            "look_vit",
            "LookViT",
            dim=16,
            image_size=32,
            num_classes=5,
            depth=1,
            patch_size=8,
            heads=2,
            dim_head=8,
            highres_patch_size=4,
            cross_attn_heads=2,
            cross_attn_dim_head=8,
        ),
        image(2, 3, 32, 32),
    ),
    "t2t": Architecture(
        built(
            "t2t",
            "T2TViT",
            image_size=32,
            num_classes=5,
            dim=16,
            depth=1,
            heads=2,
            mlp_dim=24,
            dim_head=8,
            t2t_layers=((3, 2), (3, 2)),
        ),
        image(2, 3, 32, 32),
    ),
    "parallel-vit": Architecture(built("parallel_vit", "ViT", **HEADS), image(2, 3, 32, 32)),
    "sparse-gating": Architecture(
        built("simple_vit_with_sparse_gating", "SimpleViTWithSparseGating", **HEADS), image(2, 3, 32, 32)
    ),
    "na-vit": Architecture(
        built("na_vit", "NaViT", **HEADS), lambda: ([torch.randn(3, 16, 24), torch.randn(3, 32, 16)],)
    ),
    "vivit": Architecture(
        built(
            "vivit",
            "ViViT",
            image_size=32,
            frames=4,
            image_patch_size=8,
            frame_patch_size=2,
            num_classes=5,
            dim=16,
            spatial_depth=1,
            temporal_depth=1,
            heads=2,
            mlp_dim=24,
            dim_head=8,
            use_flash_attn=False,
        ),
        image(1, 3, 4, 32, 32),
    ),
    "vit-1d": Architecture(
        built(
            "vit_1d",
            "ViT",
            seq_len=64,
            patch_size=8,
            num_classes=5,
            dim=16,
            depth=2,
            heads=2,
            mlp_dim=24,
            dim_head=8,
        ),
        image(2, 3, 64),
    ),
}
