"""A run's checkpoints: each one file, written whole, with a hash over all of it; the newest whole one counts."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdr.checkpoint import read_weights, write_tensors
from sdr.errors import SDRError
from sdr.files import is_temporary, make_folder, remove

FORMAT = "sdr-training-1"
logger = logging.getLogger(__name__)


class Checkpoints:
    """The folder that a run's checkpoints are in.

    Args:
        folder: made when the first one is written.
        keep: how many are kept.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def _files(self) -> list[Path]:
        """The newest first."""
        try:
            found = list(self.folder.iterdir()) if self.folder.exists() else []
            for left in filter(is_temporary, found):
                remove(left)
        except OSError as error:
            raise SDRError(self.folder, f"cannot be read: {error.strerror}") from error
        return sorted((path for path in found if re.fullmatch(r"step_\d{9}\.safetensors", path.name)), reverse=True)

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping) -> None:
        """Write the state after update ``step``, then remove the oldest ones.

        Raises:
            SDRError: it cannot be written; those before it are still there.
        """
        make_folder(self.folder)
        metadata = {"format": FORMAT, "values": json.dumps(values)}
        write_tensors(self.folder / f"step_{step:09d}.safetensors", tensors, metadata)
        for old in self._files()[self.keep :]:
            remove(old)

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """The newest state that is whole, and says so where that is not the newest; None where there is no checkpoint.

        Raises:
            SDRError: there are some, and none is whole.
        """
        files = self._files()
        for path in files:
            try:
                tensors, metadata = read_weights(path, FORMAT)
                return tensors, json.loads(metadata["values"])
            except (SDRError, KeyError, ValueError) as error:
                logger.warning("%s; going back to the checkpoint before it", error)
        if files:
            raise SDRError(self.folder, "no checkpoint there is whole", "remove the folder to start anew")
        return None
