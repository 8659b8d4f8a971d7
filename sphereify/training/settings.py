"""How to train: every choice with its unit, its range and its usual value."""

import dataclasses
import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sphereify.errors import UsageError, choose
from sphereify.training.objective import Terms

AMP = ("none", "bf16", "fp16")


@dataclass(frozen=True)
class Settings:
    """How to train; wrong values are told with the option's name.

    Raises:
        UsageError: a value out of its range, or no CUDA device where one is asked for.
    """

    epochs: int = 10
    epoch_batches: int | None = None
    """Batches of an epoch, after which the model is tested, to count a run in iterations; None: all images once."""
    batch_size: int = 64
    """Images a step on each device."""
    lr: float = 1e-3
    """Peak learning rate."""
    opt: str = "adamw"
    """An optimizer of timm's."""
    sched: str = "cosine"
    """A schedule of timm's, updated after each step; plateau, whose state timm does not save, is refused."""
    warmup_epochs: float | None = None
    """Epochs in which the rate rises from 0; None: a tenth of all."""
    min_lr: float = 0.0
    decay_epochs: float | None = None
    """Epochs between two falls of step, or of the fall of wsd; None: timm's own, 90 and a fifth of all."""
    milestones: tuple[int, ...] = ()
    """Epochs after which multistep falls."""
    decay_rate: float = 0.1
    """Factor of a fall of step and multistep, in (0, 1]."""
    weight_decay: float = 0.05
    """On plain weights only; angular ones have no length to decay."""
    layer_decay: float | None = None
    """Factor of the rate from each layer to the one before it, in (0, 1]."""
    accumulate: int = 1
    """Batches whose gradients make one step."""
    clip_grad: float | None = None
    """Largest norm of all gradients together."""
    ema: float | None = None
    """Decay of a moving average of the weights, in (0, 1), which is then what is tested and saved."""
    mixup: float = 0.0
    """α of mixup; plain logits only."""
    cutmix: float = 0.0
    """α of cutmix; plain logits only."""
    amp: str = "none"
    channels_last: bool = False
    compile: bool = False
    fsdp: bool = False
    """Spread parameters, gradients and the optimizer's state over the processes (FSDP2)."""
    freeze: tuple[str, ...] = ()
    """Globs over layer names whose parameters do not train."""
    warmup_head_epochs: int = 0
    """Epochs at first in which only new parameters train: k, β, γ and the head."""
    teacher_weight: float = 0.5
    """Share of the loss that follows the teacher's scores, where there is a teacher."""
    teacher_temperature: float = 2.0
    seed: int = 0
    deterministic: bool = False
    """Let torch use deterministic algorithms only."""
    workers: int = 0
    """Processes that load images."""
    device: str = "auto"
    strict: bool = False
    """Whether an image that cannot be read ends the run; otherwise it is left out and counted."""
    checkpoint_minutes: float = 10.0
    """Between checkpoints inside an epoch."""
    terms: Terms = field(default_factory=Terms)
    """What is minimised."""

    def __post_init__(self) -> None:
        for name in ("freeze", "milestones"):  # a list, or one alone
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, (str, int)) else tuple(given))
        least = {"epochs": 1, "batch_size": 1, "workers": 0, "weight_decay": 0, "accumulate": 1, "mixup": 0,
                 "cutmix": 0, "warmup_head_epochs": 0, "min_lr": 0, "checkpoint_minutes": 0}  # fmt: skip
        for name, lowest in least.items():
            if not getattr(self, name) >= lowest:
                raise UsageError(f"--{_option(name)}: got {getattr(self, name)}, expected at least {lowest}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise UsageError(f"--lr: got {self.lr}, expected a number above 0; a usual value is 1e-3")
        if self.warmup_epochs is not None and not self.warmup_epochs >= 0:
            raise UsageError(f"--warmup-epochs: got {self.warmup_epochs}, expected at least 0")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise UsageError(
                f"--warmup-epochs: got {self.warmup_epochs}, more than the {self.epochs} --epochs there are"
            )
        if self.epoch_batches is not None and not self.epoch_batches >= 1:
            raise UsageError(f"--epoch-batches: got {self.epoch_batches}, expected at least 1")
        for name in ("ema", "layer_decay", "decay_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"--{_option(name)}: got {value}, expected a number above 0 and at most 1")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise UsageError(f"--clip-grad: got {self.clip_grad}, expected a number above 0; a usual value is 1")
        if not 0 <= self.teacher_weight <= 1 or not self.teacher_temperature > 0:
            raise UsageError(
                f"--teacher-weight: got {self.teacher_weight} at the temperature {self.teacher_temperature}, "
                f"expected a share from 0 to 1 and a temperature above 0"
            )
        if self.amp not in AMP:
            raise choose("--amp", self.amp, AMP)
        apart = {"ema": self.ema, "amp fp16": self.amp == "fp16", "warmup-head-epochs": self.warmup_head_epochs,
                 "compile": self.compile}  # fmt: skip
        if self.fsdp and any(apart.values()):
            raise UsageError(f"--fsdp: does not go with --{next(name for name, on in apart.items() if on)}")
        if self.sched == "plateau":
            raise UsageError("--sched: plateau cannot be continued after a stop, for timm does not save its patience; "
                             "take cosine, step or wsd")  # fmt: skip
        if self.sched == "multistep" and not self.milestones:
            raise UsageError("--milestones: none given, expected the epochs after which multistep falls")
        if self.decay_epochs is not None and not self.decay_epochs > 0:
            raise UsageError(f"--decay-epochs: got {self.decay_epochs}, expected a number above 0")
        _ = self.chosen_device
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(
                f"--device: got {self.device!r}, but torch sees no CUDA device. Leave it out, or take 'cpu'."
            )

    @property
    def chosen_device(self) -> torch.device:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        if name.startswith("meta"):
            raise UsageError("--device: got 'meta', which holds no values; take 'cpu' or 'cuda'")
        try:
            torch.empty(0, device=name if name.split(":")[0] != "cuda" else "cpu")
            return torch.device(name)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            raise UsageError(f"--device: got {name!r}: {str(error).splitlines()[0]}") from None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "Settings":
        return cls(
            **{
                **plain,
                "freeze": tuple(plain["freeze"]),
                "milestones": tuple(plain["milestones"]),
                "terms": Terms(**plain["terms"]),
            }
        )


WITHOUT_EFFECT = ("workers", "device", "checkpoint_minutes")
"""Settings that may change when a run is continued: they do not change what is learned."""


def differences(before: Settings, now: Settings) -> list[str]:
    """What a continued run would do otherwise than its beginning, an option each."""
    old, new = ({**s.to_json(), **s.to_json()["terms"]} for s in (before, now))
    return [f"--{_option(name)}: {old[name]} before, {new[name]} now"
            for name in old if name not in WITHOUT_EFFECT and name != "terms" and old[name] != new[name]]  # fmt: skip


def frozen_layers(model: nn.Module, patterns: Iterable[str]) -> list[nn.Module]:
    """The layers whose name, or whose parent's name, matches.

    Raises:
        UsageError: a pattern that matches none.
    """
    found: list[nn.Module] = []
    names = {name: module for name, module in model.named_modules() if name}
    for pattern in patterns:
        matched = [module for name, module in names.items() if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise UsageError(f"--freeze: {pattern!r} matches no layer; names look like {', '.join(list(names)[:3])}")
        found += matched
    return found


def _option(name: str) -> str:
    return name.replace("_", "-")
