"""Networks of other libraries, from small configurations and without downloads: what `tests.strangers` converts."""

import importlib
import importlib.util
from types import ModuleType

LIBRARIES = (
    "transformers",
    "monai",
    "segmentation_models_pytorch",
    "vit_pytorch",
    "pytorchcv",
    "diffusers",
    "speechbrain",
    "torchaudio",
    "open_clip",
    "ultralytics",
    "torch_geometric",
    "by_hand",
)
"""The modules of this package that describe networks, called after the library that builds them."""


def described(library: str) -> ModuleType:
    """The module that describes the networks of one library; it imports the library only when a network is built."""
    return importlib.import_module(f"{__name__}.{library}")


def is_installed(library: str) -> bool:
    return library == "by_hand" or importlib.util.find_spec(library) is not None
