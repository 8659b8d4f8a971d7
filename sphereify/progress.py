"""Progress of long work in a terminal: a bar while it lasts, and lines that stay."""

from typing import TYPE_CHECKING

from sphereify.terminal import console, progress_bar, say
from sphereify.torchrun import is_first_process

if TYPE_CHECKING:
    from sphereify.calibration.agreement import Trial
    from sphereify.training import Epoch, Step


class TrainingProgress:
    """A bar with loss, learning rate and speed in a terminal, and a line for each epoch anywhere.

    Its methods `run`, `step` and `epoch` are callbacks of `finetune` and `compare`.
    """

    def __init__(self, epochs: int):
        self.epochs = epochs
        self.console = console()
        self.bar = progress_bar(self.console)
        self.task = self.bar.add_task("training", total=None)
        self.accuracy = ""

    def __enter__(self) -> "TrainingProgress":
        if is_first_process():
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def run(self, name: str, seed: int) -> None:
        """Begin another run of a comparison."""
        say(self.console, f"{name}, seed {seed}", "bold")
        self.accuracy = ""

    def line(self, text: str) -> None:
        """Print a line that stays."""
        say(self.console, text, soft_wrap=True)

    def step(self, step: "Step") -> None:
        """Move the bar to an optimizer step."""
        text = f"loss {step.loss:.3f}  lr {step.lr:.1e}  {step.images_per_second:.0f} images/s{self.accuracy}"
        self.bar.update(self.task, completed=step.number, total=step.steps, description=text)

    def epoch(self, epoch: "Epoch") -> None:
        """Print the results of an epoch."""
        self.accuracy = f"  accuracy {epoch.accuracy:.2%}"
        skipped = f"  {epoch.skipped} images skipped" if epoch.skipped else ""
        line = f"epoch {epoch.number:>3}/{self.epochs}  loss {epoch.loss:.4f}  test accuracy {epoch.accuracy:.2%}"
        say(self.console, f"{line}  {epoch.images_per_second:.0f} images/s{skipped}")


class ImagesProgress:
    """A bar over images in a terminal; its method `images` is a callback of `robustness`."""

    def __init__(self, what: str):
        self.bar = progress_bar(console(stderr=True))
        self.task = self.bar.add_task(what, total=None)

    def __enter__(self) -> "ImagesProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def images(self, done: int, total: int) -> None:
        """Move the bar to a number of images."""
        self.bar.update(self.task, completed=done, total=total)


class CalibrationProgress:
    """A bar over the layers of a calibration, and one over its optimizer steps if it makes any.

    Its methods `layer` and `step` are callbacks of `calibrate`, these and `trial` of `choose_radius`.

    Args:
        layers: number of layers; None to learn it from the first trial.
        steps: number of optimizer steps.
    """

    def __init__(self, layers: int | None, steps: int):
        self.bar = progress_bar(console(stderr=True))
        self.layers = self.bar.add_task("calibrating", total=layers)
        self.steps = self.bar.add_task("steps", total=steps, visible=steps > 0)

    def __enter__(self) -> "CalibrationProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def layer(self, name: str, explained: float) -> None:
        """Move the bar past a layer."""
        self.bar.update(self.layers, advance=1, description=f"calibrating {name}")

    def trial(self, trial: "Trial") -> None:
        """Print what a trial gave, and begin another one."""
        say(self.bar.console, f"{trial.described}: {trial.agreement:.1%} agreement with the original")
        self.bar.update(self.layers, completed=0, total=len(trial.r2))

    def step(self, step: int, loss: float) -> None:
        """Move the bar to an optimizer step."""
        self.bar.update(self.steps, completed=step, description=f"steps, error {loss:.3f}")
