"""Operations by their effect on features. Each goes by the name of a function, a method or a module's class, in lower
case."""

SAME_VALUES = {
    "contiguous", "view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "to",
    "float", "type", "type_as", "getitem", "clone", "chunk", "unbind", "movedim", "getattr", "dropout", "identity",
    "t", "_assert", "sym_size", "drop_path", "dropout1d", "dropout2d", "dropout3d", "droppath", "rearrange",
    "alphadropout",
}  # fmt: skip
"""Operations that move values without mixing channels."""
LEAVES_IN_PLACE = {
    "contiguous", "clone", "identity", "dropout", "dropout1d", "dropout2d", "dropout3d", "droppath", "drop_path",
    "alphadropout",
}  # fmt: skip
"""Operations after which, in evaluation, each value is still where it was."""
KEEPS_CLASSES = {
    "softmax", "log_softmax", "logsoftmax", "sigmoid", "relu", "mean", "sum", "interpolate", "upsample", "avg_pool2d",
    "adaptive_avg_pool2d", "adaptiveavgpool2d", "avgpool2d", "adaptiveavgpool1d", "adaptive_avg_pool1d", "stack",
    "selectadaptivepool2d", "masked_fill", "masked_fill_", "where", "nan_to_num", "nan_to_num_", "clamp", "clamp_",
    "clip", "clip_", "hardtanh", "neg", "negative", "exp", "log", "log1p", "logsigmoid", "log_sigmoid", "softplus",
    "double", "half", "bfloat16",
}  # fmt: skip
"""Operations between the classifier and the output of a model that leave each channel its class."""
ONLY_SHAPES = {
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "new_tensor",
}  # fmt: skip
"""Operations that take the shape, dtype and device of a tensor and none of its values."""
SOFTMAX = {"softmax", "softmax2d"}
HIDDEN_ACTIVATIONS = {"tanh", "gelu", "silu", "elu", "selu", "celu", "mish", "leaky_relu", "hardswish", "prelu"}
"""Activations of hidden features; a sigmoid and a ReLU also make probabilities and lengths of scores."""
RECTIFIERS = {"relu", "relu_"}
ADD = {"add", "iadd", "add_", "sub", "isub", "sub_", "subtract"}
"""Sums, and differences, which are sums with a sign."""
SCALE = {"mul", "truediv", "div", "imul", "itruediv", "mul_", "div_"}
GROUPED_PRODUCTS = {
    "grouped_mm", "_grouped_mm", "scaled_grouped_mm", "_scaled_grouped_mm",
}  # fmt: skip
"""Products in which each group of rows has a matrix of its own, as the tokens of each expert."""
PRODUCT_NAMES = {"matmul", "mm", "bmm", "baddbmm", "einsum", "tensordot", "inner", "mv"} | GROUPED_PRODUCTS
CASTS = {"bfloat16", "half", "double", "expand", "expand_as", "repeat_interleave", "detach"}
"""Further operations that leave values what they are, but for rounding and repetition."""
SELECTS = {"getitem", "index_select", "gather", "take_along_dim", "select", "narrow", "chunk", "unbind", "split"}
"""Operations that take parts of a tensor."""


def word(function: object) -> str:
    """The name of a function or method, in lower case: `add` for `__radd__`, `getattr` for a property."""
    name = getattr(function, "__name__", "").lower()
    bare = name.strip("_") if name.startswith("__") else name
    reflected = {
        "radd": "add",
        "rsub": "sub",
        "rmul": "mul",
        "rtruediv": "truediv",
        "rmatmul": "matmul",
        "get": "getattr",
    }
    return reflected.get(bare, bare)
