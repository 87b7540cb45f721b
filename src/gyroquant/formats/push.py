"""Pushes a folder that gyroquant wrote to the hub, as a private model unless asked otherwise."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError
from gyroquant.system.checksums import CHECKSUM_FILE, check

MANIFESTS = ("gyroquant.json", "gyroquant_export.json")


def push(folder: str | Path, name: str, *, public: bool = False) -> str:
    """Pushes a folder to the hub. Returns the address of the repository.

    folder: a folder that `quantize` or `export` wrote. Its files are compared with their checksums first.
    name: the repository, as OWNER/NAME, or as NAME for one of your own. It is created if it does not exist. It then
        holds exactly the files of the folder; earlier versions stay in its history.
    public: whether everyone may see it. Default: False.

    Raises InputError if the name, the token, the repository or the folder cannot be used, and if the hub fails. The
    folder stays as it is, and the same call pushes it again.
    """
    folder = Path(folder)
    check_folder(folder)
    try:
        return _upload(folder, check_push(name, public), public)
    except Exception as error:  # the hub client raises many kinds
        raise InputError(
            f"{folder} was not pushed to {name}: {_reason(error)}. The folder is complete; run "
            f"`{push_command(folder, name, public)}` to push it again"
        ) from error


def _upload(folder: Path, repository: str, public: bool) -> str:
    api = _api()
    address = str(api.create_repo(repository, private=not public, exist_ok=True))
    api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="Model quantized by gyroquant",
        ignore_patterns=[".*", "**/.*"],
        delete_patterns=["*"],
    )
    return address


def check_push(name: str, public: bool = False) -> str:
    """The repository of a push as OWNER/NAME. Asks the hub, and changes nothing there.

    Raises InputError if there is no valid token that may write to it, and for a name that cannot be used: an invalid
    one, one of another owner, a repository with another model, and one that is public or private against `public`.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name!r} is not a name on the hub ({error}); use OWNER/NAME") from error
    if constants.is_offline_mode():
        raise InputError(f"pushing {name} needs the hub, and HF_HUB_OFFLINE is set; unset it")
    if get_token() is None:
        raise InputError(f"pushing {name} needs a token of the hub: run `hf auth login`, or set HF_TOKEN")
    user = _user(name)
    owner, _, rest = name.rpartition("/")
    owners = [user["name"], *(entry["name"] for entry in user.get("orgs", ()))]
    if owner and owner not in owners:
        raise InputError(f"the token of {user['name']} cannot write to {owner}; use one of {', '.join(owners)}")
    repository = f"{owner or user['name']}/{rest}"
    _check_repository(repository, public)
    return repository


def check_folder(folder: Path) -> None:
    """Raises InputError unless gyroquant wrote a folder and all its files are intact."""
    if not any((folder / name).is_file() for name in MANIFESTS):
        raise InputError(f"{folder} is not a folder that gyroquant wrote: it has neither {' nor '.join(MANIFESTS)}")
    integrity = check(folder)
    if integrity is None or not integrity.intact:
        raise InputError(f"{folder} differs from its {CHECKSUM_FILE}: `gyroquant verify {folder}` names the files")


def push_command(folder: Path, name: str, public: bool) -> str:
    """The command that pushes a folder."""
    return shlex.join(["gyroquant", "push", str(folder), name, *(["--public"] if public else [])])


def _api() -> Any:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT)


def _user(name: str) -> dict[str, Any]:
    """What the hub says about the token."""
    try:
        user: dict[str, Any] = _api().whoami()
    except Exception as error:  # the hub client raises many kinds
        raise InputError(f"the hub does not accept the token that pushing {name} needs: {_reason(error)}") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(f"pushing {name} needs a token that may write; this one may only read")
    return user


def _check_repository(repository: str, public: bool) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = _api().model_info(repository)
    except RepositoryNotFoundError:
        return
    except Exception as error:  # the hub client raises many kinds
        raise InputError(f"the hub does not say whether {repository} exists: {_reason(error)}") from error
    if info.private == public:
        is_now, remedy = ("private", "leave out --public") if info.private else ("public", "add --public")
        raise InputError(f"{repository} exists and is {is_now}; {remedy}, or choose another name")
    files = {sibling.rfilename for sibling in info.siblings or ()}
    if files - {".gitattributes"} and not files & set(MANIFESTS):
        raise InputError(f"{repository} holds files that gyroquant did not write; choose another name")


def _reason(error: Exception) -> str:
    """What an error of the hub says, without the advice after it."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return ". ".join(lines[:2]) or type(error).__name__
