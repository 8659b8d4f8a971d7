"""Evaluation: accuracies on held-out images."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sphereify.training import (
    accuracy,
)


def test_accuracy_is_the_share_of_right_answers_over_uneven_batches():
    logits = torch.eye(4)[[0, 1, 2, 3, 0, 1, 2]]
    data = TensorDataset(logits, torch.tensor([0, 1, 2, 3, 1, 2, 2]))
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    assert accuracy(model, DataLoader(data, batch_size=3)) == pytest.approx(5 / 7)
    assert not model.training
