"""The multiplications of a forward pass, and the sites that make them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Costs:
    """The multiplications of one forward pass. Plain data.

    Convolutions, matrix products and the products inside attention are counted, whoever makes them; products of
    elements, such as those of a normalization, are not.
    """

    sites: dict[str, int] = field(default_factory=dict)
    """Multiplications by the name of the site, in the order of the sites; 0 for one that the pass does not call."""
    other: int = 0
    """Multiplications that no site makes, such as those of queries with keys."""

    @property
    def total(self) -> int:
        """Multiplications of the whole pass; 0 if none was possible."""
        return sum(self.sites.values()) + self.other


def multiplied(operation: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> int:
    """The multiplications of one operation of torch, as `__torch_dispatch__` sees it."""
    count = flop_registry.get(operation.overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=result)) // 2  # torch counts the additions, too


def costs_of(sites: Iterable[Any], counts: Mapping[str, int]) -> Costs:
    """The costs of sites, or of decisions about them.

    Args:
        sites: each has a name, aliases and perhaps a functional call.
        counts: multiplications by the weight that was multiplied, or by the innermost module that ran.
    """
    owners: dict[str, str] = {}
    for site in sites:
        call = site.call
        weights = [] if call is None else [call.parameter, call.part, f"{call.owner}.computed"]
        for name in (site.name, *site.aliases, *weights):
            owners.setdefault(name, site.name)
        owners.pop(None, None)  # type: ignore[call-overload]
        if site.name:
            owners.pop("", None)  # a call without a part
    costs = dict.fromkeys((site.name for site in sites), 0)
    other = 0
    for name, count in counts.items():
        while name not in owners and name:
            name = name.rpartition(".")[0]
        if name in owners:
            costs[owners[name]] += count
        else:
            other += count
    return Costs(costs, other)
