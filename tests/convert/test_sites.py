"""What is asked of single modules."""

import pytest
from timm.layers import BatchNormAct2d
from torch import nn

from sphereify.convert.sites import has_statistics


@pytest.mark.parametrize(
    ("norm", "has"),
    [
        (nn.BatchNorm1d(3), True),
        (nn.SyncBatchNorm(3), True),
        (BatchNormAct2d(3), True),
        (nn.BatchNorm2d(3, track_running_stats=False), False),
        (nn.InstanceNorm2d(3, track_running_stats=True), False),
        (nn.GroupNorm(1, 3), False),
        (None, False),
    ],
)
def test_a_batch_norm_has_statistics_where_it_runs_them(norm, has):
    assert has_statistics(norm) is has
