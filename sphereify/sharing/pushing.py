"""Uploading a converted network with its model card to the Hugging Face Hub."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sphereify.annotations import TRAINING_RECORD
from sphereify.artifact import DOCUMENT, TENSORS, located, read_document, save
from sphereify.errors import UsageError, option, wrong_type
from sphereify.fingerprint import is_as_loaded
from sphereify.hub import Repository, check_token, has_file_to_keep, repository_of, upload
from sphereify.options import from_keywords, with_keywords_of
from sphereify.sharing.card import model_card
from sphereify.sharing.options import PushKeywords, PushOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

CARD = "README.md"


@dataclass(frozen=True)
class Pushed:
    """An upload to the hub."""

    repository: str
    """The name that `load` takes: "hf-hub:user/name", with "@revision" if one was given."""
    address: str
    """The address of the commit."""
    files: tuple[str, ...]
    """Names of the files that were uploaded."""

    @property
    def kept_card(self) -> bool:
        """True if the repository had a model card of its own, which stays."""
        return CARD not in self.files


@with_keywords_of(PushOptions)
def push_to_hub(
    model: "nn.Module | str | os.PathLike[str]", repository: str, **options: "Unpack[PushKeywords]"
) -> Pushed:
    """Upload a converted network to the Hugging Face Hub: its artifact, and a model card that is made from it.

    The repository is made if it is missing. All files go in one commit; others in the repository stay, and so does a
    model card that it has already.

    Args:
        model: a converted model, or the folder of an artifact. A model that was trained further since it was loaded
            loses the accuracy that its artifact tells: give `accuracy`.
        repository: "user/name".
        {options}

    Returns:
        What was uploaded, and where.

    Raises:
        UsageError: a model that was not converted, a name of another form, or no licence that is known.
        HubError: no access token, no right to write, or no network.
        ArtifactError: the folder holds no sound artifact.
    """
    chosen = from_keywords(PushOptions, options, "push_to_hub")
    place = _place(repository, chosen.revision)
    with _artifact(model) as (folder, document):
        card = model_card(document, place.name, chosen)
        check_token(place, chosen.token)
        files = {DOCUMENT: folder / DOCUMENT, TENSORS: folder / TENSORS}
        with tempfile.TemporaryDirectory() as aside:
            files[DOCUMENT] = Path(aside) / DOCUMENT  # as it was read, which may be from the header of the tensors
            files[DOCUMENT].write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            if chosen.replace_card or not has_file_to_keep(place, CARD, token=chosen.token):
                files[CARD] = Path(aside) / CARD
                files[CARD].write_text(card, encoding="utf-8")
            message = chosen.commit_message or "Upload a network converted with sphereify"
            address = upload(files, place, message=message, private=chosen.private, token=chosen.token)
    return Pushed(str(place), address, tuple(sorted(files)))


@with_keywords_of(PushOptions)
def card_of(model: "nn.Module | str | os.PathLike[str]", repository: str, **options: "Unpack[PushKeywords]") -> str:
    """The model card that `push_to_hub` would upload, without asking the hub.

    Args:
        model, repository: as for `push_to_hub`.
        {options}

    Raises:
        UsageError, ArtifactError: as `push_to_hub`.
    """
    chosen = from_keywords(PushOptions, options, "card_of")
    place = _place(repository, chosen.revision)
    with _artifact(model) as (_, document):
        return model_card(document, place.name, chosen)


def _place(repository: object, revision: str | None) -> Repository:
    if not isinstance(repository, str):
        raise wrong_type("repository", repository, "a name, user/name")
    place = repository_of(repository)
    if place.revision is not None and revision is not None:
        raise UsageError(
            f"{option('revision')}: got {revision!r}, and {repository} names a revision, too",
            option="revision",
            value=revision,
        )
    return replace(place, revision=place.revision or revision)


@contextmanager
def _artifact(model: "nn.Module | str | os.PathLike[str]") -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder of an artifact, which is written if there is none yet, and the content of its conversion.json."""
    if isinstance(model, nn.Module):
        with tempfile.TemporaryDirectory() as aside:
            folder = save(model, Path(aside) / "artifact", training=TRAINING_RECORD.of(model))
            document = read_document(folder)
            if document["training"] and not is_as_loaded(model, document["fingerprint"]):
                document["training"].pop("accuracy", None)  # of other weights
            yield folder, document
    elif isinstance(model, (str, os.PathLike)):
        folder = located(model)  # type: ignore[arg-type]
        yield folder, read_document(folder)
    else:
        raise wrong_type("model", model, "a converted torch.nn.Module, or the folder of an artifact")
