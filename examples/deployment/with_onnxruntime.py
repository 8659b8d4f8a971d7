"""An exported network in ONNX Runtime: one file, any batch size, no PyTorch where it runs."""

import tempfile
from pathlib import Path

import onnxruntime
import timm
import torch

from sphereify import Settings, export, finetune, sphereify
from sphereify.datasets import load_data

torch.manual_seed(0)
data = load_data("digits", channels=1)
model = sphereify(timm.create_model("test_resnet", num_classes=10, in_chans=1))
finetune(model, data, Settings(epochs=2))

images, targets = data.test[:]
with tempfile.TemporaryDirectory() as folder:
    exported = export(model, Path(folder) / "digits.onnx", images[:1])
    print(f"{exported.path.name}: {exported.size / 1e6:.1f} MB, opset {exported.opset}")
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])

(name,) = (argument.name for argument in session.get_inputs())
logits = torch.cat([torch.from_numpy(session.run(None, {name: part.numpy()})[0]) for part in images.split(100)])
with torch.no_grad():
    expected = model(images)
print(f"largest difference of logits {(logits - expected).abs().max():.1e}, largest logit {expected.abs().max():.1f}")
print(f"same class for {(logits.argmax(1) == expected.argmax(1)).float().mean():.1%} of {len(images)} images")
print(f"test accuracy {(logits.argmax(1) == targets).float().mean():.1%}")
