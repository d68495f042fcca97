"""The Hub's files: repositories as folders on this machine, with errors that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download


@contextmanager
def hub_errors(name: str | Path) -> Iterator[None]:
    """Turns the Hub's errors about a repository or folder `name` into PermissionError and FileNotFoundError."""
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(f"{name} is gated: accept its terms on the Hub and log in ({error})") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise FileNotFoundError(f"{name}: no such file or folder, nor such a repository on the Hub") from error
    except errors.RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"{name}: the repository has no such file ({error})") from error
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name}: no such file or folder, and no copy of a repository of that name; the Hub is not reached"
        ) from error


def repository_folder(name: str | Path, patterns: list[str], **hub) -> Path:
    """
    The folder `name`, or that of a Hub repository's files on this machine, downloaded where they are not.

    Args:
        patterns: of the files to download, such as "*.json".
        hub: `revision`, `cache_dir`, `token`, `local_files_only` of `snapshot_download`.

    Raises:
        FileNotFoundError, PermissionError: there is no such folder or repository, or it is gated.
    """
    if Path(name).is_dir():
        return Path(name)
    with hub_errors(name):
        return Path(snapshot_download(str(name), allow_patterns=patterns, **hub))


def repository_file(name: str, file: str, **hub) -> Path:
    """One file of a Hub repository, downloaded where it is not on this machine; errors as of `repository_folder`."""
    with hub_errors(f"{name}/{file}"):
        return Path(hf_hub_download(name, file, **hub))


def list_repository(
    name: str,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> list[str]:
    """The files of a Hub repository; without the network, those on this machine. Errors as of `repository_folder`."""
    with hub_errors(name):
        if not (local_files_only or constants.HF_HUB_OFFLINE):
            return HfApi(token=token).list_repo_files(name, revision=revision)
        folder = Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True))
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
