"""A run's checkpoints: each one file, written whole, with a hash over all of it; the newest whole one counts."""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdr.checkpoint import read_weights, say, write_tensors
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
        except OSError as error:
            raise SDRError(self.folder, f"cannot be read: {error.strerror}") from error
        return sorted((path for path in found if re.fullmatch(r"step_\d{9}\.safetensors", path.name)), reverse=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:09d}.safetensors"

    def save(self, step: int, tensors: Mapping[str, Tensor], values: Mapping) -> None:
        """Write the state after update ``step``; then remove the oldest, and later ones, which were passed over.

        Raises:
            SDRError: it cannot be written; those before it are still there.
        """
        make_folder(self.folder)
        for left in filter(is_temporary, self.folder.glob(".*")):
            remove(left)
        path = self._path(step)
        write_tensors(path, tensors, {"format": FORMAT, "values": json.dumps(values)})
        files = self._files()
        later = [other for other in files if other.name > path.name]
        for old in (*later, *files[len(later) + self.keep :]):
            remove(old)

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """The newest state that is whole, and says so where that is not the newest; None where there is no checkpoint.

        Raises:
            SDRError: there are some, and none is whole.
        """
        files = self._files()
        for path in files:
            try:
                return read_checkpoint(path)
            except SDRError as error:
                logger.warning("%s; going back to the checkpoint before it", error)
        if files:
            raise SDRError(self.folder, "no checkpoint there is whole", "remove the folder to start anew")
        return None

    def load_step(self, step: int) -> tuple[dict[str, Tensor], dict]:
        """The state after update ``step``, which another process has found whole; raises SDRError."""
        return read_checkpoint(self._path(step))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and values of a checkpoint; raises SDRError where it is damaged."""
    tensors, metadata = read_weights(path, FORMAT)
    try:
        values = json.loads(metadata["values"])
    except (KeyError, ValueError, RecursionError) as error:
        raise SDRError(path, f"holds no state of a run: {say(error)}") from error
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise SDRError(path, "holds no state of a run: it does not say after which update")
    return tensors, values
