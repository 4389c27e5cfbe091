"""Downloads published weights from the Hugging Face Hub, by the files that a preset names: resumable and checked.

`HF_ENDPOINT` names another hub, `HF_TOKEN` a token, as for every program that uses `huggingface_hub`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from engine.checkpoints.headers import StoreError
from engine.config import HubSource, Preset

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PART = ".part"
"""Suffix of a file that is not complete yet."""
READ_BYTES = 1 << 22
FOLDER_VARIABLE = "LIVEREEL_WEIGHTS"


@dataclass(frozen=True)
class HubFile:
    """A file on the hub, at a fixed commit. Sizes are in bytes."""

    repository: str
    commit: str
    path: str
    size: int
    sha256: str | None
    """Of large files; None for those that lie in git."""
    git_hash: str | None
    """SHA-1 of the file as git's object."""

    @property
    def local(self) -> Path:
        """Where the file lies within the folder of downloads."""
        return Path(self.repository.rpartition("/")[2]) / self.path


@dataclass(frozen=True)
class Listing:
    """What a source holds on the hub now."""

    source: HubSource
    licence: str
    """As the repository's card states it, or else as the preset does."""
    files: list[HubFile]


def default_folder(name: str) -> Path:
    """Where the weights of a preset are kept unless told otherwise: in `LIVEREEL_WEIGHTS` or the user's data."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder) / name
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "livereel" / "weights" / name


def _api() -> "HfApi":
    # Servers run offline on purpose (`HF_HUB_OFFLINE`); who asks for a download means it. Read at the first import.
    os.environ["HF_HUB_OFFLINE"] = "0"
    from huggingface_hub import HfApi

    return HfApi()


def look_up(preset: Preset) -> list[Listing]:
    """Size, hash and commit of every file that the preset names.

    Raises:
        StoreError: no files are known, one is missing on the hub, or the hub cannot be reached.
    """
    if not preset.sources:
        what = f"it needs {preset.weights}" if preset.weights else "its weights are part of Livereel"
        raise StoreError(f"{preset.name} has nothing to download: {what}")
    return [_look_up(source) for source in preset.sources]


def _look_up(source: HubSource) -> Listing:
    api = _api()
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = api.model_info(source.repository, revision=source.revision, files_metadata=True)
    except GatedRepoError:
        page = f"{api.endpoint}/{source.repository}"
        raise StoreError(f"{source.repository} asks for consent: give it at {page} and set HF_TOKEN") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise StoreError(f"{source.repository} at {source.revision} is not on {api.endpoint}") from None
    except Exception as error:  # huggingface_hub lets the errors of its HTTP library through, which has changed
        raise StoreError(f"{api.endpoint} cannot be reached: {error}") from error
    there = {each.rfilename: each for each in info.siblings or []}
    files = []
    for path in (*source.files, *source.loras):
        if (found := there.get(path)) is None or found.size is None or info.sha is None:
            raise StoreError(f"{source.repository} holds no {path} at {source.revision}")
        sha256 = found.lfs.sha256 if found.lfs else None
        files.append(HubFile(source.repository, info.sha, path, found.size, sha256, found.blob_id))
    card = info.card_data.get("license") if info.card_data else None
    return Listing(source, str(card) if card else source.licence, files)


def missing_bytes(file: HubFile, folder: Path) -> int:
    """How much of a file is still to be downloaded into the folder."""
    path = folder / file.local
    there = path if path.exists() else _part(path)
    return max(0, file.size - there.stat().st_size) if there.exists() else file.size


def check_room(folder: Path, needed: int) -> None:
    """Raises `StoreError` if the disk of a folder, which need not exist yet, has not this much room."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StoreError(
            f"{existing} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed: make room, or choose "
            "another disk with --to"
        )


def fetch(file: HubFile, folder: Path) -> Path:
    """Download a file into the folder, or what is missing of it, and check it; returns its path.

    Raises:
        StoreError: the connection broke too often (what has arrived is kept), or the file is not the hub's.
    """
    path = folder / file.local
    if not path.exists():
        part = _part(path)
        part.parent.mkdir(parents=True, exist_ok=True)
        _download(file, part)
        if not is_intact(part, file):
            part.unlink()
            raise StoreError(f"{file.repository}: {file.path} arrived damaged and was deleted: download it again")
        part.replace(path)
    elif not is_intact(path, file):
        raise StoreError(f"{path} is not the file that {file.repository} holds: delete it and download it again")
    return path


def _download(file: HubFile, part: Path) -> None:
    api = _api()
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, but not in __all__

    url = hf_hub_url(file.repository, file.path, revision=file.commit, endpoint=api.endpoint)
    headers = build_hf_headers()
    with part.open("ab") as out:
        if out.tell() > file.size:
            out.truncate(0)
        try:
            location = get_hf_file_metadata(url).location
            if urlsplit(location).netloc != urlsplit(url).netloc:
                headers.pop("authorization", None)  # the token is for the hub, not for where it stores files
            done = out.seek(0, os.SEEK_END)
            http_get(
                location, out, resume_size=done, headers=headers, expected_size=file.size, displayed_filename=file.path
            )
        except Exception as error:  # see `_look_up`
            broken = f"the download of {file.path} broke off: {error}"
            raise StoreError(f"{file.repository}: {broken}. Run the command again to go on") from error


def is_intact(path: Path, file: HubFile) -> bool:
    """Whether a local file has the size and the hash that the hub states."""
    size = path.stat().st_size
    if size != file.size:
        return False
    if file.sha256 is None:
        digest, wanted = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), file.git_hash
    else:
        digest, wanted = hashlib.sha256(), file.sha256
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest() == wanted


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as data:
        while block := data.read(READ_BYTES):
            yield block


def _part(path: Path) -> Path:
    return path.with_name(path.name + PART)


def places(listing: Listing, folder: Path) -> list[Path]:
    """What `convert` reads of a source that was fetched: its one file, or its folder if there are several."""
    source = listing.source
    root = folder / source.repository.rpartition("/")[2]
    return [root / source.files[0]] if len(source.files) == 1 else [root]


def loras(listing: Listing, folder: Path) -> list[Path]:
    """The LoRAs of a source that was fetched, to be merged."""
    return [folder / listing.source.repository.rpartition("/")[2] / path for path in listing.source.loras]
