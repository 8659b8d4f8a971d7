"""Networks during a calibration: on another device, and back."""

import contextlib

import pytest
import torch
from torch import nn

from sphereify import calibrate, sphereify
from sphereify.calibration.network_state import on_device
from sphereify.errors import UsageError
from tests.calibration.networks import hidden

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["auto", pytest.param("cuda", marks=needs_gpu)])
def test_a_calibration_on_a_device_gives_the_same_and_leaves_the_networks_where_they_were(device):
    torch.manual_seed(0)
    original = hidden(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(32, 3, 8, 8)
    here, there = sphereify(original), sphereify(original)
    calibrate(here, original, x.split(16), steps=2)
    calibrate(there, original, x.split(16), steps=2, device=device)
    assert {tensor.device.type for net in (there, original) for tensor in net.state_dict().values()} == {"cpu"}
    torch.testing.assert_close(there(x), here(x), rtol=1e-3, atol=1e-3)


class Recorded(nn.Linear):
    """Writes down where it is sent."""

    def to(self, device):
        self.__dict__.setdefault("devices", []).append(str(device))
        return self


def test_networks_come_back_after_an_error(monkeypatch):
    monkeypatch.setattr("sphereify.calibration.network_state.find_device", torch.device)
    network = Recorded(2, 2)
    with contextlib.suppress(KeyError), on_device("cuda", network) as target:
        assert target == torch.device("cuda")
        raise KeyError
    assert network.devices == ["cuda", "cpu"]


def test_a_network_on_several_devices_is_not_moved():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(UsageError, match="device: the model is spread over cpu, meta"), on_device("cpu", network):
        pass
