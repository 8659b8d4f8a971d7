"""Networks of open_clip: two towers, of images and of text."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.architectures.architecture import VOCABULARY, Architecture, get, ids

TEXT = {"context_length": 12, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2}
TRANSFORMER = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}


def built(name: str, vision: dict[str, Any], **settings: Any) -> Callable[[], nn.Module]:
    return lambda: get("open_clip.model", name)(embed_dim=8, vision_cfg=vision, text_cfg=TEXT, **settings)


def coca() -> nn.Module:
    text = {**TEXT, "embed_cls": True, "output_tokens": True, "context_length": 12}
    vision = {**TRANSFORMER, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    decoder = {"context_length": 12, "vocab_size": VOCABULARY, "width": 16, "heads": 2, "layers": 2}
    return get("open_clip.coca_model", "CoCa")(
        embed_dim=16, multimodal_cfg=decoder, text_cfg={**text, "width": 16}, vision_cfg=vision
    )


def both() -> tuple[Any, ...]:
    return (torch.randn(2, 3, 32, 32), ids(2, 12))


ARCHITECTURES = {
    "vit": Architecture(built("CLIP", TRANSFORMER), both),
    "modified-resnet": Architecture(
        built("CLIP", {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1], "head_width": 8}), both
    ),
    "timm-tower": Architecture(
        built(
            "CustomTextCLIP",
            {
                "image_size": 32,
                "timm_model_name": "test_convnext",
                "timm_model_pretrained": False,
                "timm_pool": "avg",
                "timm_proj": "linear",
            },
        ),
        both,
    ),
    "coca": Architecture(coca, lambda: (torch.randn(2, 3, 32, 32), ids(2, 12))),
}
