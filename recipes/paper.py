"""Results to the paper's Penn Treebank table, its pictures and its claims, with the printed numbers beside ours.

    python recipes/paper.py

Reads what recipes/sweep.py, recipes/norms.py and recipes/language_model.py wrote (of the last, every ``result.json`` as
``METHOD-TARGET-RANK.json``, and that of the dense
model as ``dense.json``); writes the tables and pictures into docs/paper, and docs/reproduction.md. Cells that have not
been run stay empty.
"""

import argparse
import csv
import itertools
import json
import statistics
from pathlib import Path

from slimlstm.analysis import efficiency
from slimlstm.plots import norm_curves, quality_curves

ROOT = Path(__file__).parents[1]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--untuned", type=Path, default=ROOT / "results" / "ptb_untuned")
parser.add_argument("--tuned", type=Path, default=ROOT / "results" / "ptb_fine_tuned")
parser.add_argument("--norms", type=Path, default=ROOT / "results" / "ptb_norms.json")
parser.add_argument("--printed", type=Path, default=ROOT / "results" / "printed.json")
parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "paper", help="folder for tables and pictures")
parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reproduction.md")
arguments = parser.parse_args()

METHODS, TARGETS, RANKS = ("svd", "semi-nmf", "prune"), ("hh", "ih"), (10, 50, 100, 200, 250, 300, 350, 400)
TRAINING = (
    "The dense model has the paper's architecture and sizes, but was trained for eight epochs only, on two CPU cores, by "
    "AdamW with one cycle in bfloat16, with dropout at 0.6 of the published rates"
)


def read(folder):
    """Results by (method, target, rank)."""
    found = {}
    for path in sorted(folder.glob("*-*-*.json")):
        method, target, rank = path.stem.rsplit("-", 2)
        found[method, target, int(rank)] = json.loads(path.read_text(encoding="utf-8"))
    return found


untuned, tuned = read(arguments.untuned), read(arguments.tuned)
dense = json.loads((arguments.untuned / "dense.json").read_text(encoding="utf-8"))
printed = json.loads(arguments.printed.read_text(encoding="utf-8"))["penn_treebank"]
baseline = printed["baseline"]["AWD-LSTM"]
measured = json.loads(arguments.norms.read_text(encoding="utf-8")) if arguments.norms.exists() else None
arguments.pictures.mkdir(parents=True, exist_ok=True)
cells = list(itertools.product(METHODS, TARGETS, RANKS))
missing = [f"{method} {target} {rank}" for method, target, rank in cells if (method, target, rank) not in untuned]
theirs = {(row["method"].replace("pruning", "prune"), row["target"], row["rank"]): row for row in printed["rows"]}


def ours(cell, tuning):
    """Our perplexity and E(r) of a cell, None where it was not run."""
    if cell not in untuned or (tuning and cell not in tuned):
        return None, None
    perplexity = tuned[cell]["perplexity"]["test"] if tuning else untuned[cell]["perplexity"]
    return perplexity, efficiency(
        perplexity, dense["perplexity"], untuned[cell]["parameters"], dense["parameters"], lower=True
    )


HEADER = (
    *("method", "target", "rank", "parameters"),
    *("perplexity", "printed", "E(r)", "printed E(r)", "tuned", "printed tuned", "tuned E(r)", "printed tuned E(r)"),
)


def row_of(cell):
    paper = theirs.get(cell, {})
    (perplexity, share), (perplexity_tuned, share_tuned) = ours(cell, False), ours(cell, True)
    parameters = untuned[cell]["parameters"] if cell in untuned else None
    return (
        *cell,
        parameters and f"{parameters / 1e6:.2f}M",
        *(perplexity and f"{perplexity:.2f}", paper.get("ppl")),
        *(None if share is None else f"{share:.3f}", paper.get("efficiency")),
        *(perplexity_tuned and f"{perplexity_tuned:.2f}", paper.get("ppl_finetuned")),
        *(None if share_tuned is None else f"{share_tuned:.3f}", paper.get("efficiency_finetuned")),
    )


rows = [
    (
        *("dense", "", "", f"{dense['parameters'] / 1e6:.2f}M", f"{dense['perplexity']:.2f}", baseline["ppl"]),
        *("", "", "", baseline["ppl_finetuned"], "", ""),
    ),
    *(row_of(cell) for cell in cells),
]
texts = [["" if entry is None else str(entry) for entry in row] for row in rows]
with (arguments.pictures / "ptb.csv").open("w", newline="", encoding="utf-8") as file:
    csv.writer(file, lineterminator="\n").writerows([HEADER, *texts])
latex = [" & ".join(line) + r" \\" for line in (HEADER, *texts)]
(arguments.pictures / "ptb.tex").write_text(
    "\\begin{tabular}{llr"
    + "r" * (len(HEADER) - 3)
    + "}\n\\hline\n"
    + "\n".join([latex[0], r"\hline", *latex[1:]])
    # A hash or an underscore would need a backslash; there is none.
    + "\n\\hline\n\\end{tabular}\n",
    encoding="utf-8",
)
table = "\n".join("| " + " | ".join(line) + " |" for line in (HEADER, ["---"] * 3 + ["---:"] * (len(HEADER) - 3), *texts))

norms = {}
for row in measured["rows"] if measured else []:
    norms.setdefault((row["method"], row["target"], row["rank"]), []).append(row)


def mean_norm(name, method, target, rank=0):
    """The mean over the layers."""
    return statistics.mean(row[name] for row in norms[method, target, rank])


NORMS = {"l1": "‖W‖₁", "l1_std": "σ(‖W‖₁)", "nuclear": "‖W‖_Nuc"}
titles = {f"{symbol} of {target}": (name, target) for name, symbol in NORMS.items() for target in ("ih", "hh")}
for ending in ("png", "pdf") if measured else ():
    norm_curves(
        {
            title: {
                method: [(rank, mean_norm(name, method, target, rank)) for rank in RANKS if (method, target, rank) in norms]
                for method in METHODS
            }
            for title, (name, target) in titles.items()
        },
        {title: mean_norm(name, "dense", target) for title, (name, target) in titles.items()},
        arguments.pictures / f"norms.{ending}",
    )
for ending in ("png", "pdf"):
    quality_curves(
        {
            target: {
                method: [
                    (rank, untuned[method, target, rank]["perplexity"])
                    for rank in RANKS
                    if (method, target, rank) in untuned
                ]
                for method in METHODS
            }
            for target in TARGETS
        },
        dense["perplexity"],
        arguments.pictures / f"perplexity.{ending}",
        x_label="rank",
        y_label="test perplexity",
    )


def verdict(outcomes):
    """In how many of the comparisons a claim is right, and what that makes of it."""
    if not outcomes:
        return "not measured"
    right = sum(outcomes) / len(outcomes)
    word = "holds" if right >= 0.9 else "does not hold" if right <= 0.1 else "holds in part"
    return f"**{word}** ({sum(outcomes)} of {len(outcomes)} comparisons)"


pairs = [(method, rank) for method, rank in itertools.product(METHODS, RANKS)]
hh_against_ih = [
    untuned[method, "hh", rank]["perplexity"] < untuned[method, "ih", rank]["perplexity"]
    for method, rank in pairs
    if {(method, "hh", rank), (method, "ih", rank)} <= untuned.keys()
]
factors_against_pruning = [
    untuned[method, target, rank]["perplexity"] < untuned["prune", target, rank]["perplexity"]
    for method, target, rank in cells
    if method != "prune" and {(method, target, rank), ("prune", target, rank)} <= untuned.keys()
]
lost = [
    f"{method} {target} {rank}"
    for method, target, rank in cells
    if method != "prune"
    and {(method, target, rank), ("prune", target, rank)} <= untuned.keys()
    and untuned[method, target, rank]["perplexity"] >= untuned["prune", target, rank]["perplexity"]
]
smallest = min(RANKS)
base = dense["perplexity"]
# A dense model that was not trained to the end gains by tuning too, so that only the tuned one is a fair measure.
tuned_dense = arguments.tuned / "dense.json"
tuned_base = json.loads(tuned_dense.read_text(encoding="utf-8"))["perplexity"]["test"] if tuned_dense.exists() else 0.0
tuned_hh = [
    entry["perplexity"]["test"] <= tuned_base
    for cell, entry in tuned.items()
    if tuned_base and cell[1:] == ("hh", smallest)
]
of_spread = of_nuclear = verdict([])
if measured:
    spread = [
        (mean_norm("l1_std", method, target, smallest) < mean_norm("l1_std", "dense", target)) == (method == "prune")
        for method, target in itertools.product(METHODS, TARGETS)
    ]
    nuclear = {target: [row["nuclear"] for row in norms["dense", target, 0]] for target in TARGETS}
    ratios = [ih / hh for ih, hh in zip(nuclear["ih"], nuclear["hh"], strict=True)]
    sigma = "; ".join(
        f"{target}: dense {mean_norm('l1_std', 'dense', target):.3g}, "
        + ", ".join(f"{method} {mean_norm('l1_std', method, target, smallest):.3g}" for method in METHODS)
        for target in TARGETS
    )
    held = {
        target: statistics.mean(
            entry["energy"][str(smallest)] for entry in measured["spectra"] if entry["target"] == target
        )
        for target in TARGETS
    }
    of_spread = f"{verdict(spread)}; {sigma}"
    of_nuclear = (
        f"{verdict([1.5 <= ratio <= 2.5 for ratio in ratios])}; ratios "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}, of their sums {sum(nuclear['ih']) / sum(nuclear['hh']):.2f}; "
        f"rank {smallest} holds of ‖W‖_F² on average {held['hh']:.1%} (hh) and {held['ih']:.1%} (ih)"
    )
claims = [
    ("Compressing W_h costs less than compressing W_i at the same rank.", verdict(hh_against_ih)),
    (
        "Factorisation beats pruning that keeps as many weights.",
        verdict(factors_against_pruning) + (f"; pruning is ahead at {', '.join(lost)}" if lost else ""),
    ),
    (
        f"At low rank σ(‖W‖₁) falls under pruning and rises under factorisation (r = {smallest}, mean over layers).",
        of_spread,
    ),
    (
        "The nuclear norm of W_i is about twice that of W_h (a ratio from 1.5 to 2.5, layer by layer).",
        of_nuclear,
    ),
    (
        f"With fine-tuning, W_h at r = {smallest} costs nothing (no higher a perplexity than the dense model tuned alike).",
        verdict(tuned_hh),
    ),
]
commits = sorted(
    {
        entry["provenance"]["commit"]
        for entry in (dense, *([measured] if measured else []), *untuned.values(), *tuned.values())
    }
)
tuned_cells = (
    f"{len(tuned)} of the printed table's {len(theirs)} cells were fine-tuned: "
    + ", ".join(f"{' '.join(map(str, cell))} ({entry['epochs']} epochs)" for cell, entry in tuned.items())
    if tuned
    else f"None of the printed table's {len(theirs)} fine-tuned cells has been run; their columns are empty"
)
absent = f"; missing: {', '.join(missing)}" if missing else ""
folder = (
    arguments.pictures.relative_to(arguments.page.parent)
    if arguments.pictures.is_relative_to(arguments.page.parent)
    else arguments.pictures
)
of_norms = (
    f"""## Norms

Means over the three layers; σ is the standard deviation of the column sums. The paper prints it without 1/n and root, which
is `l1_spread` in `results/`; the scale of its axes is not known.

![Norms against rank]({folder}/norms.png)"""
    if measured
    else "The norms of the paper's second figure, on which claims 3 and 4 rest, were not measured (`recipes/norms.py`)."
)
numbered = "\n".join(f"{index}. {claim} {found}" for index, (claim, found) in enumerate(claims, 1))
arguments.page.write_text(
    f"""# The paper's language model, reproduced

Winata et al., *On the Effectiveness of Low-Rank Matrix Factorization for LSTM Model Compression* (PACLIC 2019, arXiv
1908.09982), on Penn Treebank. This page is generated by `python recipes/paper.py` from the files in `results/`.

## What was trained, and what was not

- {TRAINING}.
  It has a test perplexity of {base:.2f}; the published AWD-LSTM has 58.8, the paper's {baseline["ppl"]}. So our
  perplexities and the printed ones cannot be compared with each other; the changes from dense to compressed say which
  method, matrix and rank cost more, for this model. Whether they are the same for one that was trained to the end is open.
- Without fine-tuning, {len(cells) - len(missing)} of {len(cells)} cells have been run{absent}.
- {tuned_cells}.
- Not run: WikiText-2, the TT-LSTM baseline, the speed claim (2.13x at r = 10).

## The claims, from our numbers alone

A claim holds if at least nine tenths of the comparisons bear it out, does not hold if at most a tenth does, and holds in
part between.

{numbered}

## Penn Treebank

{table}

E(r) = R(M, M') / R(P, P') where the perplexity rises, R(M, M') / (1 - R(P, P')) where it falls; R is the relative change
against the dense model as it came, P the parameters of the whole model. The paper applies it unevenly: from a dense base of
59.0 and, for SVD without fine-tuning, without dividing by R(P, P'). A matrix whose factors would be no smaller stays dense:
at rank 400 those of 4600 x 400 and 1600 x 400. Also as [CSV]({folder}/ptb.csv) and [LaTeX]({folder}/ptb.tex).

![Perplexity against rank]({folder}/perplexity.png)

{of_norms}

Measured at {", ".join(map(str, commits))}; processor and versions stand in every file.
""",
    encoding="utf-8",
)
