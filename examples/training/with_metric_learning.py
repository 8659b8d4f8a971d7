"""A converted network that learns embeddings, in the trainer of pytorch-metric-learning with its miner and tester.

The network has no classifier: `as_metric_loss` makes an angular head the loss, with the class weights in it. Half of
the digits are seen in training; the others are told apart by their nearest neighbours alone.
"""

import argparse

import timm
import torch
from pytorch_metric_learning import distances, miners, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from sphereify import param_groups, sphereify
from sphereify.class_splits import choose_classes, only_classes, without_classes
from sphereify.datasets import load_data
from sphereify.nn import AngularHead, as_metric_loss

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=4)
epochs = parser.parse_args().epochs

torch.manual_seed(0)
data = load_data("digits", channels=1)
held_out = choose_classes(data.classes, 5)
seen, unseen = without_classes(data, held_out), only_classes(data, held_out)

trunk = sphereify(timm.create_model("test_resnet", num_classes=0, in_chans=1), head="keep")
loss = as_metric_loss(AngularHead(trunk.num_features, len(seen.classes), kind="cosface", scale=16))
trainer = trainers.MetricLossOnly(
    models={"trunk": trunk},
    optimizers={
        "trunk_optimizer": torch.optim.AdamW(param_groups(trunk, weight_decay=0.05), lr=2e-3),
        "metric_loss_optimizer": torch.optim.AdamW(loss.parameters(), lr=2e-3, weight_decay=0),
    },
    batch_size=64,
    loss_funcs={"metric_loss": loss},
    mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},  # samples in many hard pairs weigh more
    dataset=seen.train,
    data_device="cpu",
    dataloader_num_workers=0,
    dtype=torch.float32,
)
tester = testers.GlobalEmbeddingSpaceTester(
    data_device="cpu",
    dataloader_num_workers=0,
    dtype=torch.float32,
    accuracy_calculator=AccuracyCalculator(
        include=("precision_at_1", "r_precision"), knn_func=CustomKNN(distances.CosineSimilarity())
    ),
)


print(f"digits {', '.join(seen.classes)} are seen in training, {', '.join(held_out)} are not")
for when, epochs_done in (("before", 0), ("after", epochs)):
    trainer.train(num_epochs=epochs_done)
    measures = tester.test({"test": unseen.test}, epochs_done, trunk)["test"]
    precision, r_precision = (measures[f"{name}_level0"] for name in ("precision_at_1", "r_precision"))
    print(
        f"{when} training: nearest neighbour right for {precision:.1%} of the unseen digits, "
        f"R-precision {r_precision:.1%}"
    )
