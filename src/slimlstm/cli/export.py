"""``slimlstm export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from slimlstm.cli.models import Model, language_model
from slimlstm.cli.options import Force, Form, Json
from slimlstm.cli.output import show
from slimlstm.errors import SlimLSTMError
from slimlstm.files import check_file_name

_INSTEAD = "For a model of yours, call slimlstm.export_onnx(model, inputs, 'small.onnx') in Python"


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    form: Form = "auto",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an AWD-LSTM language model as an ONNX file.

    The states are inputs and outputs of the file, so that a stream can be continued.
    """
    import torch

    from slimlstm.onnx.export import export_onnx
    from slimlstm.tables import new_table

    check_file_name(output)
    if output.is_file() and not force:
        raise SlimLSTMError(f"{output} exists; add --force to replace it, or name another file")
    network = language_model(model, _INSTEAD)
    lstms: list[Any] = list(network.lstms)
    states = [(torch.zeros(1, 2, lstm.hidden_size), torch.zeros(1, 2, lstm.hidden_size)) for lstm in lstms]
    tokens = torch.randint(network.config.vocab_size, (3, 2))
    names = [f"{kind}{layer}" for layer in range(len(lstms)) for kind in "hc"]
    found = export_onnx(
        network,
        (tokens, states),
        output,
        input_names=["tokens", *names],
        output_names=["logits", *(f"{name}_next" for name in names)],
        form=form,
    )
    table = new_table(["name", "shape"])
    for name, shape in (*found.inputs.items(), *found.outputs.items()):
        table.add_row(name, " x ".join(map(str, shape)))
    sizes = " and ".join(", ".join(f"{name} = {size}" for name, size in at.items()) for at in found.checked)
    text = (
        f"{found.bytes:,} bytes in {output}. {found.engine} differs from PyTorch by at most {found.difference:.1g}, "
        f"relative, at {sizes}."
    )
    forms = [f"layer {number}, {form}" for number, form in enumerate(found.forms)]
    show({"model": model, "file": str(output), **asdict(found)}, as_json, table, text, *forms)
