"""Networks in the manner of scripts: what people write without a library."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.architectures.architecture import VOCABULARY, Architecture, ids, image


class TableTokenizer(nn.Module):
    """A table whose columns become tokens: a weight and a bias for each number."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.ModuleList(nn.Linear(1, 16) for _ in range(4))
        self.block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.norm, self.classifier = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([column(x[:, i : i + 1]) for i, column in enumerate(self.columns)], 1)
        return self.classifier(self.norm(self.block(tokens)).mean(1))


class Collecting(nn.Module):
    """A segmentation network that collects features by hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()
        )
        self.lateral, self.out = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 2, 3, padding=1)
        self.features: dict[str, Tensor] = {}
        self.encoder[2].register_forward_hook(self._collect)

    def _collect(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.features["fine"] = output

    def forward(self, x: Tensor) -> Tensor:
        coarse = self.encoder(x)
        fine = self.lateral(self.features.pop("fine"))
        return self.out(fine + F.interpolate(coarse, size=fine.shape[2:]))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, 16)
        self.cell = nn.GRU(16, 16, batch_first=True)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.cell(self.wte(tokens))
        return self.head(self.mix(hidden).tanh())


class Experts(nn.Module):
    """A mixture whose experts are the slices of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate = nn.Linear(8, 16), nn.Linear(16, 3, bias=False)
        self.up = nn.Parameter(torch.randn(3, 16, 24) / 4)
        self.down = nn.Parameter(torch.randn(3, 24, 16) / 5)
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights = self.gate(x).softmax(-1)
        hidden = torch.einsum("bi,eio->beo", x, self.up).relu()
        mixed = torch.einsum("beo,eoi,be->bi", hidden, self.down, weights)
        return self.classifier(x + mixed)


class WaveNet(nn.Module):
    """Dilated causal convolutions with weight norm, gates and skip outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.start = weight_norm(nn.Conv1d(1, 8, 1))
        self.gates = nn.ModuleList(weight_norm(nn.Conv1d(8, 16, 2, dilation=2**i)) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))
        self.residuals = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(3))
        self.end = nn.Conv1d(8, 5, 1)

    def forward(self, wave: Tensor) -> Tensor:
        x, total = self.start(wave), 0
        for i, (gate, skip, residual) in enumerate(zip(self.gates, self.skips, self.residuals, strict=True)):
            a, b = gate(F.pad(x, (2**i, 0))).chunk(2, 1)
            y = a.tanh() * b.sigmoid()
            total, x = total + skip(y), x + residual(y)
        return self.end(F.relu(total))


class Hypernetwork(nn.Module):
    """A convolution whose filters another network computes from a learned code."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(1, 6))
        self.maker = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8 * 3 * 9))
        self.norm, self.classifier = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        filters = self.maker(self.code).view(8, 3, 3, 3)
        return self.classifier(self.norm(F.conv2d(x, filters, padding=1)).relu().mean((2, 3)))


class Discriminator(nn.Module):
    """Spectral norm everywhere, and a projection of the class."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            spectral_norm(nn.Conv2d(3, 8, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(8, 16, 4, 2, 1)),
            nn.LeakyReLU(0.2),
        )
        self.score, self.classes = spectral_norm(nn.Linear(16, 1)), nn.Embedding(4, 16)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        features = self.convolutions(x).sum((2, 3))
        return self.score(features) + (features * self.classes(label)).sum(1, keepdim=True)


class ZeroStart(nn.Module):
    """Residual branches that begin with 0, and an adapter of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(2))
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
        self.norm, self.classifier = nn.LayerNorm(16), nn.Linear(16, 4)
        for branch in self.branches:
            nn.init.zeros_(branch[2].weight)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for branch in self.branches:
            x = x + branch(x)
        return self.classifier(self.norm(x + self.up(self.down(x))))


class AnchorFree(nn.Module):
    """A detector that returns classes, boxes and centres for each level."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.levels = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.GroupNorm(2, 8)) for _ in range(2))
        self.tower = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.ReLU())
        self.classes, self.boxes, self.centre = (nn.Conv2d(8, n, 3, 1, 1) for n in (5, 4, 1))

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        x, outputs = self.stem(x), []
        for level in self.levels:
            x = level(x)
            y = self.tower(x)
            outputs.append({"classes": self.classes(y), "boxes": self.boxes(y).exp(), "centre": self.centre(y)})
        return outputs


class Siamese(nn.Module):
    """Two images through one network, and the cosine of what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten())
        self.embed = nn.LazyLinear(16)
        self.embed(self.net(torch.zeros(1, 1, 16, 16)))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = (F.normalize(self.embed(self.net(x)), dim=1) for x in (left, right))
        return (a * b).sum(1)


ARCHITECTURES = {
    "table-tokenizer": Architecture(TableTokenizer, image(6, 4)),
    "hooks": Architecture(Collecting, image(2, 3, 16, 16)),
    "tied-language-model": Architecture(TiedLanguageModel, lambda: (ids(2, 9),)),
    "experts": Architecture(Experts, image(6, 8)),
    "wavenet": Architecture(WaveNet, image(2, 1, 24)),
    "hypernetwork": Architecture(Hypernetwork, image(2, 3, 10, 10)),
    "discriminator": Architecture(Discriminator, lambda: (torch.randn(2, 3, 16, 16), torch.tensor([1, 2]))),
    "zero-start": Architecture(ZeroStart, image(6, 8)),
    "anchor-free": Architecture(AnchorFree, image(2, 3, 32, 32)),
    "siamese": Architecture(Siamese, lambda: (torch.randn(2, 1, 16, 16), torch.randn(2, 1, 16, 16))),
}
