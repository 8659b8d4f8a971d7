"""The command push."""

from typing import Annotated

import typer

from sphereify.cli.options import with_options
from sphereify.sharing.options import PushOptions


@with_options()
def push(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A saved artifact.", show_default=False)],
    repository: Annotated[
        str, typer.Argument(metavar="USER/NAME", help="Repository on the Hugging Face Hub.", show_default=False)
    ],
    how: PushOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the model card, and upload nothing.")] = False,
) -> None:
    """Upload an artifact with a model card to the Hugging Face Hub; hf-hub:USER/NAME is its name from then on."""
    from sphereify.sharing.pushing import card_of, push_to_hub

    if dry_run:
        print(card_of(artifact, repository, **vars(how)), end="")
        return
    pushed = push_to_hub(artifact, repository, **vars(how))
    print(f"uploaded {', '.join(pushed.files)}: {pushed.address}")
    if pushed.kept_card:
        print("the model card that the repository has stays; --replace-card replaces it")
    print(f"load it with: sphereify predict {pushed.repository} photo.jpg, or sphereify.load({pushed.repository!r})")
