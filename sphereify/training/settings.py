"""Options of training, each with its unit, range and usual values. Imports torch only when a device is chosen."""

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sphereify.devices import find_device
from sphereify.errors import invalid, option, refused
from sphereify.options import check_options, from_json, option_field, to_json
from sphereify.patterns import PatternList
from sphereify.training.terms import Terms

if TYPE_CHECKING:
    import torch

AMP = ("none", "bf16", "fp16")
TRAINING = "Training"


@dataclass(frozen=True)
class Settings:
    """Settings of a training run.

    Raises:
        UsageError: a value that is not valid, two that do not go together, or a device that torch does not have.
    """

    epochs: int = option_field(10, "Number of epochs: passes over the training images.", panel=TRAINING, at_least=1)
    epoch_batches: int | None = option_field(
        None,
        "Length of an epoch in batches, after which the model is tested; default: all images once.",
        panel=TRAINING,
        at_least=1,
    )
    batch_size: int = option_field(64, "Images per batch on each device.", panel=TRAINING, at_least=1)
    lr: float | None = option_field(
        None,
        "Peak learning rate; default: 1e-3, and less for a network that is trained already, see docs/finetuning.md.",
        panel=TRAINING,
        above=0,
        usual="1e-4 to 1e-3 with adamw",
    )
    opt: str | None = option_field(
        None,
        "Optimizer of timm: adamw, sgd, lamb, …; default: adamw, and sgd for a network that is trained already.",
        panel=TRAINING,
    )
    sched: str = option_field(
        "cosine",
        "Schedule of timm for the learning rate, updated after each step: cosine, step, multistep, poly, wsd, …",
        panel=TRAINING,
    )
    warmup_epochs: float | None = option_field(
        None,
        "Epochs in which the learning rate rises from 0; default: a tenth of all.",
        panel=TRAINING,
        at_least=0,
    )
    min_lr: float = option_field(0.0, "Learning rate at the end of the schedule.", panel=TRAINING, at_least=0)
    decay_epochs: float | None = option_field(
        None,
        "Epochs between two decays of step (default: 90), or length of the decay of wsd (default: a fifth of all).",
        panel=TRAINING,
        above=0,
    )
    milestones: tuple[int, ...] = option_field(
        (), "Epoch after which multistep lowers the learning rate; repeatable.", panel=TRAINING
    )
    decay_rate: float = option_field(
        0.1, "Factor of each decay of step and multistep, in (0, 1].", panel=TRAINING, above=0, at_most=1
    )
    weight_decay: float | None = option_field(
        None,
        "Weight decay of weights whose length counts: plain ones, and filters of a weighted magnitude. Default: 0.05, "
        "and 5e-4 with sgd for a network that is trained already.",
        panel=TRAINING,
        at_least=0,
    )
    layer_decay: float | None = option_field(
        None,
        "Factor of the learning rate from each layer to the one before it, in (0, 1].",
        panel=TRAINING,
        above=0,
        at_most=1,
        usual="0.65 to 0.9",
    )
    accumulate: int = option_field(
        1, "Number of batches whose gradients are summed for one step.", panel=TRAINING, at_least=1
    )
    clip_grad: float | None = option_field(
        None, "Largest norm of all gradients together.", panel=TRAINING, above=0, usual="1"
    )
    ema: float | None = option_field(
        None,
        "Decay of a moving average of the weights, in (0, 1], which is then what is tested and saved.",
        panel=TRAINING,
        above=0,
        at_most=1,
        usual="0.9998",
    )
    mixup: float = option_field(0.0, "α of mixup.", panel=TRAINING, at_least=0, usual="0.2 to 0.8")
    cutmix: float = option_field(0.0, "α of cutmix.", panel=TRAINING, at_least=0, usual="1")
    amp: str = option_field("none", f"Half precision: {', '.join(AMP)}.", panel=TRAINING, choices=AMP)
    channels_last: bool = option_field(False, "Keep images and weights in channels-last layout.", panel=TRAINING)
    compile: bool = option_field(False, "Compile the model with torch.compile.", panel=TRAINING)
    fsdp: bool = option_field(
        False,
        "Shard parameters, gradients and optimizer state over torchrun's processes (FSDP2) instead of copying them.",
        panel=TRAINING,
    )
    freeze: PatternList = option_field(
        (), "Layers that do not train: a glob over names, or re:…; repeatable.", panel=TRAINING
    )
    warmup_head_epochs: int = option_field(
        0, "Epochs at the start in which only k, ρ, β, γ and the head train.", panel=TRAINING, at_least=0
    )
    morph: float = option_field(
        0.0,
        "Share of the training over which the network moves from the original to its conversion, in [0, 1]; 0: it "
        "starts as the conversion, calibrated where it was trained. For networks that are trained.",
        panel=TRAINING,
        at_least=0,
        at_most=1,
        usual="0.6",
    )
    teacher_weight: float = option_field(
        0.5,
        "Share of the loss that follows the teacher, in [0, 1]; no effect without one.",
        panel=TRAINING,
        at_least=0,
        at_most=1,
    )
    teacher_temperature: float = option_field(
        2.0,
        "Temperature at which the teacher's scores are followed.",
        panel=TRAINING,
        above=0,
        usual="1 to 4",
    )
    seed: int = option_field(
        0, "Random seed for new weights, the order of images, their augmentation and their corruption.", panel=TRAINING
    )
    deterministic: bool = option_field(False, "Use deterministic algorithms of torch only.", panel=TRAINING)
    workers: int = option_field(0, "Number of processes that load images.", panel=TRAINING, at_least=0)
    device: str = option_field(
        "auto", "Device that computes: auto, cpu, cuda, cuda:1, …; auto: cuda where there is one.", panel=TRAINING
    )
    strict: bool = option_field(
        False, "Stop at an image that cannot be read; otherwise it is skipped and counted.", panel=TRAINING
    )
    checkpoint_minutes: float = option_field(
        10.0, "Minutes between two checkpoints within an epoch.", panel=TRAINING, at_least=0
    )
    terms: Terms = field(default_factory=Terms)

    def __post_init__(self) -> None:
        for name in ("freeze", "milestones"):
            values = getattr(self, name)
            alone = isinstance(values, (str, int))
            object.__setattr__(self, name, (values,) if alone else tuple(values or ()))
        check_options(self)
        self._check_schedule()
        self._check_morph()
        self._check_sharding()
        _ = self.chosen_device

    def _check_schedule(self) -> None:
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise invalid("warmup_epochs", self.warmup_epochs, f"at most the {self.epochs} of {option('epochs')}")
        if self.sched == "plateau":
            raise refused(
                "sched",
                "plateau cannot be continued after a stop, for timm does not save its patience; take cosine, step or "
                "wsd",
            )
        if self.sched == "multistep" and not self.milestones:
            raise refused("milestones", "none given, expected the epochs after which multistep lowers the rate")

    def _check_morph(self) -> None:
        if self.morph and self.compile:
            raise refused("morph", f"does not go with {option('compile')}, since each step has other layers")

    def _check_sharding(self) -> None:
        others = {
            option("morph"): self.morph,
            option("ema"): self.ema,
            option("amp", "fp16"): self.amp == "fp16",
            option("warmup_head_epochs"): self.warmup_head_epochs,
            option("compile"): self.compile,
        }
        used = next((name for name, value in others.items() if value), None)
        if self.fsdp and used is not None:
            raise refused("fsdp", f"does not go with {used}")

    @property
    def chosen_device(self) -> "torch.device":
        """The device that `device` names; the GPU for "auto" where there is one.

        Raises:
            UsageError: torch does not have this device.
        """
        if str(self.device).split(":")[0] == "meta":
            raise invalid("device", self.device, "a device that holds values", "Take 'cpu' or 'cuda'")
        return find_device(self.device)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values, those of the loss under "terms"."""
        return to_json(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Settings":
        """The settings that `to_json` gave.

        Raises:
            UsageError: as the class.
        """
        return from_json(cls, plain)


WITHOUT_EFFECT = ("workers", "device", "checkpoint_minutes")
"""Settings that may change when a run is continued: they do not change what is learned."""


def differences(before: Settings, now: Settings) -> list[str]:
    """The settings that change what is learned and differ, as a phrase each: "lr: 0.01 before, 0.5 now"."""

    def flat(settings: Settings) -> dict[str, Any]:
        values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
        terms = values.pop("terms")
        return {**values, **vars(terms)}

    old, new = flat(before), flat(now)
    return [
        f"{option(name)}: {old[name]} before, {new[name]} now"
        for name in old
        if name not in WITHOUT_EFFECT and old[name] != new[name]
    ]
