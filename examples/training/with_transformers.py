"""A converted network in the Trainer of Hugging Face, which takes a model that returns its loss and its logits."""

import argparse
import tempfile

import timm
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from sphereify import AngularLoss, param_groups, sphereify
from sphereify.datasets import load_data
from sphereify.nn import AngularOutput, MarginAnnealing


class WithLoss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.criterion = AngularLoss(model, annealing=MarginAnnealing(start=100, floor=1))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        output = self.model(images)
        logits = output.logits if isinstance(output, AngularOutput) else output
        return {"loss": self.criterion(output, labels), "logits": logits}


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*rows, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=4)
epochs = parser.parse_args().epochs

data = load_data("digits", channels=1)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        dataloader_drop_last=True,
        seed=0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    torch.manual_seed(0)
    model = sphereify(timm.create_model("test_resnet", num_classes=10, in_chans=1), head="a-softmax", margin=3)
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=2e-3)
    trainer = Trainer(
        WithLoss(model),
        arguments,
        data_collator=collate,
        train_dataset=data.train,
        eval_dataset=data.test,
        optimizers=(optimizer, None),
        compute_metrics=lambda output: {"accuracy": (output.predictions.argmax(1) == output.label_ids).mean()},
    )
    trainer.train()
    print(f"test accuracy {trainer.evaluate()['eval_accuracy']:.1%}")
