"""The output layers that a traced graph shows."""

from dataclasses import dataclass, field

from torch import fx, nn

from sphereify.convert.operations import ADD, KEEPS_CLASSES, SCALE
from sphereify.convert.wiring import Wiring


@dataclass
class TracedOutputs:
    """The output layers of one graph; sites are named as in its wiring."""

    ends: list[set[str]] = field(default_factory=list)
    """Sites in which an output ends and which nothing else reads, one set for each such output."""
    corrections: set[str] = field(default_factory=set)
    """Sites among them whose product is added to the model's own input."""
    open_ended: bool = False
    """True if an output comes from a leaf with weights, whose inside the graph does not show."""


def traced_outputs(wiring: Wiring) -> TracedOutputs:
    """Find the output layers of a graph.

    What is added to features of the same width that a layer reads is one more part of these features, as the last
    layer of a residual block is; it is no output layer.
    """
    made_of = _MadeOf(wiring)
    outputs = TracedOutputs()
    output = next(node for node in reversed(wiring.graph.nodes) if node.op == "output")
    leaves = output.all_input_nodes
    if len(leaves) == 1 and isinstance(leaves[0].target, type):  # a named tuple, made by its class
        leaves = leaves[0].all_input_nodes
    for leaf in leaves:
        features = {wiring.filters(name) for name in made_of.summed[leaf] & made_of.read}
        sources = _last_sources(wiring, leaf)
        sites = {wiring.sites[node] for node in sources if node in wiring.sites} - made_of.read
        end = {name for name in sites if wiring.filters(name) not in features}
        if end:
            outputs.ends.append(end)
        if made_of.adds_input[leaf]:
            outputs.corrections |= end
        outputs.open_ended |= any(wiring.is_opaque(node) for node in sources)
    return outputs


class _MadeOf:
    """The sites, for each node, whose products reach it without passing through another site or a normalization."""

    def __init__(self, wiring: Wiring):
        self.sites: dict[fx.Node, frozenset[str]] = {}
        self.summed: dict[fx.Node, frozenset[str]] = {}
        """Sites whose products were added up."""
        self.from_input: dict[fx.Node, bool] = {}
        """True for the model's input and what no layer has read yet."""
        self.adds_input: dict[fx.Node, bool] = {}
        """True for a sum of a site's product with the model's input."""
        self.read: set[str] = set()
        """Sites whose products something else reads, and tables, whose rows are features and never scores."""
        for node in wiring.graph.nodes:
            inputs = wiring.inputs(node)
            if wiring.reads_features(node):
                self.read |= frozenset().union(*(self.sites[source] for source in inputs))
                inputs = []
            self.sites[node] = frozenset().union(*(self.sites[source] for source in inputs))
            self.summed[node] = frozenset().union(*(self.summed[source] for source in inputs))
            self.from_input[node] = node.op == "placeholder" or any(self.from_input[source] for source in inputs)
            self.adds_input[node] = any(self.adds_input[source] for source in inputs)
            if (name := wiring.sites.get(node)) is not None:
                self.sites[node] = frozenset([name])
                if isinstance(wiring.modules.get(name), (nn.Embedding, nn.EmbeddingBag)):
                    self.read.add(name)
            elif wiring.name(node) in ADD and len(inputs) == 2:
                self.summed[node] |= self.sites[node]
                self.adds_input[node] |= any(self.from_input[s] and not self.sites[s] for s in inputs)
            elif wiring.name(node) == "detach":
                self.sites[node] = frozenset()


def _last_sources(wiring: Wiring, leaf: fx.Node) -> list[fx.Node]:
    """The sites, and leaves with weights, between which and an output each channel stays a class."""
    sources, waiting, seen = [], [leaf], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in wiring.sites or wiring.is_opaque(node):
            sources.append(node)
            continue
        name, inputs = wiring.name(node), wiring.inputs(node)
        averages = name in ADD or (name in SCALE and len(inputs) == 1)
        if node.op.startswith("call_") and (wiring.moves(node) or name in KEEPS_CLASSES or averages):
            waiting += inputs
    return sources
