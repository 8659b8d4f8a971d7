"""A converted network quantized by torchao: fold it first, then its linear maps are ordinary ones with int8 weights.

An angular layer needs the lengths of its filters, which int8 weights do not give; folding makes them constants.
"""

import io

import timm
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

from sphereify import Settings, finetune, fold, sphereify
from sphereify.datasets import load_data
from sphereify.errors import UnsupportedModelError

torch.manual_seed(0)
data = load_data("digits", channels=1)
model = sphereify(timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=32, patch_size=8))
finetune(model, data, Settings(epochs=10, lr=3e-3))
images, targets = data.test[:]


def report(name: str, network: torch.nn.Module) -> None:
    with torch.no_grad():
        answers = network(images).argmax(1)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    print(f"{name}: test accuracy {(answers == targets).float().mean():.1%}, {file.tell() / 1e6:.2f} MB")


report("fp32", fold(model))
for name, config in (
    ("int8 weights", Int8WeightOnlyConfig()),
    ("int8 weights and activations", Int8DynamicActivationInt8WeightConfig()),
):
    quantized = fold(model)
    quantize_(quantized, config)
    report(name, quantized)

try:
    quantize_(model, Int8WeightOnlyConfig())
except UnsupportedModelError as error:
    print(f"without folding: {error}")
