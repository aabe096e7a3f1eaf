"""The command ``slimlstm``."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from slimlstm.bench.timing import bench_layers
from slimlstm.compress import compress_, size
from slimlstm.demo import corpora as data
from slimlstm.demo import model as embedded
from slimlstm.demo import plots
from slimlstm.demo import tour as demo
from slimlstm.demo.awd_lstm import AWDLSTM, config_of, load_awd_lstm
from slimlstm.errors import SlimLSTMError
from slimlstm.evaluate import perplexity
from slimlstm.folders import CONFIG, load, read_config, read_folder
from slimlstm.methods.factorize import SOLVERS, singular_values
from slimlstm.methods.rank import break_even_rank, rank_for_energy
from slimlstm.modules.hosts import find_hosts, find_sites
from slimlstm.modules.lstm import LowRankLSTM
from slimlstm.onnx.calibrate import read_batches
from slimlstm.onnx.compress import compress_onnx
from slimlstm.onnx.export import export_onnx
from slimlstm.pipeline.plan import PRUNE, LowRank, Prune, Quantize, Target, make_plan
from slimlstm.weight_files import compress_file, find_matrices, layers_of, matrix_of, read_tensors

app = typer.Typer(
    help="Makes trained LSTMs small and fast by low-rank factorisation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# Where nobody resizes the window, tables get the width they need.
output = Console(width=None if sys.stdout.isatty() else 160)
messages = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Method = Annotated[str, typer.Option(help=f"{', '.join(SOLVERS)} or {PRUNE}.")]
Rank = Annotated[int | None, typer.Option(help="The same rank at every matrix.")]
Keep = Annotated[float | None, typer.Option(help="The fraction of every matrix's parameters to keep.")]
TargetOption = Annotated[str, typer.Option("--target", help="hh, ih or both.")]
Storage = Annotated[
    str | None,
    typer.Option(help="Keep the weights as int8 or bfloat16, of factors too; without rank and keep, this alone."),
]
_SKETCH = "▁▂▃▄▅▆▇█"


def main() -> None:
    """Runs the command; what cannot be done is said in one line, with exit status 1."""
    try:
        app()
    except (SlimLSTMError, OSError) as error:
        text = " ".join(str(error).split())
        messages.print(f"slimlstm: {text}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


@app.command("demo")
def demo_command(
    plot: Annotated[Path, typer.Option(help="Where to draw the curves (PNG or PDF).")] = Path("slimlstm-demo.png"),
    as_json: Json = False,
) -> None:
    """Compress the embedded language model by every method, and see what that costs and saves."""
    began = time.monotonic()
    plots.check_drawable(plot)
    with _progress("compressing") as progress:
        tour = demo.run(progress)
    draw_tour(tour, plot)
    heading = (
        "An AWD-LSTM language model over WikiText-2, compressed without retraining; perplexity per byte-pair token on "
        "held-out text; parameters and bytes of its LSTMs; speed of the LSTMs against the dense model, batch 1, one thread."
    )
    _show({**tour.to_dict(), "plot": str(plot)}, as_json, heading, tour, tour.summary(), f"The curves are in {plot}.")
    if not as_json:
        messages.print(f"{time.monotonic() - began:.0f} s", style="dim")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A .safetensors, .pt, .pth or .onnx file.")], as_json: Json = False
) -> None:
    """Show the LSTM matrices in a weight file: shapes, break-even ranks, how fast their singular values fall."""
    tensors = read_tensors(file)
    matrices = find_matrices(tensors)
    if not matrices:
        raise SlimLSTMError(f"{file} holds no weights of an LSTM, by names (weight_hh_l0) and shapes ([4H, H])")
    entries: list[dict[str, Any]] = []
    with _progress("singular values") as progress:
        for index, (site, names) in enumerate(matrices.items()):
            progress(site.key, index / len(matrices))
            values = singular_values(matrix_of(names, tensors).float())
            entries.append(
                {
                    "site": site.key,
                    "shape": list(site.shape),
                    "rank": site.rank,
                    "parameters": site.parameters,
                    "break_even_rank": break_even_rank(site.shape),
                    "energy_ranks": {str(energy): rank_for_energy(values, energy) for energy in (0.5, 0.9, 0.99)},
                    "singular_values": [round(value, 6) for value in values.tolist()],
                }
            )
    lstm, total = sum(entry["parameters"] for entry in entries), sum(tensor.numel() for tensor in tensors.values())
    table = Table()
    table.add_column("site", overflow="fold")
    for column in ("shape", "rank", "break-even", "50% energy", "90%", "99%"):
        table.add_column(column, justify="right")
    table.add_column("singular values")
    for entry in entries:
        shape, energies = entry["shape"], entry["energy_ranks"].values()
        table.add_row(
            entry["site"],
            f"{shape[0]} x {shape[1]}",
            "full" if entry["rank"] is None else str(entry["rank"]),
            f"{entry['break_even_rank']:.1f}",
            *map(str, energies),
            _sketch(entry["singular_values"]),
        )
    share = f"{lstm:,} of {total:,} numbers in the file are in these matrices ({lstm / total:.0%})."
    _show({"file": str(file), "sites": entries, "parameters": lstm, "total": total}, as_json, table, share)


@app.command()
def compress(
    file: Annotated[Path, typer.Argument(help="A .safetensors, .pt, .pth or .onnx file.")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="The folder, or of an ONNX file the ONNX file, to write.")],
    method: Annotated[str, typer.Option(help=f"{', '.join(SOLVERS)}, {PRUNE} or, with --batches, activation.")] = "svd",
    rank: Rank = None,
    keep: Keep = None,
    target: TargetOption = "both",
    storage: Storage = None,
    batches: Annotated[
        list[Path] | None,
        typer.Option(help="A .npz file, or several, of an ONNX file's inputs by name, with an axis in front for the runs."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress the LSTMs in a weight file, into a folder for slimlstm.load, or of an ONNX file into another one."""
    config = _config(method, rank, keep, target, storage)
    is_onnx = file.suffix.lower() == folder.suffix.lower() == ".onnx"
    if batches and not is_onnx:
        raise SlimLSTMError("--batches are inputs of an ONNX file that is compressed to another, by -o small.onnx")
    with _progress("compressing") as progress:
        if is_onnx:
            config = replace(config, storage=storage) if isinstance(config, LowRank) else config
            read = [run for path in batches for run in read_batches(path)] if batches else None
            report = compress_onnx(file, config, folder, batches=read, progress=progress)
            use = "ONNX Runtime and others run it as they ran the file before."
        else:
            report = compress_file(file, config, folder, progress, storage)
            use = f"slimlstm.load({str(folder)!r}, model) puts it into the model."
    _show(report.to_dict(), as_json, report, f"Written to {folder}; {use}")


@app.command("bench")
def bench_command(
    file: Annotated[
        str, typer.Argument(help="A .safetensors, .pt, .pth or .onnx file, the folder of an AWD-LSTM, or 'embedded'.")
    ],
    compressed: Annotated[Path | None, typer.Option(help="A folder that slimlstm saved of the same model.")] = None,
    method: Method = "svd",
    rank: Rank = None,
    keep: Keep = None,
    target: TargetOption = "both",
    storage: Storage = None,
    steps: Annotated[int, typer.Option(help="Time steps of a call.")] = 35,
    batch: Annotated[int, typer.Option(help="Sequences of a call.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads that every engine may use.")] = 1,
    as_json: Json = False,
) -> None:
    """Time the LSTM layers of a model, dense in every engine and compressed in this one, side by side."""
    wanted = rank is not None or keep is not None or storage is not None
    if wanted and compressed is not None:
        raise SlimLSTMError("give either --compressed, a folder, or how to compress (--rank, --keep, --storage), not both")
    layers = _layers(file)
    changed = layers if compressed is None else layers_of(*_tensors_and_sites(compressed))
    if wanted:
        changed = copy.deepcopy(layers)
        holder = torch.nn.ModuleList(changed.values())
        config = _config(method, rank, keep, target, storage)
        plan = make_plan(config, find_sites(holder))
        compress_(holder, plan if storage is None else plan.stored_as(storage))
    with _progress("timing") as progress:
        found = bench_layers(layers, changed, steps=steps, batch=batch, threads=threads, progress=progress)
    _show({"file": file, **found.to_dict()}, as_json, found)


def _layers(name: str) -> dict[str, LowRankLSTM]:
    path = Path(name)
    if name == "embedded":
        return layers_of(embedded.embedded_model().state_dict())
    if path.is_dir() and not (path / CONFIG).exists():
        return layers_of(load_awd_lstm(name).state_dict())
    return layers_of(*_tensors_and_sites(path))


def _tensors_and_sites(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return read_tensors(path), read_config(path)["sites"] if path.is_dir() else {}


@app.command("eval")
def eval_command(
    model: Annotated[str, typer.Argument(help="'embedded', the folder of an AWD-LSTM, or one that slimlstm saved.")],
    text: Annotated[str, typer.Option(help="'held-out', 'ptb', 'wikitext-2' or a text file.")] = "held-out",
    split: Annotated[str, typer.Option(help="Of ptb and wikitext-2: train, valid or test.")] = "test",
    vocab: Annotated[
        Path | None,
        typer.Option(help="A vocabulary (one word a line) or SentencePiece .model; by default the model's own."),
    ] = None,
    streams: Annotated[int, typer.Option(help="How many pieces of the text are read side by side.")] = 10,
    as_json: Json = False,
) -> None:
    """Measure the perplexity of an AWD-LSTM language model, dense or compressed."""
    network = _language_model(model)
    tokens, words = _tokens(text, split, _vocabulary(model, vocab))
    if len(tokens) and int(tokens.max()) >= network.config.vocab_size:
        raise SlimLSTMError(
            f"the text has ids up to {int(tokens.max())}, the model {network.config.vocab_size} words; check --vocab"
        )
    with _progress("reading") as progress:
        found = perplexity(network, tokens, streams=streams, progress=lambda fraction: progress(text, fraction))
    parameters = list(network.parameters())
    result = {
        "model": model,
        "text": text,
        "split": split if text in data.CORPORA else None,
        "perplexity": found.perplexity,
        "predictions": found.predictions,
        "perplexity_per_word": math.exp(min(found.loss * len(tokens) / max(words, 1), 700.0)),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "bytes": size([network], find_hosts(network))[1],
    }
    table = Table(show_header=False)
    for key, value in result.items():
        if value is not None:
            table.add_row(
                key.replace("_", " "),
                f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value,
            )
    _show(result, as_json, table)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="'embedded', the folder of an AWD-LSTM, or one that slimlstm saved.")],
    file: Annotated[Path, typer.Option("--output", "-o", help="The ONNX file to write.")],
    as_json: Json = False,
) -> None:
    """Write an AWD-LSTM language model, dense or compressed, as an ONNX file; its states go in and come out."""
    network = _language_model(model)
    lstms: list[Any] = list(network.lstms)
    state = [(torch.zeros(1, 2, lstm.hidden_size), torch.zeros(1, 2, lstm.hidden_size)) for lstm in lstms]
    tokens = torch.randint(network.config.vocab_size, (3, 2))
    names = [f"{kind}{layer}" for layer in range(len(lstms)) for kind in "hc"]
    found = export_onnx(
        network,
        (tokens, state),
        file,
        input_names=["tokens", *names],
        output_names=["logits", *(f"{name}_next" for name in names)],
    )
    table = Table("name", "shape")
    for name, shape in (*found.inputs.items(), *found.outputs.items()):
        table.add_row(name, " x ".join(map(str, shape)))
    text = f"{found.bytes:,} bytes in {file}; {found.engine} is within {found.difference:.1g} of PyTorch at "
    sizes = " and ".join(", ".join(f"{name} = {size}" for name, size in at.items()) for at in found.checked)
    _show({"model": model, "file": str(file), **asdict(found)}, as_json, table, f"{text}{sizes}.")


def draw_tour(tour: demo.Tour, path: Path) -> None:
    """Draws perplexity against the LSTMs' size for every target and method.

    Raises:
        SlimLSTMError: matplotlib is not installed.
    """
    panels = {
        f"{target} compressed": {
            method: [
                (100 * row.parameters / tour.dense.parameters, row.perplexity)
                for row in (tour.row(method, target, rank) for rank in demo.RANKS)
            ]
            for method in demo.METHODS
        }
        for target in demo.TARGETS
    }
    plots.quality_curves(panels, tour.dense.perplexity, path, x_label="LSTM parameters kept (%)", y_label="perplexity")


def _config(
    method: str, rank: int | None, keep: float | None, target: str, storage: str | None
) -> LowRank | Prune | Quantize:
    if storage is not None and (method, rank, keep) == ("svd", None, None):
        return Quantize(storage, cast(Target, target))
    amounts: dict[str, Any] = {"rank": rank, "keep": keep, "target": target}
    return Prune(**amounts) if method == PRUNE else LowRank(method, **amounts)


def _language_model(name: str) -> AWDLSTM:
    if name == "embedded":
        return embedded.embedded_model()
    if (Path(name) / CONFIG).exists():
        model = AWDLSTM(config_of(read_folder(Path(name))[1]))
        load(name, model)
        return model.float()
    return load_awd_lstm(name)


def _vocabulary(model: str, vocab: Path | None) -> Path:
    if vocab is not None:
        return vocab
    beside = Path(model) / "vocab.txt"
    return beside if beside.is_file() else embedded.TOKENIZER


def _tokens(text: str, split: str, vocab: Path) -> tuple[torch.Tensor, int]:
    """The ids of a text, and how many words it has, line ends counted."""
    if text == "held-out":
        content = embedded.held_out_text()
        if vocab == embedded.TOKENIZER:
            return embedded.held_out_tokens(), len(data.words_of(content))
    elif text in data.CORPORA:
        content = data.read_text(text, split)
    elif Path(text).is_file():
        try:
            content = Path(text).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SlimLSTMError(f"{text} is no UTF-8 text: {error}") from error
    else:
        raise SlimLSTMError(f"{text!r} is neither 'held-out', {', '.join(map(repr, data.CORPORA))}, nor a file")
    words = data.words_of(content)
    if vocab.suffix == ".model":
        return embedded.encode(content, vocab), len(words)
    return data.Vocabulary.read(vocab).encode(words), len(words)


def _sketch(values: list[float], width: int = 24) -> str:
    """Singular values as bars, largest first, relative to the largest."""
    picked = [values[index * len(values) // width] for index in range(width)] if len(values) > width else values
    top = max(values[0], 1e-30)
    return "".join(_SKETCH[min(int(len(_SKETCH) * value / top), len(_SKETCH) - 1)] for value in picked)


def _show(result: dict[str, Any], as_json: bool, *parts: RenderableType) -> None:
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    for part in parts:
        output.print(part, highlight=False, markup=False)


@contextmanager
def _progress(title: str) -> Generator[Callable[[str, float], None]]:
    """A progress bar on standard error; it is given what is being done and the fraction that is done."""
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=messages, transient=True, disable=not messages.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda label, fraction: bar.update(task, description=label, completed=fraction)


if __name__ == "__main__":
    main()
