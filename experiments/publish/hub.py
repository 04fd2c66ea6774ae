"""Uploading a folder to the hub as one commit, after asking all that can be refused before the first byte leaves.

The token is the environment's, HF_TOKEN: a flag would stand in the shell's history. HF_ENDPOINT names another hub.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from acodm_env.errors import ConfigError, DataError
from acodm_env.hub import require_hub


def check_push(repo: str | None, *, private: bool = False) -> None:
    """Refuse, before anything is made, what could not be pushed afterwards; nothing is sent.

    Args:
        repo: OWNER/NAME on the hub; None is nothing to push.
        private: whether --private was given, which needs something to push.

    Raises:
        ConfigError: the name is none, there is no token, or nothing to push that could be private.
        DataError: the hub cannot be reached.
    """
    if repo is None:
        if private:
            raise ConfigError("private=True: must come with --push OWNER/NAME; there is nothing to push without it")
        return
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, not in __all__

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"push={repo}: must be OWNER/NAME on the hub; {error}; choose another name") from error
    if repo.count("/") != 1:
        raise ConfigError(f"push={repo}: must be OWNER/NAME on the hub; no owner is named; write YOU/{repo}")
    if not os.environ.get("HF_TOKEN"):
        raise ConfigError(
            f"push={repo}: must come with a token that may write; HF_TOKEN is not set; set it to one of yours (on the "
            f"hub: Settings, Access Tokens), or leave --push out"
        )
    remedy = "leave --push out, and push the folder from where there is a network"
    require_hub("push", repo, remedy, may_be_path=False)


def push_folder(
    folder: str | Path,
    repo: str,
    names: Iterable[str],
    *,
    message: str,
    private: bool = False,
    original: str | Path | None = None,
) -> str:
    """Upload the files `names` of a folder as one commit, into a repository that is made if it is not there.

    Args:
        folder: what to push; it has been checked.
        repo: OWNER/NAME.
        names: files that belong to it; others stay here.
        message: of the commit.
        private: the repository must be visible to its owner alone.
        original: what `folder` is a passing copy of, for messages; None if it is none.

    Returns:
        URL of the commit.

    Raises:
        ConfigError: `private`, but the repository is there and public.
        DataError: the hub refused, or did not answer to the end; says what is on it then.
    """
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    api = HfApi(endpoint=endpoint, token=os.environ["HF_TOKEN"])
    with _refusals(repo, original or folder, "was not made"):
        api.create_repo(repo, private=private or None, exist_ok=True)
        public = private and not api.repo_info(repo).private
    if public:
        raise ConfigError(f"private=True: must be a private repository; {repo} is there and public; name another one")
    with _refusals(repo, original or folder, "has no new commit"):
        commit: Any = api.upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=sorted(names), commit_message=message
        )
    return str(commit.commit_url)


@contextmanager
def _refusals(repo: str, folder: str | Path, state: str) -> Iterator[None]:
    """Say in our words what the hub's client raises, with what is on the hub then."""
    from huggingface_hub.errors import HfHubHTTPError

    transport: Any = HfHubHTTPError.__bases__[0]  # the HTTP library's own error: which one differs between releases
    try:
        yield
    except (transport, OSError, ValueError, RuntimeError) as error:
        origin = _origin(error)
        response = getattr(origin, "response", None)
        said = getattr(origin, "server_message", None) or _first_line(origin)
        cause = (
            f"the upload failed ({said})" if response is None else f"the hub answered {response.status_code} ({said})"
        )
        remedy = "try again"
        if response is not None and response.status_code in (401, 403, 404):
            remedy = "give HF_TOKEN a token that may write there, or name a repository of yours"
        raise DataError(f"push={repo}: {cause}; {repo} {state}, {folder} is whole; {remedy}") from error


def _origin(error: BaseException) -> BaseException:
    """The hub's answer behind an error, or else what it began with: the client wraps what happens in an upload."""
    while not hasattr(error, "response") and error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
