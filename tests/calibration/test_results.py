"""The report of a calibration."""

from sphereify.calibration.results import Calibration, LayerFit


def test_a_calibration_prints_its_layers_its_notes_and_the_steps():
    layers = {
        "conv1": LayerFit("conv1", 0.1, 0.9, 100, 27),
        "conv2": LayerFit("conv2", -0.5, 0.7, 100, 72, "3 of 8 channels are constant"),
    }
    calibration = Calibration(layers, ["not calibrated: fc"], (0.5, 0.25))
    assert calibration.r2 == {"conv1": 0.9, "conv2": 0.7}
    assert [layer.name for layer in calibration.worst()] == ["conv2", "conv1"]
    assert str(calibration).splitlines() == [
        "2 layers calibrated, R² 0.80 on average, 0.70 at conv2",
        "steps: the outputs' error fell from 0.500 to 0.250 of their variance",
        "conv1: R² 0.100 copied, 0.900 calibrated",
        "conv2: R² -0.500 copied, 0.700 calibrated (3 of 8 channels are constant)",
        "note: not calibrated: fc",
    ]


def test_a_calibration_without_layers_prints_too():
    assert str(Calibration()) == "0 layers calibrated"
