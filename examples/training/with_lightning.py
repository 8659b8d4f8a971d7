"""A converted network in a LightningModule: only the loss and the parameter groups differ from a plain network's."""

import argparse

import lightning
import timm
import torch
from torch.utils.data import DataLoader

from sphereify import AngularLoss, param_groups, sphereify
from sphereify.datasets import load_data
from sphereify.nn import MarginAnnealing


class Classifier(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = AngularLoss(model, annealing=MarginAnnealing(start=100, floor=1))

    def training_step(self, batch, _):
        images, targets = batch
        return self.criterion(self.model(images), targets)

    def validation_step(self, batch, _):
        images, targets = batch
        self.log("test accuracy", (self.model(images).argmax(1) == targets).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(param_groups(self.model, weight_decay=0.05), lr=2e-3)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=4)
epochs = parser.parse_args().epochs

lightning.seed_everything(0, verbose=False)
data = load_data("digits", channels=1)
model = sphereify(timm.create_model("test_resnet", num_classes=10, in_chans=1), head="a-softmax", margin=3)
trainer = lightning.Trainer(
    max_epochs=epochs,
    accelerator="auto",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
train, test = DataLoader(data.train, 64, shuffle=True, drop_last=True), DataLoader(data.test, 360)
trainer.fit(Classifier(model), train, test)
print(f"test accuracy {trainer.callback_metrics['test accuracy']:.1%}")
