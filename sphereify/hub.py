"""The Hugging Face Hub: names of repositories, downloads and uploads. The one home of huggingface_hub.

Only named files are downloaded, into the cache that huggingface_hub keeps, and nothing of them is executed here.
Imports huggingface_hub when the hub is asked for.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sphereify.errors import HubError, UsageError, first_line

PREFIX = "hf-hub:"
"""The beginning of a name on the hub, as in timm: hf-hub:user/name, or hf-hub:user/name@revision."""


@dataclass(frozen=True)
class Repository:
    """A repository on the hub, and one of its revisions: a branch, a tag or a commit."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.revision}" if self.revision else "")


def is_hub_name(spec: object) -> bool:
    """True for a name that begins as those on the hub do.

    >>> is_hub_name("hf-hub:user/name"), is_hub_name("user/name")
    (True, False)
    """
    return os.fspath(spec).startswith(PREFIX) if isinstance(spec, (str, os.PathLike)) else False


def repository_of(spec: "str | os.PathLike[str]") -> Repository:
    """The repository that a name on the hub stands for.

    Raises:
        UsageError: a name of another form.

    >>> repository_of("hf-hub:user/name@v1")
    Repository(name='user/name', revision='v1')
    """
    name, at, revision = os.fspath(spec).removeprefix(PREFIX).partition("@")
    if not _NAME.fullmatch(name) or ".." in name or "--" in name or (at and not revision):
        raise UsageError(f"{os.fspath(spec)}: expected {PREFIX}user/name, or {PREFIX}user/name@revision")
    return Repository(name, revision or None)


_PART = r"\w(?:[\w.\-]{0,94}\w)?"
_NAME = re.compile(f"{_PART}/{_PART}", re.ASCII)


def download(repository: Repository, files: Sequence[str], *, token: str | None = None, others: str = "") -> Path:
    """A folder with these files of a repository, all of one commit. Files that are in the cache are not fetched again.

    Args:
        repository: whose files to fetch.
        files: their names.
        token: an access token; default: that of the environment (HF_TOKEN), or of the login on this machine.
        others: a sentence for the error on a missing file.

    Raises:
        HubError: no such repository, revision or file, no access, or no network.
    """
    hub = _huggingface_hub()
    folder, commit = Path(), repository.revision
    for name in files:
        with _explained(repository, name, others):
            path = hub.hf_hub_download(
                repository.name,
                name,
                revision=commit,
                token=token,
                endpoint=_endpoint(),
                library_name="sphereify",
            )
        folder = Path(path).parent
        commit = folder.name  # of the first file; a push between two files cannot mix them
    return folder


def has_file(repository: Repository, name: str, *, token: str | None = None) -> bool:
    """True if a repository has a file of this name.

    Raises:
        HubError: no such repository or revision, no access, or no network.
    """
    try:
        download(repository, [name], token=token)
    except HubError as error:
        if error.is_missing_file:
            return False
        raise
    return True


def upload(
    files: Mapping[str, Path],
    repository: Repository,
    *,
    message: str,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload files in one commit; the repository, and the branch if one is named, are made if they are missing.

    Args:
        files: each by its name in the repository, whose other files stay.
        repository: where they go.
        message: of the commit.
        private: make a new repository private; one that exists stays as it is.
        token: an access token that may write; default: that of the environment (HF_TOKEN), or of the login.

    Returns:
        The address of the commit.

    Raises:
        HubError: no token, no right to write, or no network.
    """
    hub = _huggingface_hub()
    api = hub.HfApi(endpoint=_endpoint(), token=token, library_name="sphereify")
    with _explained(repository):
        api.create_repo(repository.name, private=private or None, exist_ok=True)
        if repository.revision is not None:
            api.create_branch(repository.name, branch=repository.revision, exist_ok=True)
        operations = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
        commit = api.create_commit(repository.name, operations, commit_message=message, revision=repository.revision)
    return str(commit.commit_url)


def check_token(repository: Repository, token: str | None) -> None:
    """Make sure that there is an access token to write with, without asking the hub.

    Raises:
        HubError: there is none.
    """
    if not token and not _huggingface_hub().get_token():
        raise HubError(f"{repository}: {_NO_TOKEN}")


def has_file_to_keep(repository: Repository, name: str, *, token: str | None = None) -> bool:
    """True if a repository, which may not exist yet, has a file of this name.

    Raises:
        HubError: no access, or no network.
    """
    try:
        return has_file(repository, name, token=token)
    except HubError as error:
        if error.is_missing:
            return False
        raise


def _endpoint() -> str | None:
    """The address of the hub; None for the usual one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _huggingface_hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UsageError(
            "the Hugging Face Hub needs huggingface_hub, which is not installed: pip install 'sphereify[hub]'"
        ) from error
    return huggingface_hub


@contextmanager
def _explained(repository: Repository, file: str = "", others: str = "") -> Iterator[None]:
    """Turn the errors of huggingface_hub into those of this package."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"{repository}: {_NO_TOKEN}") from error
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repository}: its owner gives access on request; ask for it on its page, and {_LOG_IN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repository}: there is no such repository on the hub, or it is private and the token may not read it; "
            f"check the name, or {_LOG_IN}",
            is_missing=True,
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repository}: there is no such revision in the repository", is_missing=True) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(repository, error) from error
    except errors.EntryNotFoundError as error:
        more = f"; {others}" if others else ""
        raise HubError(f"{repository}: there is no {file} in it{more}", is_missing_file=True) from error
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            why = _NO_TOKEN if status == 401 else f"the token has no right to do this; {_LOG_IN}"
            raise HubError(f"{repository}: {why}") from error
        raise HubError(f"{repository}: the hub refused it ({first_line(error)})") from error
    except (errors.OfflineModeIsEnabled, OSError) as error:
        raise _unreachable(repository, error) from error
    except Exception as error:  # the HTTP client of huggingface_hub has errors of its own
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise _unreachable(repository, error) from error
        raise HubError(f"{repository}: {first_line(error)}") from error


def _unreachable(repository: Repository, error: BaseException) -> HubError:
    return HubError(
        f"{repository}: the hub cannot be reached, and the cache of this machine does not hold it "
        f"({first_line(error)}). Try again where there is a network"
    )


_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_NO_TOKEN = f"the hub asks for an access token; {_LOG_IN}"
