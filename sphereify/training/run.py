"""The training loop: timm's optimizers, schedules and averages around an angular loss, continued where it stopped."""

import dataclasses
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereify.datasets import Data
from sphereify.deployment.folding import is_folded
from sphereify.errors import (
    ArtifactError,
    DataError,
    Interrupted,
    TrainingError,
    UnsupportedModelError,
    UsageError,
    first_line,
)
from sphereify.nn import AngularHead, HypersphericalEnergy
from sphereify.nn.functional_calls import AngularCall
from sphereify.nn.layers import AngularLayer
from sphereify.nn.precision import gathered
from sphereify.training.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from sphereify.training.distributed import Processes, join
from sphereify.training.evaluation import score
from sphereify.training.loader import Batches, make_loader, on_device
from sphereify.training.objective import Objective, logits_of
from sphereify.training.optim import param_groups
from sphereify.training.run_folder import Record, save_model
from sphereify.training.settings import Settings, differences, frozen_layers
from sphereify.training.sharding import Shards

READ_EVERY = 20
"""Steps between two looks at the loss on a GPU, which would otherwise wait for each."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave: one pass over the data, or `Settings.epoch_batches`."""

    number: int
    loss: float
    """Mean training loss."""
    accuracy: float
    """On the held-out part, in [0, 1]; of the moving average, if there is one."""
    lr: float = 0.0
    """At its last step, of the first group of parameters."""
    images_per_second: float = 0.0
    """In training, of all processes together."""
    skipped: int = 0
    """Images that could not be read."""
    step: int = 0
    """Optimizer steps until its end."""
    k: dict[str, float] = field(default_factory=dict)
    """Mean learned k of each layer that has one."""
    energy: dict[str, float] = field(default_factory=dict)
    """Hyperspherical energy of each layer."""


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    epochs: list[Epoch]
    peak_memory: int | None
    """Bytes on the GPU; None on a CPU."""

    @property
    def best(self) -> Epoch:
        """The first epoch of the highest accuracy."""
        return max(self.epochs, key=lambda epoch: (epoch.accuracy, -epoch.number))

    @property
    def accuracy(self) -> float:
        """After the last epoch."""
        return self.epochs[-1].accuracy


@dataclass(frozen=True)
class Step:
    """Where a run is."""

    number: int
    """Optimizer steps so far."""
    steps: int
    """Of the whole run."""
    epoch: int
    loss: float
    lr: float
    images_per_second: float


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
        model: returns logits of shape (B, classes), or an `AngularOutput`, for images (B, C, H, W).
        data: from `sphereify.datasets.load_data`, or a `Data` around data sets of your own.
        settings: default: `Settings()`.
        output: folder for `last` and `best` (artifacts; for a model that was not converted, `last.safetensors` and
            `best.safetensors`), checkpoints, metrics, curves and a summary. None: nothing is written.
        resume: continue from the last checkpoint in `output`, bit by bit as if the run had never stopped.
        teacher: a model whose scores are followed as well; usually the original network.
        on_start: called once when everything has been checked, before anything is written; not if resumed.
        on_step: called after optimizer steps; after each one on a CPU.
        on_epoch: called after each epoch.

    In processes that torchrun started, each trains on its share of every batch, and the first writes. With
    `settings.fsdp` the model stays in shards after the run, and what it has learned is in `output`.

    Raises:
        DataError: the model has another number of classes than the data.
        TrainingError: the loss is not finite; the last good checkpoint stays.
        Interrupted: SIGINT or SIGTERM came. The step was finished, and with `output` a checkpoint written.
        UsageError: settings that do not go together, or other ones than those of the run that is continued.
        ArtifactError: nothing to continue from, or a file that cannot be written.
        UnsupportedModelError: a folded model.
    """
    if is_folded(model):
        raise UnsupportedModelError(
            f"finetune: this {type(model).__name__} is folded for inference; train the model that it was folded from"
        )
    settings = settings or Settings()
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        return _finetune(model, data, settings, output, resume, teacher, on_start, on_step, on_epoch)
    finally:  # a frozen layer is frozen for this run only
        for parameter, was in trained:
            parameter.requires_grad_(was)


def _finetune(model: nn.Module, data: Data, settings: Settings, output: str | Path | None, resume: bool,
              teacher: nn.Module | None, on_start: Callable[[], None], on_step: Callable[[Step], None],
              on_epoch: Callable[[Epoch], None]) -> Result:  # fmt: skip
    with join(settings.chosen_device) as processes, _deterministic(settings), _signals() as stop:
        run = _Run(model, data, settings, processes, None if output is None else Path(output), teacher)
        if resume:
            run.restore()
        elif processes.writes:
            on_start()
            run.check_output()
        run.open_record()
        if not resume and output is not None:
            run.save()  # whenever it is killed, there is something to go on from
        while run.epoch < settings.epochs:
            run.train(stop, on_step)
            run.finish_epoch()
            if processes.writes:
                on_epoch(run.history[-1])
        return run.close()


class _Run:
    """A training run: the state that a checkpoint holds, and what works on it, in the order of time."""

    def __init__(self, model: nn.Module, data: Data, settings: Settings, processes: Processes, output: Path | None,
                 teacher: nn.Module | None):  # fmt: skip
        from timm.data import Mixup
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        self.model, self.data, self.settings, self.processes, self.output = model, data, settings, processes, output
        self.device = processes.device
        _seed_all(settings.seed)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        layout: Any = {"memory_format": torch.channels_last} if settings.channels_last else {}
        placed = torch.device("cpu") if settings.fsdp else self.device  # shards move by themselves
        model.to(placed, **layout)
        check_classes(model, data, placed)
        self.frozen = frozen_layers(model, settings.freeze)
        for layer in self.frozen:
            layer.requires_grad_(False)
        self.shards = Shards(model, processes) if settings.fsdp else None
        self.objective = Objective(model, settings.terms, settings.accumulate).to(self.device)
        self.teacher = None if teacher is None else teacher.to(self.device).eval()
        if self.teacher is not None:
            check_classes(self.teacher, data, self.device, "the teacher")
        self.mixup = None
        check_mixup(model, settings)
        if settings.mixup or settings.cutmix:
            self.mixup = Mixup(settings.mixup, settings.cutmix, label_smoothing=0.0, num_classes=len(data.classes))

        share = {"rank": processes.rank, "world": processes.world}
        size = settings.batch_size
        train_size, test_size = len(data.train), len(data.test)  # type: ignore[arg-type]
        self.batches = Batches(
            train_size,
            size,
            seed=settings.seed,
            epoch_batches=settings.epoch_batches,
            **share,  # type: ignore[arg-type]
        )
        self.train_loader = make_loader(data.train, self.batches, settings, self.device)
        self.test_loader = make_loader(
            data.test,
            Batches(test_size, size, seed=None, **share),
            settings,
            self.device,  # type: ignore[arg-type]
        )
        if train_size < processes.world or not test_size:
            raise DataError(f"{data.name}: {train_size} training and {test_size} test images are too few")
        if len(data.classes) < 2:
            raise DataError(f"{data.name}: has one class only, {data.classes[0]}; there is nothing to tell apart")
        if settings.batch_size < 2 and self.mixup is not None:
            raise UsageError("--mixup, --cutmix: need pairs of images; take --batch-size 2 or more")
        self.updates = math.ceil(len(self.batches) / settings.accumulate)  # an epoch

        groups = param_groups(model, settings.weight_decay, layer_decay=settings.layer_decay)
        if not groups:
            raise UsageError("--freeze: nothing is left to train")
        if settings.opt.lower() == "adahessian":
            raise UsageError("--opt: adahessian needs second derivatives, which this loop does not make")
        try:
            self.optimizer = create_optimizer_v2(groups, opt=settings.opt, lr=settings.lr, weight_decay=0.0)
        except Exception as error:  # timm asserts
            raise UsageError(
                f"--opt: got {settings.opt!r}, expected an optimizer of timm's ({first_line(error)})"
            ) from None
        warmup: Any = settings.epochs / 10 if settings.warmup_epochs is None else settings.warmup_epochs
        falls: dict[str, Any] = {"decay_rate": settings.decay_rate, "decay_milestones": settings.milestones}
        if settings.decay_epochs is not None:
            falls["decay_epochs"] = settings.decay_epochs
        try:
            self.scheduler, _ = create_scheduler_v2(
                self.optimizer, settings.sched, num_epochs=settings.epochs, warmup_epochs=warmup, warmup_lr=0.0,
                warmup_prefix=False, min_lr=settings.min_lr, step_on_epochs=False, updates_per_epoch=self.updates,
                **falls,
            )  # fmt: skip
        except Exception as error:
            raise UsageError(
                f"--sched: {settings.sched!r} with these epochs does not work ({first_line(error)})"
            ) from None
        if self.scheduler is None:
            raise UsageError(f"--sched: got {settings.sched!r}, expected a schedule of timm's, such as cosine or step")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "fp16")
        self.ema = ModelEmaV3(model, decay=settings.ema, use_warmup=True) if settings.ema else None
        self.trained = {id(p) for p in model.parameters() if p.requires_grad}
        self.only_new = False
        self.forward = self._wrapped()

        self.epoch = 0
        self.step = 0
        self.history: list[Epoch] = []
        self.meter = _Meter(self.device)
        self.record: Record | None = None
        self.saved = time.monotonic()

    def check_output(self) -> None:
        """A folder has room for one run."""
        if self.output is not None and checkpoints(self.output / "checkpoints"):
            raise UsageError(
                f"{self.output}: holds a run already; resume it, remove its checkpoints/, or name another folder"
            )

    def open_record(self) -> None:
        """From here on metrics are written."""
        if self.output is None or not self.processes.writes:
            return
        self.record = Record(self.output, self.settings.to_json())
        if self.history:  # the run may have stopped between a checkpoint and its metrics
            self.record.epochs([dataclasses.asdict(epoch) for epoch in self.history])

    # ------------------------------------------------------------------------------------------------------ an epoch

    def train(self, stop: "_Stop", on_step: Callable[[Step], None]) -> None:
        """The rest of the present epoch."""
        self._set_phase()
        self.batches.epoch = self.epoch
        states = _random_state()
        loader = iter(self.train_loader)
        _set_random_state(states)  # starting workers may draw from it
        self._train_mode()
        self.meter.start()
        placed = None
        every, batches = self.settings.accumulate, len(self.batches)
        for number, batch in enumerate(loader, start=self.batches.start + 1):
            first = (number - 1) // every * every  # of the batches that make a step
            together = min(every, batches - first)
            self.meter.skipped += batch[1]
            placed = on_device(batch, self.device, self.settings.channels_last)
            if placed is None and self.processes.world > 1:
                raise DataError("no image of a process's share of a batch could be read; repair them, or take a larger "
                                "--batch-size")  # fmt: skip
            if placed is not None:
                with self._quiet_unless(number == first + together):
                    self._backward(*placed, share=1 / together)
            if number == first + together:
                self._update()
                self.batches.start = number
                self._between_steps(placed, stop, on_step)
        self._look(placed)
        self.meter.stop()
        if not self.meter.count:
            raise DataError(f"{self.data.name}: not one training image could be read")

    def _between_steps(self, placed: Any, stop: "_Stop", on_step: Callable[[Step], None]) -> None:
        """Tell, save, stop, as it is time."""
        stopped = self.processes.largest(stop.signal)  # in whichever process it came
        due = time.monotonic() - self.saved > 60 * self.settings.checkpoint_minutes
        if stopped or self.device.type == "cpu" or self.step % READ_EVERY == 0:
            self._look(placed)
            if self.processes.writes:
                on_step(self._progress())
        if self.output is not None and (stopped > 0 or self.processes.any(due)):
            self.save()
        if stopped:
            raise Interrupted(self._how_to_go_on(signal.Signals(stopped).name), stopped)

    def _backward(self, images: Tensor, targets: Tensor, share: float) -> None:
        count = len(targets)
        if self.mixup is not None:
            even = count - count % 2
            images, targets = self.mixup(images[:even], targets[:even])
        with self._autocast():
            try:
                output = self.forward(images)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise TrainingError(
                    "a normalization over the batch cannot train on a single image: take --batch-size 2 or more, or "
                    "convert with --norm replace"
                ) from error
            loss = self.objective(output, targets)
            if self.teacher is not None:
                loss = self._with_teacher(loss, logits_of(output), images)
        self.scaler.scale(loss * share).backward()
        self.meter.add(loss.detach(), count, self.step + 1)

    def _with_teacher(self, loss: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """Hinton's distillation: the teacher's scores at a temperature, beside the labels."""
        heat, share = self.settings.teacher_temperature, self.settings.teacher_weight
        with torch.no_grad():
            wanted = logits_of(self.teacher(images))  # type: ignore[misc]
        followed = F.kl_div(
            F.log_softmax(logits.float() / heat, 1),
            F.log_softmax(wanted / heat, 1),
            log_target=True,
            reduction="batchmean",
        )
        return (1 - share) * loss + share * heat**2 * followed

    def _update(self) -> None:
        # The rate of a step is that of its middle, so that neither the first nor the last step of a run has none.
        self.scheduler.step_update(self.step + 0.5)  # type: ignore[arg-type]
        if self.settings.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, self.step)

    def finish_epoch(self) -> None:
        """Test, note, save."""
        tested = self.model if self.ema is None else self.ema.module
        self.processes.agree(tested)
        found = score(tested, self.test_loader, self.processes, self.settings, self.data)
        accuracy = found.top1
        loss, rate, skipped = self.meter.means(self.processes)
        skipped += found.skipped
        lr = self.optimizer.param_groups[0]["lr"]
        self.history.append(
            Epoch(self.epoch + 1, loss, accuracy, lr, rate, skipped, self.step, _learned_k(tested), _energies(tested))
        )
        self.epoch += 1
        self.batches.start = 0
        self.meter = _Meter(self.device)
        if self.output is not None:
            whole = tested if self.shards is None else self.shards.whole()
            self._check_weights()
            if self.processes.writes:
                self._save_models(whole)  # type: ignore[arg-type]
            self.save()
        if self.record is not None:
            self.record.epochs([dataclasses.asdict(epoch) for epoch in self.history])

    def close(self) -> Result:
        """What was learned is in the model: the average, if there is one."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        self.model.eval()
        memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        result = Result(self.history, memory)
        if self.record is not None:
            self.record.close(result.best.number, self.data.name, memory)
        self.processes.wait()
        return result

    # ------------------------------------------------------------------------------------------------- what is in use

    def _wrapped(self) -> nn.Module:
        """The model as it is called: over several processes, compiled."""
        forward: Any = self.model
        if self.processes.world > 1 and self.shards is None:
            forward = nn.parallel.DistributedDataParallel(
                forward, device_ids=[self.device] if self.device.type == "cuda" else None
            )
        return torch.compile(forward) if self.settings.compile else forward  # type: ignore[return-value]

    def _set_phase(self) -> None:
        """At first only new parameters train, if so wished."""
        first = self.epoch < self.settings.warmup_head_epochs
        if first == self.only_new:
            return
        new = _new_parameters(self.model) & self.trained or self.trained  # all, if nothing is new
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in self.trained and (not first or id(parameter) in new))
        self.only_new = first
        self.forward = self._wrapped()

    def _train_mode(self) -> None:
        self.model.train()
        for layer in self.frozen:
            layer.eval()  # statistics of a frozen normalization stay, too

    def _autocast(self) -> Any:
        kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
        wanted = self.settings.amp in kinds
        return torch.autocast(self.device.type, kinds[self.settings.amp]) if wanted else nullcontext()

    def _quiet_unless(self, talks: bool) -> Any:
        """Gradients are summed over the processes with the last batch of a step only."""
        waits = not talks and isinstance(self.forward, nn.parallel.DistributedDataParallel)
        return self.forward.no_sync() if waits else nullcontext()  # type: ignore[operator]

    def _look(self, placed: tuple[Tensor, Tensor] | None) -> None:
        """Stop at a loss that is no number."""
        if (step := self.meter.first_bad()) is not None:
            where = _first_bad_layer(self.model, placed[0] if placed is not None else None)
            raise TrainingError(
                f"the loss is {self.meter.last:g} at step {step}; the first layer with a value that is not finite is "
                f"{where}.{self._stays()} Try a smaller --lr, or --clip-grad 1."
            )

    def _stays(self) -> str:
        kept = checkpoints(self.output / "checkpoints")[-1:] if self.output is not None else []
        return f" The checkpoint of step {int(kept[0].stem)} is kept." if kept else ""

    def _progress(self) -> Step:
        lr = self.optimizer.param_groups[0]["lr"]
        steps = self.updates * self.settings.epochs
        return Step(self.step, steps, self.epoch + 1, self.meter.last, lr, self.meter.rate(self.processes.world))

    def _how_to_go_on(self, name: str) -> str:
        done, world = f"stopped by {name} after step {self.step}", self.processes.world
        if self.output is None:
            return done
        if not (self.output / "run.json").is_file():  # not a run of the command line's
            return f"{done}; resume=True, or the same comparison again, continues it from {self.output}"
        command = "sphereify" if world == 1 else f"torchrun --nproc-per-node {world} -m sphereify"
        return f"{done}. Continue with: {command} finetune --resume {self.output}"

    # ------------------------------------------------------------------------------------------------ what is written

    def save(self) -> None:
        """A checkpoint of the present step."""
        self.saved = time.monotonic()
        states = self.processes.gather(_random_state())
        meters = self.processes.gather(self.meter.state())
        self._look(None)
        if self.output is None:
            return
        self._check_weights()
        optimizer: dict[str, Any] | None
        if self.shards is None:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        else:
            # Asking an optimizer of shards that has not made a step for its state makes one.
            optimizer = self.shards.optimizer_state(self.optimizer) if self.step else None
            model = self.shards.state()
        if not self.processes.writes:
            return
        write_checkpoint(self.output / "checkpoints", self.step, {
            "settings": self.settings.to_json(), "data": self.data.name, "world": self.processes.world,
            "model": model, "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": optimizer, "scheduler": _plain(self.scheduler.state_dict()),
            "scaler": self.scaler.state_dict(), "objective": self.objective.state_dict(), "random": states,
            "epoch": self.epoch, "batch": self.batches.start, "step": self.step, "meter": meters,
            "history": [dataclasses.asdict(epoch) for epoch in self.history],
        })  # fmt: skip

    def _check_weights(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not getattr(parameter, "_local_tensor", parameter).isfinite().all():
                raise TrainingError(
                    f"{name}: a value is not finite after step {self.step}.{self._stays()} Try a smaller --lr, or "
                    f"--clip-grad 1."
                )

    def restore(self) -> None:
        """Go back to the last checkpoint."""
        if self.output is None:
            raise UsageError("resume: needs output, the folder of the run to continue")
        found = checkpoints(self.output / "checkpoints")
        if not found:
            raise ArtifactError(f"{self.output}: there is no checkpoint to continue from")
        try:
            state = read_checkpoint(found[-1])
        except ArtifactError as error:
            older = f". Remove it to go on from step {int(found[-2].stem)}" if len(found) > 1 else ""
            raise ArtifactError(f"{error}{older}") from error
        changed = differences(Settings.from_json(state["settings"]), self.settings)
        if state["data"] != self.data.name:
            changed.append(f"--data: {state['data']} before, {self.data.name} now")
        if state["world"] != self.processes.world:
            changed.append(f"processes: {state['world']} before, {self.processes.world} now")
        if changed:
            raise UsageError(f"{self.output}: cannot be continued otherwise than it began: {'; '.join(changed)}")
        _check_same_model(self.model, state["model"], found[-1])
        if self.shards is None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.shards.restore(self.optimizer, state["model"], state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self.objective.load_state_dict(state["objective"])
        self.epoch, self.step, self.batches.start = state["epoch"], state["step"], state["batch"]
        self.meter.restore(state["meter"][self.processes.rank])
        self.history = [Epoch(**row) for row in state["history"]]
        _set_random_state(state["random"][self.processes.rank])

    def _save_models(self, tested: nn.Module) -> None:
        assert self.output is not None
        now = self.history[-1]
        about = {"data": self.data.name, "classes": self.data.classes, "accuracy": now.accuracy,
                 "image_size": self.data.image_size, "epochs": now.number}  # fmt: skip
        save_model(tested, self.output / "last", about)
        if now.number == Result(self.history, None).best.number:
            save_model(tested, self.output / "best", about)


class _Meter:
    """Sums of an epoch, kept on the device until somebody looks."""

    def __init__(self, device: torch.device):
        # Losses are summed in double precision where the device has it.
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.total = torch.zeros((), dtype=kind, device=device)
        self.newest = torch.zeros((), device=device)
        self.bad = torch.zeros((), dtype=torch.int64, device=device)
        self.count = self.skipped = self.timed = 0
        self.began = time.monotonic()
        self.ended: float | None = None

    def start(self) -> None:
        self.began, self.ended = time.monotonic(), None

    def stop(self) -> None:
        self.ended = time.monotonic()

    def add(self, loss: Tensor, count: int, step: int) -> None:
        self.total += loss * count
        self.newest = loss
        self.bad = torch.where((self.bad == 0) & ~loss.isfinite(), step, self.bad)
        self.count += count
        self.timed += count

    @property
    def last(self) -> float:
        return float(self.newest)

    def first_bad(self) -> int | None:
        """The first step with a loss that is not finite."""
        return int(self.bad) or None

    def rate(self, world: int) -> float:
        """Images a second, of all processes."""
        return self.timed * world / max((self.ended or time.monotonic()) - self.began, 1e-9)

    def means(self, processes: Processes) -> tuple[float, float, int]:
        """Loss, images a second and images left out, over all processes."""
        rate = self.rate(processes.world)
        sums = torch.stack([self.total, self.total.new_tensor(self.count), self.total.new_tensor(self.skipped)])
        total, count, skipped = processes.sum(sums).tolist()
        return total / max(count, 1), rate, int(skipped)

    def state(self) -> dict[str, Any]:
        return {"total": self.total.cpu(), "count": self.count, "skipped": self.skipped}

    def restore(self, state: dict[str, Any]) -> None:
        self.total += state["total"].to(self.total.device)
        self.count, self.skipped = state["count"], state["skipped"]


# ------------------------------------------------------------------------------------------------------------- checks


def check_classes(model: nn.Module, data: Data, device: torch.device, who: str = "the model") -> None:
    """One image through the model, before any time is spent.

    Raises:
        DataError: the model does not take these images, or returns other scores than one a class.
    """
    try:
        with torch.no_grad():
            logits = logits_of(model.eval()(torch.zeros(1, *data.image_size, device=device)))
    except DataError:
        raise
    except Exception as error:  # a model may refuse a size in its own way
        raise DataError(
            f"{who} does not take images of {' × '.join(map(str, data.image_size))} (channels, height, width): "
            f"{first_line(error)}. Try another --img-size."
        ) from error
    if logits.dim() != 2:
        shape = tuple(logits.shape)
        raise DataError(f"{who} returns Tensor of shape {shape}, expected logits of shape (batch, classes)")
    if logits.shape[1] != len(data.classes):
        raise DataError(
            f"{who} has {logits.shape[1]} classes, {data.name} has {len(data.classes)}: convert it again with "
            f"--num-classes {len(data.classes)} (a plain model is built with it)"
        )


def check_mixup(model: nn.Module, settings: Settings) -> None:
    """Raises UsageError where images are mixed and a margin belongs to one class."""
    head = next((m for m in model.modules() if isinstance(m, AngularHead) and m.has_margin), None)
    if head is not None and (settings.mixup or settings.cutmix):
        raise UsageError(
            f"--mixup, --cutmix: the head is {head.kind}, whose margin belongs to one class an image. Take --head "
            f"w-softmax, or leave them out."
        )


def _check_same_model(model: nn.Module, saved: dict[str, Tensor], path: Path) -> None:
    own = model.state_dict()
    odd = [name for name in sorted({*own, *saved}) if name not in own or name not in saved
           or own[name].shape != saved[name].shape]  # fmt: skip
    if odd:
        raise UsageError(f"{path}: is of another model; the two differ in {', '.join(odd[:3])}")


def _first_bad_layer(model: nn.Module, images: Tensor | None) -> str:
    """By its weights, or by what it makes of the images."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"{name.rpartition('.')[0]} (its {name.rpartition('.')[2]})"
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
            if not all(t.isfinite().all() for t in tensors) and not found:
                found.append(name or "the model itself")

        return hook

    if images is not None:
        if not images.isfinite().all():
            return "none: an image of the batch holds such a value"
        handles = [m.register_forward_hook(look(n)) for n, m in model.named_modules()]
        with torch.no_grad():
            model(images)
        for handle in handles:
            handle.remove()
    return f"{found[0]} (its output)" if found else "none: only the loss itself"


# -------------------------------------------------------------------------------------------------------- measurements


def _new_parameters(model: nn.Module) -> set[int]:
    """k, β, γ and the head."""
    new: set[int] = set()
    for module in model.modules():
        if isinstance(module, (AngularHead, AngularCall)):
            new |= {id(p) for p in module.parameters()}
        elif isinstance(module, AngularLayer):
            new |= {id(p) for n, p in module.named_parameters() if n not in ("weight", "bias")}
    return new


def _learned_k(model: nn.Module) -> dict[str, float]:
    return {
        name: float(gathered(module.operator.k.detach()).mean())
        for name, module in model.named_modules()
        if isinstance(getattr(getattr(module, "operator", None), "k", None), Tensor)
    }


def _energies(model: nn.Module) -> dict[str, float]:
    try:
        return {row.layer: row.energy for row in HypersphericalEnergy().report(model).layers}
    except UsageError:  # no layer has two filters
        return {}


# -------------------------------------------------------------------------------------------------- randomness, signals


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
    return {
        "python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest], "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }  # fmt: skip


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def _deterministic(settings: Settings) -> Iterator[None]:
    if not settings.deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


class _Stop:
    """Whether a signal has asked to stop."""

    wanted = False
    signal = 0

    def ask(self, number: int, frame: Any) -> None:
        if self.wanted:  # a second time: at once
            raise KeyboardInterrupt
        self.wanted, self.signal = True, number


@contextmanager
def _signals() -> Iterator[_Stop]:
    """SIGINT and SIGTERM let the step end; only the main thread may ask for them."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.signal:  # it came after the last step: the run is done, but whoever called it is to stop
        signal.raise_signal(stop.signal)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without what JSON cannot hold."""
    return {key: value for key, value in state.items() if isinstance(value, (bool, int, float, str, list, type(None)))}
