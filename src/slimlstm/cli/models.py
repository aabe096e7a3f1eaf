"""Find the language model that an argument names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimlstm.errors import SlimLSTMError

if TYPE_CHECKING:
    from slimlstm.demo.awd_lstm import AWDLSTM

Model = Annotated[
    str, typer.Argument(help="'embedded', the folder of an AWD-LSTM, or the folder of a compressed AWD-LSTM.")
]


def language_model(name: str, instead: str) -> AWDLSTM:
    """Return the AWD-LSTM of a folder, dense or compressed, or the embedded one.

    Args:
        name: ``"embedded"`` or a folder.
        instead: advice for users with another model, for the end of error messages.

    Raises:
        SlimLSTMError: the name is no folder, or the folder holds no AWD-LSTM.
    """
    from slimlstm.demo.awd_lstm import AWDLSTM, config_of
    from slimlstm.folders import read_folder
    from slimlstm.loading import load

    try:
        dense = dense_language_model(name)
    except SlimLSTMError as error:
        raise SlimLSTMError(f"{error}. {instead}") from error
    if dense is not None:
        return dense
    if not Path(name).is_dir():
        what = "a file" if Path(name).is_file() else "no folder"
        raise SlimLSTMError(f"{name} is {what}; this verb takes the folder of an AWD-LSTM, or 'embedded'. {instead}")
    state = read_folder(Path(name))[1]
    try:
        config = config_of(state)
    except SlimLSTMError as error:
        raise SlimLSTMError(f"{name} does not hold an AWD-LSTM: {error}. {instead}") from error
    model = AWDLSTM(config)
    load(name, model)
    return model.float()


def dense_language_model(name: str) -> AWDLSTM | None:
    """Return the embedded AWD-LSTM or the dense one of a folder; None for a file or a compressed folder.

    Raises:
        SlimLSTMError: the folder is not compressed and holds no AWD-LSTM.
    """
    from slimlstm.demo import model as embedded
    from slimlstm.demo.awd_lstm import load_awd_lstm
    from slimlstm.folders import CONFIG

    if name == "embedded":
        return embedded.embedded_model()
    return load_awd_lstm(name) if Path(name).is_dir() and not (Path(name) / CONFIG).exists() else None
