"""Find the language model that an argument names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slimlstm.demo.awd_lstm import AWDLSTM

Model = Annotated[
    str, typer.Argument(help="'embedded', the folder of an AWD-LSTM, or the folder of a compressed AWD-LSTM.")
]


def language_model(name: str) -> AWDLSTM:
    """Return the AWD-LSTM of a folder, dense or compressed, or the embedded one.

    Raises:
        SlimLSTMError: the folder holds no AWD-LSTM.
    """
    from slimlstm.demo import model as embedded
    from slimlstm.demo.awd_lstm import AWDLSTM, config_of, load_awd_lstm
    from slimlstm.folders import CONFIG, read_folder
    from slimlstm.loading import load

    if name == "embedded":
        return embedded.embedded_model()
    if (Path(name) / CONFIG).exists():
        model = AWDLSTM(config_of(read_folder(Path(name))[1]))
        load(name, model)
        return model.float()
    return load_awd_lstm(name)
