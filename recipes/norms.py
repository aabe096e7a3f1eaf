"""Measure norms and spectra of the matrices of a trained AWD-LSTM or ELMo, dense and after every method and rank.

    python recipes/norms.py --model ptb --output results/ptb_norms.json
    python recipes/norms.py --model runs/elmo --ranks 10 20 30 50 100 --output results/elmo_norms.json

A matrix whose factors would be no smaller stays dense, as in ``compress_``. If the output exists, nothing is done.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.progress import track

from paper.analysis import energy, norms
from paper.elmo_files import load_bilm
from paper.methods import PAPER
from paper.runs import exit_if_done
from paper.stored_models import load_language_model, model_folder
from slimlstm.files import write_text
from slimlstm.methods import METHODS, MatrixProblem, nonzeros_at_rank, singular_values
from slimlstm.modules.hosts import find_hosts
from slimlstm.provenance import provenance

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--model", type=model_folder, required=True, help="folder of an AWD-LSTM or ELMo, or name of a stored one"
)
parser.add_argument("--output", type=Path, required=True, help="JSON file")
parser.add_argument("--ranks", nargs="+", type=int, default=[10, 50, 100, 200, 250, 300, 350, 400])
arguments = parser.parse_args()
exit_if_done(arguments.output)


def approximations(matrix, rank):
    """Return every method's approximation at a rank."""
    nonzeros = nonzeros_at_rank(tuple(matrix.shape), rank)
    if nonzeros >= matrix.numel():
        return dict.fromkeys(PAPER, matrix)
    problem = MatrixProblem(matrix)
    found = {name: METHODS[name].solve(problem, nonzeros if METHODS[name].makes_mask else rank, None) for name in PAPER}
    return {
        name: matrix * one if METHODS[name].makes_mask else one.u.double() @ one.v.double() for name, one in found.items()
    }


rows, spectra = [], []
model = load_bilm(arguments.model) if list(arguments.model.glob("*options.json")) else load_language_model(arguments.model)
# An ELMo's forward layers come before its backward ones.
matrices = [
    (site.target, layer, host.matrix(site.name)) for layer, host in enumerate(find_hosts(model)) for site in host.sites()
]
for target, layer, matrix in track(matrices, "norms"):
    values = singular_values(matrix)
    held = energy(values)
    spectra.append(
        {
            "target": target,
            "layer": layer,
            "shape": list(matrix.shape),
            "singular_values": [float(f"{value:.5g}") for value in values.tolist()],
            "energy": {rank: float(held[min(rank, len(held)) - 1]) for rank in arguments.ranks},
        }
    )
    rows.append({"method": "dense", "target": target, "layer": layer, "rank": 0, **asdict(norms(matrix))})
    for rank in arguments.ranks:
        for method, found in approximations(matrix, rank).items():
            rows.append({"method": method, "target": target, "layer": layer, "rank": rank, **asdict(norms(found))})
result = {"rows": rows, "spectra": spectra, "config": {"model": arguments.model.name}, "provenance": provenance()}
write_text(arguments.output, json.dumps(result) + "\n")
