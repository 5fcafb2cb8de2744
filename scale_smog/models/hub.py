"""Weights by name from the Hugging Face hub, and folders put there; a server of one's own, too.

`HF_ENDPOINT` names another server than huggingface.co, `HF_TOKEN` who is asking.
"""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scale_smog.errors import UserError

HUB = "hf-hub:"  # before USER/NAME, or USER/NAME@REVISION; as timm has it
WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "training_state.safetensors"


class NotOnHub(UserError):
    """A repository is there and does not have the file."""


def fetch(name: str, file: str) -> Path:
    """A file of a repository of the hub, on this disk; fetched once.

    Args:
        name: hf-hub:USER/NAME or hf-hub:USER/NAME@REVISION.
        file: of the repository.

    Raises:
        NotOnHub: the repository does not have it.
        UserError: no such repository, or no way to the hub.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = name.removeprefix(HUB).partition("@")
    try:
        return Path(hf_hub_download(repository, file, revision=revision or None))
    except Exception as error:  # the library's, its HTTP client's, and those of a full disk
        words = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        # Without a way to the hub nobody knows, unless the user wants what is here.
        is_unknown = isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
        is_missing = isinstance(error, EntryNotFoundError) and not is_unknown
        kind = NotOnHub if is_missing else UserError
        raise kind(f"{name}: cannot fetch {file}: {words}") from None


def push(folder: Path, repository: str) -> str:
    """Puts a folder into a repository of the hub, which is made if it is not there.

    Args:
        folder: that `export` has written.
        repository: USER/NAME.

    Returns:
        Its address.

    Raises:
        UserError: the hub does not take it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Weights and card",
            delete_patterns=[WEIGHTS_FILE, STATE_FILE],  # of an export before
        )
    except Exception as error:
        words = " ".join(str(error).split("\n")[0].split()) or type(error).__name__
        raise UserError(f"cannot push {folder} to {repository}: {words}") from None
    return str(address)


def save_for_hub(
    folder: Path, weights: dict[str, Tensor], name: str, width: int, small_images: bool
) -> None:
    """Writes a net that timm does not have; `hub_net(USER/NAME)` builds and loads it."""
    from scale_smog.models.hub_net import HubNet
    from scale_smog.models.weights import stem_facts  # which imports this module

    net = HubNet(name, width, small_images)
    net.backbone.load_state_dict(weights)
    net.save_pretrained(folder)
    saved = load_file(folder / WEIGHTS_FILE)
    metadata = {"format": "pt"} | stem_facts(net.backbone)
    save_file(saved, folder / WEIGHTS_FILE, metadata=metadata)


def hub_net(name: str) -> nn.Module:
    """A backbone that `export --push` has put on the hub, with its weights.

    Args:
        name: USER/NAME, or a folder.
    """
    from scale_smog.models.hub_net import HubNet

    return HubNet.from_pretrained(name).backbone
