"""Models as folders and as repositories of the Hugging Face Hub: what FTCN and SDRModel inherit.

The methods are named and behave as those of huggingface_hub's PyTorchModelHubMixin. That class itself cannot be
inherited, since importing this package needs torch alone, and it would write weights without the preprocessing, the
origin and the hash that :mod:`sdr.checkpoint` keeps inside of them.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Self

from sdr.errors import SDRError, escape
from sdr.files import make_folder, write_atomic

if TYPE_CHECKING:  # these modules import the models
    from sdr.checkpoint import WeightsInfo

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
REASONS = {  # of huggingface_hub's errors; the first that fits is told
    "GatedRepoError": "is a repository whose owner must grant you access",
    "RepositoryNotFoundError": "no such repository, or one that asks for a token (log in with `hf auth login`)",
    "RevisionNotFoundError": "has no such revision",
    "LocalEntryNotFoundError": f"{WEIGHTS} is not in the local cache, and the Hub was not or could not be asked",
    "EntryNotFoundError": f"the repository has no {WEIGHTS}",
}


class PretrainedMixin:
    """Loads and saves models with their configuration, preprocessing, origin and hash."""

    weights_info: WeightsInfo | None = None  # what the file said of the weights that were loaded

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """A model with the weights of a folder, of a safetensors file, or of the Hub; on the CPU, in evaluation mode.

        Args:
            name_or_path: a folder that :meth:`save_pretrained` wrote, a weights file, or where neither is there
                ``owner/name`` of a repository on the Hub, whose weights are then downloaded and kept. A Path is never
                looked for on the Hub.
            revision: branch, tag or commit of the repository; None is its main branch.
            token: for the Hub; None takes the one that you are logged in with.
            cache_dir: where downloads are kept; None is the Hub's own cache.
            local_files_only: take what was downloaded before, without the network.

        Raises:
            SDRError: nothing of that name, a damaged file, weights of another class, or the Hub refuses.
        """
        from sdr.checkpoint import load_model

        path = os.fspath(name_or_path)
        if os.path.isdir(path):
            path = os.path.join(path, WEIGHTS)
        elif not os.path.lexists(path) and isinstance(name_or_path, str) and is_repository(path):
            with hub_errors(path) as hub:
                path = hub.hf_hub_download(
                    path,
                    WEIGHTS,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=local_files_only,
                    library_name="sdr",
                )
        return load_model(path, cls)[0]

    def save_pretrained(
        self, folder: str | os.PathLike, *, info: WeightsInfo | None = None, card: str | None = None
    ) -> None:
        """Write model.safetensors, config.json and a model card, README.md, to ``folder``; what is there is replaced.

        Args:
            folder: made when missing.
            info: what the weights are; None says what the file said that they were loaded from, so give it where they
                were trained since.
            card: Markdown of the card; None makes one of ``info``.

        Raises:
            SDRError: a file cannot be written.
        """
        self._save(Path(folder), Path(folder).resolve().name, info, card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model with sdr",
        info: WeightsInfo | None = None,
        card: str | None = None,
    ) -> str:
        """Upload what :meth:`save_pretrained` writes to a repository of the Hub, in one commit.

        Args:
            repo_id: ``owner/name``; the repository is made when missing.
            private: who sees a repository that is made; None is the owner's default, for most people everybody.
            token: for the Hub; None takes the one that you are logged in with.
            revision: branch to commit to; None is the main branch.
            commit_message: of the commit.
            info: as of :meth:`save_pretrained`.
            card: as of :meth:`save_pretrained`.

        Returns:
            The commit's address.

        Raises:
            SDRError: the Hub refuses or cannot be reached.
        """
        with hub_errors(repo_id) as hub:
            api = hub.HfApi(token=token, library_name="sdr")
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), repo_id, info, card)
            with hub_errors(repo_id):
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision
                )
        return commit.commit_url

    def _save(self, folder: Path, name: str, info: WeightsInfo | None, card: str | None) -> None:
        from sdr.checkpoint import WeightsInfo, save_weights
        from sdr.model_card import model_card

        info = info or self.weights_info or WeightsInfo()
        make_folder(folder)
        save_weights(folder / WEIGHTS, self, info)
        config = {"model": type(self).__name__, **asdict(self.config)}
        write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        write_atomic(folder / CARD, model_card(name=name, info=info, config=self.config) if card is None else card)


def is_repository(name: str) -> bool:
    """Whether ``name`` could be ``owner/name`` on the Hub, and is no weights file."""
    part = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
    return re.fullmatch(f"{part}/{part}", name) is not None and not name.endswith(".safetensors")


@contextmanager
def hub_errors(repo_id: str) -> Iterator:
    """huggingface_hub; what it raises in the block becomes one line."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        what = "is looked for on the Hugging Face Hub, for which huggingface_hub is not installed"
        raise SDRError(repo_id, what, "pip install 'sdr[hub]'") from error
    try:
        yield huggingface_hub
    except Exception as error:  # of no common base: some come from the HTTP library below, which has changed before
        found = (reason for name, reason in REASONS.items() if isinstance(error, getattr(errors, name)))
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SDRError(repo_id, f"on the Hugging Face Hub: {next(found, escape(lines[0]))}") from error
