"""Inputs that are assumed for a model that comes without any."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from sphereify import plan_conversion
from sphereify.convert.assumed_inputs import assumed_inputs, runnable_inputs
from sphereify.convert.input_channels import input_channels
from sphereify.errors import UsageError
from tests.convert.models import Net


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)), 1),
        (nn.Conv2d(8, 8, 3, groups=4), 8),
        (nn.Sequential(nn.Linear(5, 5), nn.Conv2d(2, 4, 3)), 2),
        (nn.Sequential(nn.LSTM(5, 5), nn.Conv2d(2, 4, 3)), 2),
        (nn.Linear(5, 5), 3),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), 1),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)), 3),
    ],
)
def test_the_channels_of_a_model_are_those_of_its_first_convolution(model, channels):
    assert input_channels(model) == channels


def shapes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(arguments.first.shape) for arguments in assumed_inputs(model)]


@pytest.mark.parametrize(
    ("model", "first"),
    [
        (nn.Sequential(nn.Linear(7, 3)), [(2, 7), (2, 16, 7)]),
        (nn.Conv1d(2, 4, 3), [(2, 2, 224), (2, 224, 2), (2, 2, 16000)]),
        (nn.Conv2d(3, 4, 3), [(2, 3, 224, 224), (2, 3, 299, 299), (2, 3, 32, 32)]),
        (nn.Conv3d(1, 4, 3), [(2, 1, 16, 112, 112), (2, 16, 1, 112, 112)]),
        (nn.Embedding(9, 4), [(2, 16), (2, 8)]),
        (nn.LSTM(5, 4), [(2, 16, 5)]),
        (nn.TransformerEncoderLayer(8, 2), [(2, 16, 8)]),
    ],
)
def test_inputs_are_assumed_by_the_first_layer(model, first):
    assert shapes(model)[: len(first)] == first


def test_the_size_of_a_timm_model_is_tried_before_that_of_its_pretrained_weights():
    with torch.device("meta"):
        model = timm.create_model("test_vit", img_size=64)
    assert [shape[-1] for shape in shapes(model)][:2] == [64, 160]


def test_images_are_assumed_for_a_model_that_cuts_them_into_patches_before_a_linear_layer():
    with torch.device("meta"):
        model = timm.create_model("naflexvit_base_patch16_parfac_gap")
    assert shapes(model)[:2] == [(2, 768), (2, 3, 384, 384)]


def test_a_forward_of_two_arguments_is_given_two():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, first, second, scale=1.0):
            return self.conv(first) - self.conv(second)

    assert {len(arguments.args) for arguments in assumed_inputs(Pair())} == {2}


def test_runnable_inputs_have_the_dtype_of_the_model_and_the_same_values_each_time():
    first, second = (runnable_inputs(nn.Linear(4, 2).bfloat16()).first for _ in range(2))
    assert first.dtype == torch.bfloat16
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_model_that_runs_on_no_usual_input_is_refused_with_the_reason():
    model = Net(lambda n, x: n.fc(x[..., :3]), fc=nn.Linear(4, 2))
    with pytest.raises(UsageError, match=r"Net does not run on inputs of a usual shape \(RuntimeError: .*shapes"):
        runnable_inputs(model)


def test_runnable_inputs_have_as_many_rows_as_are_asked_for():
    assert runnable_inputs(nn.Linear(4, 2), 5).first.shape == (5, 4)


# -------------------------------------------------------------------------------------------- by names and declarations


def takes(signature, **modules):
    """A network whose forward has this signature."""
    scope: dict = {}
    exec(f"def forward(self, {signature}): raise NotImplementedError", scope)
    return type("Takes", (Net,), {"forward": scope["forward"]})(None, **modules)


@pytest.mark.parametrize(
    ("signature", "modules", "first"),
    [
        ("input_ids=None, attention_mask=None", {"e": nn.Embedding(9, 4)}, {"input_ids": (2, 16)}),
        ("pixel_values", {"c": nn.Conv2d(1, 4, 3)}, {"pixel_values": (2, 1, 224, 224)}),
        (
            "image=None, text=None",
            {"c": nn.Conv2d(3, 4, 3), "e": nn.Embedding(9, 4)},
            {"image": (2, 3, 224, 224), "text": (2, 16)},
        ),
        ("x, t", {"e": nn.Embedding(9, 4), "c": nn.Conv2d(3, 4, 3)}, {"x": (2, 16), "t": (2,)}),
        ("x, attention_mask", {"l": nn.Linear(5, 4)}, {"x": (2, 5), "attention_mask": (2, 16)}),
        ("input_values", {"c": nn.Conv1d(1, 4, 10)}, {"input_values": (2, 1, 224)}),
        ("text", {"l": nn.Linear(5, 4)}, {"text": (2, 5)}),  # no table of ids
    ],
)
def test_arguments_are_assumed_by_their_names(signature, modules, first):
    arguments = assumed_inputs(takes(signature, **modules))[0]
    names = [name.partition("=")[0] for name in signature.split(", ")]
    got = dict(zip(names, arguments.args, strict=False)) | dict(arguments.kwargs)
    assert {name: tuple(tensor.shape) for name, tensor in got.items()} == first


@pytest.mark.parametrize("attribute", ["dummy_inputs", "example_input_array"])
@pytest.mark.parametrize("form", ["dict", "tensor"])
def test_inputs_that_a_model_carries_come_first(attribute, form):
    model = takes("x", l=nn.Linear(5, 4))
    x = torch.ones(3, 7, 5)
    setattr(model, attribute, {"x": x} if form == "dict" else x)
    assert assumed_inputs(model)[0].first is x
    setattr(model, attribute, {"other": x})
    assert assumed_inputs(model)[0].first.shape == (2, 5)


def test_the_main_input_is_tried_where_all_are_optional_and_names_say_nothing():
    model = takes("a=None, b=None", l=nn.Linear(5, 4))
    model.main_input_name = "b"
    assert list(assumed_inputs(model)[0].kwargs) == ["b"]


# ------------------------------------------------------------------------------------------------ networks that are run


class Waves(nn.Module):
    """Takes a second of sound, to which it adds the channel itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(1, 4, 400, 160), nn.Linear(4, 3)

    def forward(self, waveform):
        assert waveform.dim() == 2
        return self.fc(self.conv(waveform[:, None]).mean(2))


class LeNet(nn.Module):
    """Takes images of 28×28 pixels alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 5), nn.Linear(2 * 24 * 24, 3)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


class Sentences(nn.Module):
    """Takes ids and their lengths, whose values it reads."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.fc = nn.Embedding(9, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, tokens, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(tokens), lengths.cpu(), batch_first=True)
        return self.fc(self.lstm(packed)[1][0][-1])


class Pairs(nn.Module):
    """Takes images and texts of 77 ids."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.text, self.position = nn.Embedding(9, 4), nn.Parameter(torch.zeros(77, 4))
        self.scale = nn.Linear(4, 4)

    def forward(self, image=None, text=None):
        a = self.image(image).mean((2, 3)) if image is not None else None
        b = self.scale((self.text(text) + self.position).mean(1)) if text is not None else None
        return a, b


class Patches(nn.Module):
    """Cuts images of 8 or of 64 patches, by the table of positions, and maps them linearly."""

    def __init__(self, channels, side, patches=64):
        super().__init__()
        self.side, self.norm = side, nn.LayerNorm(channels * side**2)
        self.embed, self.position = nn.Linear(channels * side**2, 6), nn.Parameter(torch.zeros(patches, 6))
        self.mix, self.fc = nn.Conv1d(patches, patches, 1), nn.Linear(6, 3)

    def forward(self, x):
        b, c, h, w = x.shape
        x = x.view(b, c, h // self.side, self.side, w // self.side, self.side).permute(0, 2, 4, 1, 3, 5)
        x = self.embed(self.norm(x.reshape(b, h * w // self.side**2, c * self.side**2))) + self.position
        return self.fc(self.mix(x).mean(1))


class Frames(nn.Module):
    """Takes videos with the frames before the channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv3d(3, 4, (2, 16, 16), (2, 16, 16)), nn.Linear(4, 3)

    def forward(self, pixel_values):
        assert pixel_values.shape[2] == 3
        return self.fc(self.conv(pixel_values.transpose(1, 2)).mean((2, 3, 4)))


class Towers(nn.Module):
    """Two towers, of which the one for texts takes one length alone."""

    def __init__(self):
        super().__init__()
        self.context_length = 12
        self.image, self.table = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), nn.Embedding(9, 4)
        self.positions, self.projection = nn.Parameter(torch.zeros(12, 4)), nn.Parameter(torch.ones(4, 5))

    def forward(self, image=None, text=None):
        seen = None if image is None else self.image(image).mean((2, 3))
        return seen, None if text is None else (self.table(text) + self.positions).mean(1) @ self.projection


class OwnLayer(nn.Module):
    """A linear map of another class than torch's, with the filters in columns or in rows."""

    def __init__(self, inputs, outputs, rows):
        super().__init__()
        self.rows, self.weight = rows, nn.Parameter(torch.ones((outputs, inputs) if rows else (inputs, outputs)))

    def forward(self, x):
        return F.linear(x, self.weight) if self.rows else x @ self.weight


class Graph(nn.Module):
    """Nodes that sum over their neighbours, with the number of nodes read off the edges."""

    def __init__(self, rows):
        super().__init__()
        self.first, self.fc = OwnLayer(7, 6, rows), nn.Linear(6, 3)

    def forward(self, x, edge_index):
        nodes = max(int(edge_index.max()) + 1, len(x))
        x = self.first(x)
        return self.fc(torch.zeros(nodes, 6).index_add(0, edge_index[1], x[edge_index[0]]))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Waves(), "float32 2×16000"),
        (LeNet(), "float32 2×1×28×28"),
        (LeNet().half(), "float16 2×1×28×28"),
        (Sentences(), "int64 2×16, int64 2"),
        (Pairs(), "image float32 2×3×224×224, text int64 2×77"),
        (Patches(3, 4), "float32 2×3×32×32"),
        (Patches(1, 8), "float32 2×1×64×64"),
        (Frames(), "float32 2×16×3×112×112"),
        (Towers(), "image float32 2×3×224×224, text int64 2×12"),
        (nn.Sequential(OwnLayer(7, 6, rows=True), nn.Linear(6, 3)), "float32 2×7"),
        (nn.Sequential(OwnLayer(7, 6, rows=False), nn.Linear(6, 3)), "float32 2×7"),
        (Graph(rows=True), "float32 2×7, int64 2×8"),
        (Graph(rows=False), "float32 2×7, int64 2×8"),
        (nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Linear(2, 3), nn.Linear(3, 2)), ""),
    ],
)
def test_a_network_runs_on_what_it_seems_to_take(model, inputs):
    plan = plan_conversion(model)
    assert plan.inputs == (f"assumed inputs: {inputs}" if inputs else "")
    if inputs:
        assert all(decision.called is not False for decision in plan.decisions)
        assert runnable_inputs(model.eval()).described() == inputs  # with values


class InGroups(nn.Module):
    """Multiplies groups of rows in fp32, which torch does on a CPU, but not on the meta device."""

    def __init__(self):
        super().__init__()
        self.embed, self.experts = nn.Linear(8, 16), nn.Parameter(torch.ones(2, 16, 16))
        self.fc = nn.Linear(16, 3)

    def forward(self, x):
        ends = torch.tensor([1, 2], dtype=torch.int32, device=x.device)
        return self.fc(torch._grouped_mm(self.embed(x), self.experts, offs=ends))


def test_values_are_tried_where_the_meta_device_is_stricter_than_the_cpu():
    model = InGroups()
    try:
        model(torch.randn(2, 8))
    except RuntimeError as error:
        pytest.skip(f"torch {torch.__version__} has no grouped product in fp32 ({error})")
    plan = plan_conversion(model)
    assert plan.inputs == "assumed inputs: float32 2×8"
    assert {d.name: d.action for d in plan.decisions} == {"embed": "convert", "experts": "keep", "fc": "convert"}


def test_a_network_that_fails_in_the_same_words_at_each_size_is_not_tried_at_all_of_them():
    tried = []

    def refuse(n, x):
        tried.append(tuple(x.shape))
        raise RuntimeError("no")

    model = Net(refuse, conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 2))
    with pytest.raises(UsageError, match=r"RuntimeError: no"):
        runnable_inputs(model)
    assert len([shape for shape in tried if len(shape) == 4]) == 3
