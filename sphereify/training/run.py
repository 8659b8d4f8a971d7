"""Training: timm's optimizers, schedules and averages around an angular loss, continued where it stopped."""

import shlex
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sphereify.annotations import PREPARATION
from sphereify.convert.finite import first_bad_layer, first_bad_weight
from sphereify.datasets import Data
from sphereify.errors import DataError, Interrupted, SphereifyWarning, TrainingError, option, refused
from sphereify.model_images import set_preparation, with_classes
from sphereify.training.checkpoint import checkpoints, read_last_checkpoint, step_of, write_checkpoint
from sphereify.training.checks import check_arguments, check_run, check_same_run, check_trainable, is_trained
from sphereify.training.distributed import Processes, join
from sphereify.training.evaluation import score
from sphereify.training.freezing import frozen
from sphereify.training.interruption import StopRequest, stop_requests
from sphereify.training.loader import make_loader, on_device, test_batches
from sphereify.training.meter import energies, learned_k, learned_radii
from sphereify.training.objective import without_logits
from sphereify.training.randomness import deterministic_algorithms, random_state, seed_all, set_random_state
from sphereify.training.recipe import with_recipe
from sphereify.training.record import RunRecord
from sphereify.training.results import Epoch, Result, Step
from sphereify.training.run_folder import RunFolder, save_model
from sphereify.training.settings import Settings
from sphereify.training.sharding import Shards
from sphereify.training.state import RunState
from sphereify.training.step import TrainingStep

CHECK_EVERY = 20
"""Steps between two looks at the loss on a GPU, which would otherwise wait for each."""


def finetune(
    model: nn.Module,
    data: Data,
    settings: Settings | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    teacher: nn.Module | None = None,
    on_start: Callable[[], None] = lambda: None,
    on_step: Callable[[Step], None] = lambda step: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> Result:
    """Train `model` in place on `data`; it ends in eval mode on the device that it was trained on.

    Args:
        model: returns logits of shape (B, classes), an `AngularOutput`, or an output that has either as `logits`, for
            images (B, C, H, W).
        data: from `sphereify.datasets.load_data`, or a `Data` around data sets of your own.
        settings: how to train; default: `Settings()`. What they leave open is chosen by what the model keeps: small
            steps after a calibration and for the artifact of a run, see `with_recipe`. A run that is continued goes on
            as it began.
        output: folder of the run, see `RunFolder`: the models after the last and after the best epoch, checkpoints,
            metrics, curves and a summary. None: nothing is written.
        resume: continue from the last checkpoint in `output`, bit by bit as if the run had never stopped.
        teacher: a model whose scores are followed as well, usually the original network; see `open_teacher`.
        on_start: called once when everything has been checked, before anything is written; not if resumed.
        on_step: called after optimizer steps: after each one on a CPU, after every twentieth on a GPU.
        on_epoch: called after each epoch.

    In processes that torchrun started, each trains on its share of every batch, and the first writes. With
    `settings.fsdp` the model stays in shards after the run, and what it has learned is in `output`.

    Raises:
        DataError: the model has another number of classes than the data, or does not take its images.
        TrainingError: the loss is not finite; the last good checkpoint stays.
        Interrupted: SIGINT or SIGTERM came. The step was finished, and with `output` a checkpoint written.
        UsageError: settings that do not go together, or other ones than those of the run that is continued.
        ArtifactError: nothing to continue from, or a file that cannot be written.
        UnsupportedModelError: a folded model.

    Nothing of the model has been moved or changed when a request is refused.
    """
    check_trainable(model)
    check_arguments(model, data, settings)
    settings = settings or Settings()
    folder = None if output is None else RunFolder(output)
    with (
        join(settings.chosen_device) as processes,
        deterministic_algorithms(settings.deterministic),
        stop_requests() as request,
    ):
        path, saved = _last_checkpoint(folder) if resume else (None, None)
        settings = _settled(settings, model, saved)
        check_run(model, data, settings, processes, teacher)
        if folder is not None and path is not None and saved is not None:
            check_same_run(folder, path, saved, model, data, settings, processes)
        if saved is None and processes.writes:
            on_start()
            if folder is not None:
                folder.check_free()
        with frozen(model, settings.freeze) as frozen_layers, without_logits(model, settings.terms):
            run = TrainingRun(model, data, settings, processes, folder, teacher, frozen_layers)
            run.begin(saved)
            while run.state.epoch < settings.epochs:
                run.train_epoch(request, on_step)
                run.finish_epoch()
                if processes.writes:
                    on_epoch(run.state.history[-1])
            return run.close()


def _last_checkpoint(folder: RunFolder | None) -> tuple[Path, dict[str, Any]]:
    """The file and the content of the last checkpoint of the run to continue."""
    if folder is None:
        raise refused("resume", f"needs {option('output')}, the folder of the run to continue")
    return read_last_checkpoint(folder.checkpoints)


def _settled(settings: Settings, model: nn.Module, saved: dict[str, Any] | None) -> Settings:
    """The settings with what they leave open: as in the run that is continued, or by the recipe for the model."""
    if saved is not None:
        before = Settings.from_json(saved["settings"])
        names = [name for name in ("opt", "lr", "weight_decay") if getattr(settings, name) is None]
        settings = replace(settings, **{name: getattr(before, name) for name in names})
    return with_recipe(settings, trained=is_trained(model))


class TrainingRun:
    """A run: its state, and what works on it, in the order of time.

    Args:
        folder: where it writes; None: nowhere.
        frozen_layers: the layers that do not train, with their parameters frozen.

    Everything has been checked before (`check_run`): the model is moved, and with FSDP spread, here.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: Settings,
        processes: Processes,
        folder: RunFolder | None,
        teacher: nn.Module | None,
        frozen_layers: list[nn.Module],
    ):
        self.model, self.data, self.settings, self.processes, self.folder = model, data, settings, processes, folder
        self.device = processes.device
        preparation = data.preparation or PREPARATION.of(model)
        set_preparation(model, with_classes(preparation, data.classes))
        seed_all(settings.seed)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        layout: Any = {"memory_format": torch.channels_last} if settings.channels_last else {}
        model.to(torch.device("cpu") if settings.fsdp else self.device, **layout)  # shards move by themselves
        self.shards = Shards(model, processes) if settings.fsdp else None
        self.state = RunState(model, data, settings, processes, self.shards)
        self.training_step = TrainingStep(self.state, teacher, frozen_layers)
        self.train_loader = make_loader(data.train, self.state.batches, settings, self.device)
        self.test_loader = make_loader(data.test, test_batches(data, settings, processes), settings, self.device)
        self.record: RunRecord | None = None
        self.saved_at = time.monotonic()

    def begin(self, saved: dict[str, Any] | None) -> None:
        """Take back the state of a checkpoint, if it is given, and open the record; a new run writes a checkpoint at
        once, so that there is something to go on from whenever it is killed."""
        if saved is not None:
            self.state.restore(saved)
        if self.folder is None:
            return
        if self.processes.writes:
            self.record = RunRecord(self.folder, self.settings)
            if self.state.history:  # the run may have stopped between a checkpoint and its metrics
                self.record.write_epochs(self.state.history)
        if saved is None:
            self._save_checkpoint()

    # ------------------------------------------------------------------------------------------------------ an epoch

    def train_epoch(self, request: StopRequest, on_step: Callable[[Step], None]) -> None:
        """Train for the rest of the present epoch."""
        state, every = self.state, self.settings.accumulate
        state.batches.epoch = state.epoch
        randoms = random_state()
        loader = iter(self.train_loader)
        set_random_state(randoms)  # starting workers may draw from it
        self.training_step.prepare_epoch()
        state.meter.start()
        placed = None
        for number, batch in enumerate(loader, start=state.batches.start + 1):
            first = (number - 1) // every * every  # of the batches that make a step
            together = min(every, len(state.batches) - first)
            is_last = number == first + together
            state.meter.skipped += batch[1]
            placed = on_device(batch, self.device, self.settings.channels_last)
            if placed is None and self.processes.world > 1:
                raise DataError(
                    f"no image of a process's share of a batch could be read; repair them, or take a larger "
                    f"{option('batch_size')}"
                )
            if placed is not None:
                self.training_step.add_batch(*placed, share=1 / together, is_last=is_last)
            if is_last:
                self.training_step.update()
                state.batches.start = number
                self._between_steps(placed, request, on_step)
        self._check_loss(placed)
        state.meter.stop()
        if not state.meter.count:
            raise DataError(f"{self.data.name}: not one training image could be read")

    def _between_steps(
        self, placed: tuple[Tensor, Tensor] | None, request: StopRequest, on_step: Callable[[Step], None]
    ) -> None:
        """Check the loss, report, write a checkpoint and stop, each when it is time."""
        stopped = self.processes.largest(request.signal)  # in whichever process it came
        due = time.monotonic() - self.saved_at > 60 * self.settings.checkpoint_minutes
        if stopped or self.device.type == "cpu" or self.state.step % CHECK_EVERY == 0:
            self._check_loss(placed)
            if self.processes.writes:
                on_step(self._progress())
        if self.folder is not None and (stopped > 0 or self.processes.any(due)):
            self._save_checkpoint()
        if stopped:
            raise Interrupted(self._how_to_go_on(signal.Signals(stopped).name), stopped)

    def _progress(self) -> Step:
        state = self.state
        steps = state.steps_per_epoch * self.settings.epochs
        rate = state.meter.rate(self.processes.world)
        return Step(state.step, steps, state.epoch + 1, state.meter.last, state.lr, rate)

    def _how_to_go_on(self, name: str) -> str:
        done, world = f"stopped by {name} after step {self.state.step}", self.processes.world
        if self.folder is None:
            return done
        if not self.folder.options.is_file():  # not a run of the command line's
            return f"{done}; resume=True, or the same comparison again, continues it from {self.folder}"
        command = "sphereify" if world == 1 else f"torchrun --nproc-per-node {world} -m sphereify"
        return f"{done}. Continue with: {command} finetune --resume {shlex.quote(str(self.folder))}"

    # ------------------------------------------------------------------------------------------------- after an epoch

    def finish_epoch(self) -> None:
        """Test the model, note the measurements, and write models, a checkpoint and metrics."""
        state = self.state
        self._check_weights()
        self.processes.share_buffers(state.tested)
        evaluation = score(state.tested, self.test_loader, self.processes, self.settings, self.data)
        if evaluation.unanswered and self.processes.writes:
            warnings.warn(SphereifyWarning(f"after epoch {state.epoch + 1}: {evaluation.not_finite()}"), stacklevel=2)
        loss, rate, skipped = state.meter.means(self.processes)
        state.history.append(
            Epoch(
                number=state.epoch + 1,
                loss=loss,
                accuracy=evaluation.top1,
                lr=state.lr,
                images_per_second=rate,
                skipped=skipped + evaluation.skipped,
                step=state.step,
                k=learned_k(state.tested),
                radius=learned_radii(state.tested),
                energy=energies(state.tested),
                morph=state.morph.share,
            )
        )
        state.start_next_epoch()
        if self.folder is not None:
            whole = state.tested if self.shards is None else self.shards.whole()
            # A model on its way from the original is no artifact yet.
            if whole is not None and self.processes.writes and state.history[-1].morph == 1:
                self._save_models(whole, self.folder)
            self._save_checkpoint()
        if self.record is not None:
            self.record.write_epochs(state.history)

    def _save_models(self, model: nn.Module, folder: RunFolder) -> None:
        now = self.state.history[-1]
        training = {
            "data": self.data.name,
            "classes": self.data.classes,
            "accuracy": now.accuracy,
            "image_size": self.data.image_size,
            "epochs": now.number,
            **({"held_out_classes": list(self.data.held_out)} if self.data.held_out else {}),
        }
        save_model(model, folder.last, training)
        if now.number == Result(self.state.history, None).best.number:
            save_model(model, folder.best, training)

    def _save_checkpoint(self) -> None:
        """Write a checkpoint of the present step; all processes must call it."""
        self.saved_at = time.monotonic()
        self._check_loss(None)
        self._check_weights()
        saved = self.state.capture()
        if self.folder is not None and self.processes.writes:
            write_checkpoint(self.folder.checkpoints, self.state.step, saved)

    def _check_loss(self, placed: tuple[Tensor, Tensor] | None) -> None:
        """Stop at a loss that is not finite."""
        if (step := self.state.meter.first_bad_step()) is not None:
            layer = first_bad_layer(self.model, None if placed is None else placed[0])
            raise TrainingError(
                f"the loss is {self.state.meter.last:g} at step {step}; the first layer with a value that is not "
                f"finite is {layer}.{self._remedy()}"
            )

    def _check_weights(self) -> None:
        """Stop at a weight that is not finite."""
        if (name := first_bad_weight(self.model)) is not None:
            raise TrainingError(f"{name}: a value is not finite after step {self.state.step}.{self._remedy()}")

    def _remedy(self) -> str:
        files = checkpoints(self.folder.checkpoints) if self.folder is not None else []
        stays = f" The checkpoint of step {step_of(files[-1])} is kept." if files else ""
        return f"{stays} Try a smaller {option('lr')}, or {option('clip_grad', 1)}."

    def close(self) -> Result:
        """Put what was learned into the model (the average, if there is one) and write the summary."""
        if self.state.ema is not None:
            self.model.load_state_dict(self.state.ema.module.state_dict())
        self.model.eval()
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        result = Result(self.state.history, memory)
        if self.record is not None:
            self.record.close(result, self.data.name)
        self.processes.wait()
        return result
