"""Networks of segmentation_models_pytorch."""

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.architectures.architecture import Architecture, get, image


def built(name: str, encoder: str = "resnet18", **settings: Any) -> Callable[[], nn.Module]:
    return lambda: get("segmentation_models_pytorch", name)(encoder, encoder_weights=None, classes=3, **settings)


ARCHITECTURES = {
    "unet-scse": Architecture(
        built("Unet", decoder_attention_type="scse", decoder_channels=(64, 32, 32, 16, 16)), image(2, 3, 64, 64)
    ),
    "unet-plus-plus": Architecture(
        built("UnetPlusPlus", "mobilenet_v2", decoder_channels=(32, 16, 8, 8, 8)), image(2, 3, 64, 64)
    ),
    "fpn": Architecture(built("FPN", "mobilenet_v2", decoder_pyramid_channels=32), image(2, 3, 64, 64)),
    "pspnet": Architecture(built("PSPNet", psp_out_channels=32), image(2, 3, 64, 64)),
    "deeplab-v3-plus": Architecture(built("DeepLabV3Plus", "mobilenet_v2", decoder_channels=16), image(2, 3, 64, 64)),
    "segformer": Architecture(built("Segformer", decoder_segmentation_channels=16), image(2, 3, 64, 64)),
    "upernet": Architecture(built("UPerNet", decoder_channels=16), image(2, 3, 64, 64)),
    "unet-with-classifier": Architecture(
        built(
            "Unet",
            "timm-efficientnet-b0",
            decoder_channels=(32, 16, 8, 8, 8),
            aux_params={"classes": 4, "dropout": 0.1},
        ),
        image(2, 3, 64, 64),
    ),
}
