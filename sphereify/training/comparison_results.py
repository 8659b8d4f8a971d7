"""Results of a comparison: the runs of each variant, and their table."""

import statistics
from dataclasses import dataclass, field

from sphereify.training.results import Result
from sphereify.training.robustness import Robustness
from sphereify.training.verification import Verification

TOLD_RATE = 1e-2
"""The false accept rate whose true accept rate the table of a comparison tells."""
TAR_COLUMN = f"true accepts at FAR {TOLD_RATE:g}, %"


@dataclass(frozen=True)
class SeedRuns:
    """The runs of a variant, one for each seed."""

    name: str
    results: list[Result]

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of each run after its last epoch, in [0, 1]."""
        return [result.accuracy for result in self.results]

    @property
    def mean(self) -> float:
        """Mean accuracy over the seeds."""
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the accuracy over the seeds; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.results) > 1 else None

    def steps_to(self, accuracy: float) -> float | None:
        """Mean over the seeds of the optimizer steps until a test first reached `accuracy`; None if a run never did."""
        firsts = [next((e.step for e in r.epochs if e.accuracy >= accuracy), None) for r in self.results]
        return None if None in firsts else statistics.mean(firsts)  # type: ignore[type-var]

    @property
    def images_per_second(self) -> float:
        """Training speed: the median over epochs and seeds."""
        return statistics.median(epoch.images_per_second for result in self.results for epoch in result.epochs)

    @property
    def peak_memory(self) -> int | None:
        """Largest memory in bytes on the GPU; None on a CPU."""
        return max((r.peak_memory for r in self.results if r.peak_memory is not None), default=None)


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, and their table."""

    runs: list[SeedRuns]
    """The runs of each variant, in the order of the variants."""
    reach: float
    """The accuracy to which steps are counted, in [0, 1]."""
    robustness: list[Robustness] = field(default_factory=list)
    """Accuracies on corrupted images, for each seed, if they were asked for."""
    verification: list[dict[str, Verification]] = field(default_factory=list)
    """Results on held-out classes by the name of the variant, for each seed, if they were asked for."""

    def markdown(self) -> str:
        """The table in Markdown, a variant in each line."""
        columns = self.columns()
        head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
        return head + "".join(f"| {' | '.join(row)} |\n" for row in self.rows())

    def columns(self) -> list[str]:
        """The headings of `rows`."""
        memory = ["peak memory"] if self._on_gpu else []
        corrupted = ["under corruptions, %"] if self.robustness else []
        verified = [TAR_COLUMN, "equal error rate, %"] if self.verification else []
        return [
            "",
            "test accuracy, %",
            *corrupted,
            *verified,
            f"steps to {self.reach:.1%}",
            "images/s",
            "ratio",
            *memory,
        ]

    @property
    def _on_gpu(self) -> bool:
        return any(runs.peak_memory is not None for runs in self.runs)

    def rows(self) -> list[list[str]]:
        """The cells of the table, a variant in each row; "ratio" is its speed relative to the first variant's.

        With corruptions, a network that was not trained here, the original behind contrast standardisation, has a row
        with its accuracies alone.
        """
        names = [runs.name for runs in self.runs]
        others = [name for seed in self.robustness[:1] for name in seed.networks if name not in names]
        blank = [""] * (len(self.columns()) - 3)
        clean = {name: [seed.networks[name].clean for seed in self.robustness] for name in others}
        rows = [[name, _mean_and_deviation(clean[name]), *self._under_corruptions(name), *blank] for name in others]
        trained = self._trained_rows()
        return [*trained[:1], *rows, *trained[1:]]

    def _under_corruptions(self, name: str) -> list[str]:
        shares = [seed.networks[name].mean for seed in self.robustness]
        return [_mean_and_deviation(shares)] if shares else []

    def _on_held_out_classes(self, name: str) -> list[str]:
        if not self.verification:
            return []
        results = [seed[name] for seed in self.verification]
        shares = [share for result in results if (share := result.tar[TOLD_RATE]) is not None]
        true_accepts = _mean_and_deviation(shares) if len(shares) == len(results) else "too few pairs"
        return [true_accepts, _mean_and_deviation([result.eer for result in results])]

    def _trained_rows(self) -> list[list[str]]:
        base = self.runs[0].images_per_second
        return [
            [
                runs.name,
                _mean_and_deviation(runs.accuracies),
                *self._under_corruptions(runs.name),
                *self._on_held_out_classes(runs.name),
                "not reached" if (steps := runs.steps_to(self.reach)) is None else f"{steps:.0f}",
                f"{runs.images_per_second:.0f}",
                f"{runs.images_per_second / base:.2f}",
                *([f"{(runs.peak_memory or 0) / 2**20:.0f} MiB"] if self._on_gpu else []),
            ]
            for runs in self.runs
        ]


def _mean_and_deviation(shares: list[float]) -> str:
    """Mean and standard deviation in percent; the mean alone of a single share."""
    deviation = f" ± {100 * statistics.stdev(shares):.2f}" if len(shares) > 1 else ""
    return f"{100 * statistics.mean(shares):.2f}{deviation}"
