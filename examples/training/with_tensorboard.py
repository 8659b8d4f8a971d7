"""The folder of a training run, as TensorBoard reads it: `tensorboard --logdir RUN/tensorboard`."""

import tempfile
from pathlib import Path

import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sphereify import Settings, finetune, sphereify
from sphereify.datasets import load_data

torch.manual_seed(0)
data = load_data("digits", channels=1)
model = sphereify(timm.create_model("test_resnet", num_classes=10, in_chans=1))
with tempfile.TemporaryDirectory() as folder:
    run = Path(folder) / "run"
    finetune(model, data, Settings(epochs=3), output=run)
    print("the run's folder:", ", ".join(sorted(path.name for path in run.iterdir())))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    print(f"{len(events.Tags()['scalars'])} curves, among them:")
    for tag in ("loss", "accuracy", "lr", "energy/fc"):
        print(f"{tag}: {', '.join(f'{event.value:.4g} at step {event.step}' for event in events.Scalars(tag))}")
