"""Annotations: the facts that the package writes on a user's model, each as an attribute of the module.

Deep copies and pickles of a model carry them; its `state_dict` does not, and an artifact has parts of its own for those
that last. `model.conversion_plan` and `folded.folding` are for users to read, too.

>>> from torch import nn
>>> model = nn.Linear(2, 2)
>>> PRETRAINED_BASE.write(model, "timm/resnet18.a1_in1k")
>>> PRETRAINED_BASE.of(model), model.pretrained_base, FOLDING.of(model)
('timm/resnet18.a1_in1k', 'timm/resnet18.a1_in1k', None)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:  # types alone: each of these modules imports this one
    from sphereify.convert.plan import ConversionPlan
    from sphereify.deployment.folding import Folding
    from sphereify.preparation import Preparation
    from sphereify.rebuilding import Proof
    from sphereify.sources import Source

Fact = TypeVar("Fact")


@dataclass(frozen=True)
class Annotation(Generic[Fact]):
    """An attribute in which a model carries a fact about itself."""

    attribute: str

    def of(self, model: object) -> Fact | None:
        """The fact that a model carries; None if it carries none."""
        return getattr(model, self.attribute, None)

    def required(self, model: object) -> Fact:
        """The fact that a model carries, which must be on it."""
        return getattr(model, self.attribute)

    def is_on(self, model: object) -> bool:
        """True if a model carries such a fact, which may be None."""
        return hasattr(model, self.attribute)

    def write(self, model: object, fact: Fact) -> None:
        """Let a model carry a fact, in place of an earlier one."""
        setattr(model, self.attribute, fact)

    def remove(self, model: object) -> None:
        """Take such a fact off a model, if it carries one."""
        vars(model).pop(self.attribute, None)


# ------------------------------------------------------------------------------------------------------- its conversion

PLAN: Annotation["ConversionPlan"] = Annotation("conversion_plan")
"""The plan by which a model was converted, of several conversions together; `apply_plan` writes it."""

CALIBRATED: Annotation[bool] = Annotation("calibrated")
"""True if the layers of a converted model were fitted to those of its original; `calibrate` writes it."""

CALIBRATION_FIT: Annotation[dict[str, Any]] = Annotation("calibration_fit")
"""The results of that calibration as plain JSON values; `calibrate` and `choose_radius` write them."""

FOLDING: Annotation["Folding"] = Annotation("folding")
"""Record of the folding of a model; `fold` writes it."""

# ----------------------------------------------------------------------------------------------------------- its origin

SOURCE: Annotation["Source"] = Annotation("conversion_source")
"""The name and the arguments with which a model was built; `build_model` writes them."""

PRETRAINED_BASE: Annotation[str] = Annotation("pretrained_base")
"""The name of the pretrained model whose weights a model started from; `build_model` writes it.

Not `base_model`, by which models of transformers give the network below their head."""

UNTRAINED: Annotation[str] = Annotation("_untrained")
"""A sentence on the part of a model for which its weights brought nothing; who fills a model writes it."""

REBUILDING_PROOF: Annotation["Proof"] = Annotation("_sphereify_proof")
"""The source that was proven to give a converted model again; `save` writes it, so that the next one is quick."""

# ----------------------------------------------------------------------------------------------------------- its images

IMAGE_CONFIG: Annotation[dict[str, Any]] = Annotation("image_config")
"""The keys of timm's `pretrained_cfg` for a model of another library; `build_model` writes them."""

PREPARATION: Annotation["Preparation | None"] = Annotation("image_preparation")
"""Preparation of a model's images, as its training, its artifact or its user says; None: it is not known."""

# --------------------------------------------------------------------------------------------------------- its artifact

TRAINING_RECORD: Annotation[dict[str, Any]] = Annotation("training_record")
"""The data, the classes and the size of the images of a model's training; `load` writes what the artifact holds."""

LOADED_FINGERPRINT: Annotation[str] = Annotation("loaded_fingerprint")
"""The fingerprint of the tensors in the artifact that a model came from; `load` writes it."""
