"""Networks of ultralytics: detection, segmentation, poses, classes. Each is built from its own description."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

from torch import nn

from tests.architectures.architecture import Architecture, get, image


def built(kind: str, description: str, **settings: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
        os.environ.setdefault("YOLO_OFFLINE", "true")
        return get("ultralytics.nn.tasks", kind)(description, ch=3, nc=4, verbose=False, **settings)

    return build


ARCHITECTURES = {
    "yolov8": Architecture(built("DetectionModel", "yolov8n.yaml"), image(1, 3, 64, 64)),
    "yolov10": Architecture(built("DetectionModel", "yolov10n.yaml"), image(1, 3, 64, 64)),
    "yolo12": Architecture(built("DetectionModel", "yolo12n.yaml"), image(1, 3, 64, 64)),
    "yolo11-segmentation": Architecture(built("SegmentationModel", "yolo11n-seg.yaml"), image(1, 3, 64, 64)),
    "yolov8-pose": Architecture(built("PoseModel", "yolov8n-pose.yaml"), image(1, 3, 64, 64)),
    "yolo11-classes": Architecture(built("ClassificationModel", "yolo11n-cls.yaml"), image(2, 3, 64, 64)),
}
