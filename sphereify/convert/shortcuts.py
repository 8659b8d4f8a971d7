"""The projection shortcuts of residual blocks in a traced graph: 1×1 convolutions that stand in for an identity."""

from collections.abc import Iterator
from typing import Any

from torch import fx

from sphereify.convert.operations import ADD
from sphereify.convert.wiring import Wiring

UPSAMPLE = {
    "interpolate", "upsample", "pixel_shuffle", "pixelshuffle", "convtranspose1d", "convtranspose2d", "convtranspose3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
OVER_ALL_POSITIONS = {"mean", "sum", "amax", "amin", "max", "min", "std", "var", "logsumexp"}
"""Operations that leave one value of many positions, besides adaptive pools."""
SMALLEST_POOL = 2
"""Window of a pool that, with any stride, still leaves each value near its place."""


def shortcuts(wiring: Wiring) -> list[fx.Node]:
    """The 1×1 convolutions that lie alone on the branch of a residual addition which skips the main path.

    For an addition a + b, a branch is what feeds one operand and not the other. The branch whose only site is a 1×1
    convolution is the shortcut if it carries the block's input to the sum, and if the other one does more to the same
    input: several sites, or a larger window. What has the same shape and is no shortcut:

    - lateral connections of a feature pyramid, which add an upsampled map;
    - gates, whose product with the features is added and not they themselves;
    - pooled branches, which add one value of many positions;
    - skip outputs, as WaveNet adds them up: taken from the middle of one residual block and added to those of others.
    """
    return list(_Additions(wiring).shortcuts())


class _Additions:
    """The additions of a graph, with what feeds their operands; sets of nodes are the bits of a number."""

    def __init__(self, wiring: Wiring):
        self.wiring = wiring
        self.nodes = list(wiring.graph.nodes)
        self.bits = {node: 1 << i for i, node in enumerate(self.nodes)}
        self.ancestors: dict[fx.Node, int] = {}
        """Nodes that a node's values depend on, itself included."""
        for node in self.nodes:
            reached = self.bits[node]
            for source in wiring.inputs(node):
                reached |= self.ancestors[source]
            self.ancestors[node] = reached
        self.sites = sum(self.bits[node] for node in wiring.sites)
        self.upsampled = sum(self.bits[node] for node in self.nodes if wiring.name(node) in UPSAMPLE)

    def shortcuts(self) -> Iterator[fx.Node]:
        for node in self.nodes:
            operands = node.all_input_nodes
            if node.op.startswith("call_") and self.wiring.name(node) in ADD and len(operands) == 2:
                for short, other in (operands, reversed(operands)):
                    branch = self.ancestors[short] & ~self.ancestors[other]
                    main = self.ancestors[other] & ~self.ancestors[short]
                    if (site := self._projection(branch, main)) is not None and self._is_residual(site, branch, main):
                        yield site

    def _projection(self, branch: int, main: int) -> fx.Node | None:
        """The 1×1 convolution that is the only site of a branch, beside a main path that does more."""
        sites, others = self._members(branch & self.sites), self._members(main & self.sites)
        if (branch | main) & self.upsampled or len(sites) != 1 or not self.wiring.is_pointwise(sites[0]):
            return None
        does_more = len(others) > 1 or (len(others) == 1 and not self.wiring.is_pointwise(others[0]))
        return sites[0] if does_more else None

    def _is_residual(self, site: fx.Node, branch: int, main: int) -> bool:
        """True if the branch carries one tensor to the sum, and the main path is a function of this tensor."""
        before = self.ancestors[site] & branch & ~self.bits[site]
        behind = [node for node in self._members(branch) if self.ancestors[node] & self.bits[site] and node is not site]
        single = [node for node in behind if self.wiring.name(node) not in ADD]
        gated = any(not self.ancestors[source] & self.bits[site] for node in single for source in self._values(node))
        if gated or not all(map(self._leaves_positions, self._members(before))):
            return False
        inputs = [source for node in [*self._members(before), site] for source in self._values(node)]
        forks = {source for source in inputs if not self.bits[source] & branch}
        if len(forks) != 1:
            return False
        (fork,) = forks
        path = [node for node in self._members(main) if self.ancestors[node] & self.bits[fork]]
        return bool(path) and not self._leaks(path) and not self._is_within_block(fork, path)

    def _leaks(self, path: list[fx.Node]) -> bool:
        """True if what the sites of the main path read is used elsewhere too, as in a network with skip outputs."""
        inside = sum(self.bits[node] for node in path)
        before = 0
        for site in self._members(inside & self.sites):
            before |= self.ancestors[site] & ~self.bits[site]
        users = (user for node in self._members(inside & before) for user in node.users if not self._is_idle(user))
        return any(not self.bits[user] & inside for user in users)

    def _is_idle(self, node: fx.Node) -> bool:
        """True for a node that reads no values, or that nothing uses."""
        return self.wiring.is_shape(node) or (node.op != "output" and not node.users)

    def _is_within_block(self, fork: fx.Node, path: list[fx.Node]) -> bool:
        """True if what follows the fork is added to something from before it: then the fork lies inside a block."""
        earlier = self.ancestors[fork] & ~self.bits[fork]
        additions = (node for node in path if self.wiring.name(node) in ADD)
        return any(self.bits[source] & earlier for node in additions for source in self._values(node))

    def _values(self, node: fx.Node) -> list[fx.Node]:
        """The features that a node takes, without parameters."""
        return [source for source in self.wiring.inputs(node) if source.op != "get_attr"]

    def _leaves_positions(self, node: fx.Node) -> bool:
        """True unless a node pools over all positions, or over a neighbourhood of each."""
        name = self.wiring.name(node)
        if "adaptive" in name or "global" in name or name in OVER_ALL_POSITIONS:
            return False
        if "pool" not in name:
            return True
        module: Any = self.wiring.modules.get(str(node.target)) if node.op == "call_module" else None
        window = getattr(module, "kernel_size", node.kwargs.get("kernel_size", (*node.args, None)[1]))
        stride = getattr(module, "stride", node.kwargs.get("stride", (*node.args, None, None)[2])) or window
        return _largest(window) <= SMALLEST_POOL or _largest(stride) > 1

    def _members(self, bits: int) -> list[fx.Node]:
        members = []
        while bits:
            lowest = bits & -bits
            members.append(self.nodes[lowest.bit_length() - 1])
            bits ^= lowest
        return members


def _largest(size: Any) -> int:
    """The largest of the numbers that a window or a stride is given as; 0 for one that is not known."""
    return max((n for n in (size if isinstance(size, (tuple, list)) else (size,)) if isinstance(n, int)), default=0)
