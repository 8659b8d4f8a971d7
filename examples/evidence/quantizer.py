"""ONNX Runtime's static quantization of an exported network, with 8 bits or fewer levels."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MINMAX, PERCENTILE = "MinMax", "Percentile"
PRODUCTS = ("Conv", "Gemm", "MatMul")
"""ONNX's operators that multiply by filters."""
LOWEST = -128
"""The lowest value of an 8-bit integer, that of the lower end of a range."""
BATCH = 32


@dataclass(frozen=True)
class Setting:
    """How a network is quantized."""

    operators: str
    """The operators that are: "all operators" or "products"."""
    method: str
    """How the ranges of activations are found: "MinMax", "Percentile" or "Entropy"."""
    per_channel: bool
    """True if each filter has a range of its own."""
    bits: int = 8

    @property
    def name(self) -> str:
        ranges = "per channel" if self.per_channel else "per tensor"
        return f"{self.bits} bits, {self.operators}, {self.method}, {ranges}"


def prepare(source: Path, target: Path) -> None:
    """Write a copy of a network that is ready for a quantization: with BatchNorm in the convolutions before it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(target), skip_symbolic_shape=True)


def quantize(source: Path, target: Path, images: Tensor, setting: Setting) -> None:
    """Write a quantized copy of a network from `prepare`.

    Args:
        images: (N, C, H, W), from which the ranges of activations are found.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    model = onnx.load(str(source))
    only: dict[str, Any] = {}
    if setting.operators == "products":
        only = {"op_types_to_quantize": list(PRODUCTS), "nodes_to_exclude": window_sums(model)}
    # A percentile of 99.99 leaves out the ends that MinMax keeps; the default of 99.999 hardly differs from it.
    extra = {"CalibPercentile": 99.99} if setting.method == PERCENTILE else {}
    with _quiet():
        quantize_static(
            str(source), str(target), _Reader(images, model.graph.input[0].name), quant_format=QuantFormat.QDQ,
            per_channel=setting.per_channel, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[setting.method], extra_options=extra, **only,
        )  # fmt: skip
    if setting.bits < 8:
        quantized = onnx.load(str(target))
        reduce_levels(quantized, setting.bits)
        onnx.save(quantized, str(target))


def window_sums(model: Any) -> list[str]:
    """Names of the convolutions that only sum, as angular layers do with squares: all of their weights are equal."""
    from onnx import numpy_helper

    weights = {one.name: one for one in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and node.input[1] in weights]
    arrays = {node.name: numpy_helper.to_array(weights[node.input[1]]) for node in convolutions}
    return [name for name, array in arrays.items() if array.min() == array.max()]


def reduce_levels(model: Any, bits: int) -> None:
    """Quantize to 2**bits levels what has 2**8, in the same ranges: activations, and weights of products.

    The 8-bit integers stay the type; the values of an activation lie in the lowest 2**bits of them, where a clip before
    the rounding keeps those that are beyond the range.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {one.name: one for one in graph.initializer}

    def put(name: str, value: Any) -> None:
        constants[name].CopyFrom(numpy_helper.from_array(value, name))

    last = 2**bits - 1
    changed: dict[str, Any] = {}
    nodes = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            scale_name, zero_name = node.input[1:3]
            if scale_name not in changed:
                scale = numpy_helper.to_array(constants[scale_name])
                zero = numpy_helper.to_array(constants[zero_name]).astype(np.int64)
                coarse = (scale * (255 / last)).astype(np.float32)
                moved = np.rint((zero - LOWEST) * last / 255)
                put(scale_name, coarse)
                put(zero_name, (moved + LOWEST).astype(np.int8))
                changed[scale_name] = ((last - moved) * coarse).astype(np.float32)
            highest = f"{node.name}_highest"
            graph.initializer.append(numpy_helper.from_array(changed[scale_name], highest))
            clipped = f"{node.name}_clipped"
            nodes.append(helper.make_node("Min", [node.input[0], highest], [clipped], name=f"{node.name}_clip"))
            node.input[0] = clipped
        nodes.append(node)
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        source = makers.get(node.input[1]) if node.op_type in PRODUCTS else None
        if source is not None and source.op_type == "DequantizeLinear" and source.input[0] in constants:
            weight_name, scale_name = source.input[:2]
            if weight_name in changed:
                continue
            changed[weight_name] = True
            half = 2 ** (bits - 1) - 1
            weight = numpy_helper.to_array(constants[weight_name])
            scale = numpy_helper.to_array(constants[scale_name])
            put(weight_name, np.rint(weight * (half / 127)).clip(-half, half).astype(np.int8))
            put(scale_name, (scale * (127 / half)).astype(np.float32))
    del graph.node[:]
    graph.node.extend(nodes)


def logits(file: Path, images: Tensor) -> Tensor:
    """The outputs of a network in a file.

    Nothing is fused, so that quantized values are multiplied in floating point: some processors' kernels saturate.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: x.numpy()})[0]) for x in images.split(100)])


class _Reader:
    """Images in batches, as ONNX Runtime's calibration asks for them."""

    def __init__(self, images: Tensor, name: str):
        self.batches = iter([{name: batch.numpy()} for batch in images.split(BATCH)])

    def get_next(self) -> Any:
        return next(self.batches, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the prints and warnings of ONNX Runtime's quantization."""
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as nowhere:
            from contextlib import redirect_stdout

            with redirect_stdout(nowhere):
                yield
    finally:
        logger.setLevel(before)
