"""Converted networks with parameters that are nowhere trivial, a comparison of two networks, and missing packages."""

import builtins
import importlib.util

import onnx
import torch


def scrambled(model, seed=3):
    """In evaluation, with statistics and parameters that are nowhere trivial: signs of both kinds, scales apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.copy_(0.02 + torch.rand(tensor.shape, generator=generator))
            elif tensor.dim() == 1 and not name.endswith(".p"):
                tensor.add_(0.5 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def assert_same(folded, model, *inputs, limit=1e-5):
    """Largest difference relative to the largest output; within rounding, and not because all is zero."""
    got, expected = folded(*inputs), model.eval()(*inputs)
    assert got.shape == expected.shape
    assert got.dtype is expected.dtype
    assert expected.abs().max() > 1e-3
    assert (got - expected).abs().max() <= limit * expected.abs().max()


def without(monkeypatch, *packages):
    """As if these were not installed."""
    find, load = importlib.util.find_spec, builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in packages else find(name, *a))
    monkeypatch.setattr(builtins, "__import__", refuse)


def assert_standard(path, opset=18):
    """Checked by onnx itself: operators of the domain ai.onnx alone, no functions, nothing beside the file."""
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [
        ("", opset)
    ]
    return model
