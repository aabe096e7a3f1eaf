"""Time calibration against a plain forward and backward pass over the same tokens of a language model.

    python benchmarks/calibration.py --model ptb --corpus ptb --compress 0.08 \\
        --output results/calibration.json

Both run on one thread, in turn; the ratio of the least processor times counts. The plain pass computes gradients of all
parameters, as a step of training does. ``--compress`` also times the whole compression to that fraction of the matrices'
bytes, on all threads: calibration on ``--tokens``, sensitivity, the choice of rank and bits, and rounding.
"""

import argparse
import time
from pathlib import Path

import torch

import slimlstm as sl
from paper.stored_models import load_language_model, model_folder
from slimlstm.demo.corpora import CORPORA, Vocabulary, read_words
from slimlstm.evaluate import NextTokens, pieces
from slimlstm.files import write_json
from slimlstm.provenance import provenance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True, help="folder of an AWD-LSTM, or name of a stored one")
parser.add_argument("--corpus", choices=CORPORA, required=True)
parser.add_argument("--batches", type=int, default=1, help="of 60 streams and 70 steps")
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--compress", type=float, metavar="FRACTION", help="time compression to this fraction of the bytes")
parser.add_argument("--tokens", type=int, default=60_000, help="training text that compression sees")
parser.add_argument("--output", type=Path, help="file")
arguments = parser.parse_args()

threads = torch.get_num_threads()
torch.set_num_threads(1)
folder = model_folder(arguments.model)
model, vocabulary = load_language_model(folder).eval(), Vocabulary.read(folder / "vocab.txt")
text = vocabulary.encode(read_words(arguments.corpus, "train"))
batches = pieces(text[: 60 * 71 * arguments.batches], streams=60, steps=70)[: arguments.batches]


def train():
    """Run a plain forward and backward pass over all batches."""
    loss = NextTokens()
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss(model, batch).sum().backward()


def seconds(function):
    """Return the processor time of a call."""
    began = time.process_time()
    function()
    return time.process_time() - began


plain, calibrating = [], []
for _ in range(arguments.repeats):
    plain.append(seconds(train))
    calibrating.append(seconds(lambda: sl.calibrate(model, batches, NextTokens())))
result = {
    "model": folder.name,
    "tokens": sum((len(ids) - 1) * ids.shape[1] for _, ids in batches),
    "seconds": {"plain": plain, "calibrate": calibrating},
    "ratio": min(calibrating) / min(plain),
    "provenance": provenance(),
}
if arguments.compress:
    torch.set_num_threads(threads)
    size = 4 * sum(site.shape[0] * site.shape[1] for site in sl.find_sites(model))
    config = sl.LowRank("fisher", bytes=int(arguments.compress * size), storage="auto")
    long = pieces(text[: arguments.tokens], streams=60, steps=70)
    began = time.monotonic(), time.process_time()
    report = sl.compress_(model, config, batches=long, loss=NextTokens(), refit=0)
    result["compression"] = {
        "keep": arguments.compress,
        "tokens": arguments.tokens,
        "threads": threads,
        "seconds": time.monotonic() - began[0],
        "processor_seconds": time.process_time() - began[1],
        "plan": report.plan.to_dict(),
        "notes": report.notes,
    }
    print("compression {seconds:.0f} s, {processor_seconds:.0f} s of processors".format(**result["compression"]))
print(f"plain {min(plain):.2f} s, calibrate {min(calibrating):.2f} s, ratio {result['ratio']:.2f}")
if arguments.output:
    write_json(arguments.output, result)
