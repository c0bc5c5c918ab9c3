"""Send an exported run to a model repository of the Hugging Face Hub, with a model card.

The token is huggingface_hub's own affair (`hf auth login`, or HF_TOKEN in the environment), and so is the address (HF_ENDPOINT): neither is
read, printed or written by vaescale.
"""

import os
from pathlib import Path
from typing import Any

from vaescale.commands.model_card import write_card
from vaescale.errors import UserError
from vaescale.system.secrets import redact
from vaescale.trained import Trained


def check_hub(repository: str) -> None:
    """Raise UserError unless `repository` is OWNER/NAME; ModuleNotFoundError unless huggingface_hub is installed."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository)
        is_valid = repository.count("/") == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise UserError(
            f"--push-to-hub (={redact(repository)!r}) is no name of a repository; give OWNER/NAME of letters, digits, '-', '_' and '.'"
        )


def push_folder(trained: Trained, out: Path, repository: str, *, format: str) -> dict[str, Any]:  # noqa: A002
    """Write the model card into OUT and send the folder. A new repository is private. Returns the address of the commit.

    Raises UserError when the repository cannot be written; OUT stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    write_card(trained, out, format=format, repository=repository)
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=out,
            commit_message=f"{trained.recipe.name}, step {trained.step}, {trained.weights} weights",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        lines = redact(str(error)).strip().splitlines()
        raise UserError(
            f"{repository} was not written ({lines[0] if lines else type(error).__name__}); {out} is complete: check `hf auth whoami`, "
            f"then `hf upload {repository} {out}`"
        ) from None
    return {"pushed": str(commit.commit_url)}
