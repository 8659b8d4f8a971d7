"""Networks of PyTorch Geometric: features of nodes and edges of one graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures.architecture import Architecture, get

NODES = 12


def built(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: get("torch_geometric.nn", name)(**settings)


def edges() -> Tensor:
    """A ring with a second neighbour, in both directions."""
    source = torch.arange(NODES)
    pairs = [torch.stack([source, (source + step) % NODES]) for step in (1, 2, NODES - 1, NODES - 2)]
    return torch.cat(pairs, 1)


def graph() -> tuple[Any, ...]:
    return (torch.randn(NODES, 8), edges())


class _Classifier(nn.Module):
    """Two layers of one kind on a graph, with the mean over its nodes and a classifier."""

    def __init__(self, layer: str, **settings: Any):
        super().__init__()
        make = get("torch_geometric.nn", layer)
        self.first, self.second = make(8, 16, **settings), make(16, 16, **settings)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor, *more: Tensor) -> Tensor:
        x = self.first(x, edge_index, *more).relu()
        x = self.second(x, edge_index, *more).relu()
        return self.classifier(x.mean(0, keepdim=True))


def of_layers(layer: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: _Classifier(layer, **settings)


SIZES = {"in_channels": 8, "hidden_channels": 16, "num_layers": 2, "out_channels": 3}

ARCHITECTURES = {
    "gcn": Architecture(built("GCN", **SIZES), graph),
    "gat": Architecture(built("GAT", **SIZES, heads=2, v2=True), graph),
    "gin": Architecture(built("GIN", **SIZES), graph),
    "graph-sage": Architecture(built("GraphSAGE", **SIZES), graph),
    "edge-cnn": Architecture(built("EdgeCNN", **SIZES), graph),
    "transformer-layers": Architecture(of_layers("TransformerConv", heads=1), graph),
    "relations": Architecture(of_layers("RGCNConv", num_relations=2), lambda: (*graph(), torch.arange(4 * NODES) % 2)),
    "relations-in-bases": Architecture(
        of_layers("RGCNConv", num_relations=3, num_bases=2), lambda: (*graph(), torch.arange(4 * NODES) % 3)
    ),
    "chebyshev": Architecture(of_layers("ChebConv", K=2), graph),
    "arma": Architecture(of_layers("ARMAConv", num_stacks=2), graph),
}
