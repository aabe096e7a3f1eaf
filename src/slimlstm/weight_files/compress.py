"""``compress_file``: compress the LSTMs in a weight file, without the code of their model."""

from __future__ import annotations

import os
from pathlib import Path

from slimlstm.calibration.moments import Calibration
from slimlstm.errors import SlimLSTMError
from slimlstm.files import check_not_input, path_of
from slimlstm.folders import CONFIG, read_config, weights_files, write_folder
from slimlstm.modules.modes import plain_defaults, plain_mode
from slimlstm.pipeline.plan import Config, check_config, with_storage
from slimlstm.pipeline.report import Report
from slimlstm.pipeline.run import apply, check_smaller, solve
from slimlstm.progress import Progress, shown
from slimlstm.weight_files.check import check_holds_lstm
from slimlstm.weight_files.read import read_weights
from slimlstm.weight_files.source import FileSource


@plain_mode()
@plain_defaults()
def compress_file(
    path: str | os.PathLike[str],
    config: Config,
    folder: str | os.PathLike[str],
    progress: Progress | None = None,
    storage: str | None = None,
    *,
    part: str | None = None,
    calibration: Calibration | None = None,
) -> Report:
    """Compress the LSTMs in a weight file, and write a folder that :func:`slimlstm.load` reads.

    Args:
        path: a weight file or a folder; see :func:`slimlstm.weight_files.read_tensors`.
        config: see :func:`slimlstm.compress_`.
        folder: the folder to write. It must not be ``path``, nor a compressed folder that ``path`` belongs to.
        progress: called with a site's key and the fraction done; None draws a bar on a terminal.
        storage: a storage to which every selected site is rounded in addition.
        part: which state dict of a checkpoint with several; see :func:`slimlstm.weight_files.read_tensors`.
        calibration: moments from :func:`slimlstm.calibrate` on the model that these weights belong to, for calibrated
            methods. A weight file has no model to run batches through.

    Returns:
        A report of every site and of the whole file.

    Raises:
        SlimLSTMError: the file holds no LSTM, or nothing would get smaller; or see
            :func:`slimlstm.weight_files.read_tensors`, :func:`slimlstm.compress_` and :func:`slimlstm.save`. Nothing is
            written then.

    Examples:
        >>> import tempfile, torch, slimlstm
        >>> place = Path(tempfile.mkdtemp())
        >>> torch.save(torch.nn.LSTM(8, 16).state_dict(), place / "lstm.pt")
        >>> compress_file(place / "lstm.pt", slimlstm.Quantize("int8"), place / "small").lstm.parameters_after
        1664
    """
    path = path_of(path, "path", "name a weight file; compress_ takes models")
    folder = path_of(folder, "folder", "name the folder to write")
    check_folder(path, folder)
    tensors, notes = read_weights(path, part)
    source = FileSource(tensors, read_config(path)["sites"] if path.is_dir() else {})
    check_holds_lstm(path, source.sites())
    if storage is not None:
        config = with_storage(config, storage, source.sites())
    check_config(config, source.sites())
    with shown("compressing", progress) as report_progress:
        solution = solve(
            source,
            config,
            calibration=calibration,
            refit_obstacle="a weight file has no model to run batches through",
            progress=report_progress,
        )
    check_smaller(solution)
    solution.notes += notes
    report = apply(source, solution)
    write_folder(folder, source.state, source.entries)
    return report


def check_folder(path: Path, folder: Path) -> None:
    """Refuse to write over the folder that is read, or over the folder of the file that is read.

    Raises:
        SlimLSTMError: ``folder`` is ``path``, or a compressed folder whose weights ``path`` holds.
    """
    if path.is_dir():
        check_not_input(path, folder)
    if _is_weights_file_of(path, folder):
        raise SlimLSTMError(f"{path} is a weight file of {folder}, which would be replaced; name another folder")


def _is_weights_file_of(path: Path, folder: Path) -> bool:
    """Return whether ``path`` holds the weights of a compressed folder."""
    if path.resolve().parent != folder.resolve() or not (folder / CONFIG).exists():
        return False
    try:
        return path.name in weights_files(read_config(folder))
    except SlimLSTMError:
        return False
