"""Models named by a hub id, fetched (or found in the local cache) with a progress bar."""

from __future__ import annotations

import re
from pathlib import Path

from coppice.errors import CheckpointError

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt"]
_UNWANTED = ["*/*"]


def is_hub_id(name: str) -> bool:
    """``owner/name``, and nothing a path could be mistaken for."""
    return _ID.fullmatch(name) is not None and ".." not in name


def fetch(repo_id: str, revision: str | None = None) -> Path:
    """The local folder of a hub model, downloading what is missing of it.

    Only safetensors, JSON and tokenizer files are fetched; nothing that can hold code.

    Raises:
        CheckpointError: no network, no such model, or no permission.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repo_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except LocalEntryNotFoundError:
        raise CheckpointError(
            f"{repo_id!r} is not on this machine and the hub cannot be reached; connect to the "
            "network, or name a local folder."
        ) from None
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else "no answer"
        raise CheckpointError(
            f"The hub refused {repo_id!r} ({code}); check the name, and log in with "
            "`hf auth login` if the model is gated."
        ) from None
    except OSError as error:
        raise CheckpointError(f"Fetching {repo_id!r} failed: {error}.") from None
    return Path(found)
