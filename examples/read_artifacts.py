"""Load converted models from disk and describe them: `python examples/read_artifacts.py FOLDER…`"""

import sys

import torch

from sphereify import load
from sphereify.artifact import read_document
from sphereify.convert.input_channels import input_channels

for folder in sys.argv[1:]:
    model = load(folder)
    images = torch.randn(2, input_channels(model), 64, 64)
    with torch.no_grad():
        logits = model(images)
    trained = read_document(folder)["training"]
    accuracy = f", test accuracy {trained['accuracy']:.2%} on {trained['data']}" if trained else ""
    print(f"{folder}: {model.conversion_plan.summary()}; logits {tuple(logits.shape)}{accuracy}")
