"""Parts about language models: the demo, methods at equal bytes, rank and bits together, and the paper's cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from paper import plots
from paper.methods import PAPER, TOGETHER
from paper.page.language import OPTIMIZERS
from paper.page.results import Cell, Result, ResultFolder, marked
from paper.page.sources import DENSE
from paper.page.tables import counted, markdown
from slimlstm.pipeline.sensitivity import Sensitivity

DEMO_RANK = 50
"""The rank of the demo's rows in the table."""
SHOWN = 0.08
"""The fraction of the bytes that README.md shows of the frontier."""
QUALITY = {"Penn Treebank": "quality_ptb", "embedded": "quality_embedded"}
FRONTIER = {"Penn Treebank": "frontier_ptb", "embedded": "frontier_embedded"}
"""Folders of results by the names of models."""
METHODS = ("prune", "svd", "svd-global", "activation", "fisher", "svd-int8", "fisher-int8")
INT8 = "fisher-int8"
FRONTIER_HEADER = [
    "model, matrices' bytes left",
    "smaller",
    "rise in int8",
    "rise with rank and bits together",
    "ratio",
    "perplexity",
]
FRONTIER_PICTURE = "![Rise of the loss against bytes, for int8 and for rank and bits together](docs/frontier.png)"
RISE = "rise of the loss (nats per token)"


def demo(tour: Result) -> str:
    """Return the demo's dense model and its variants of one rank, and how they were measured.

    Args:
        tour: the content of ``docs/demo.json``.
    """
    made_with = tour["provenance"]
    rows = [
        [
            _variant(row),
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['bytes'] / 1e6:.1f} MB",
            marked(f"{row['perplexity']:.1f}", tour),
            f"{round(row['change'], 3) + 0.0:+.1%}",
            f"{row['latency_ratio']:.1f}x",
        ]
        for row in tour["rows"]
        if row["rank"] in (None, DEMO_RANK)
    ]
    return "\n\n".join(
        [
            markdown([f"rank {DEMO_RANK}", "LSTM parameters", "stored", "perplexity", "change", "speed"], rows),
            tour["summary"],
            "*Perplexity* is per byte-pair token of held-out WikiText-2 text: the first part is measured, the rest "
            "calibrates. `slimlstm eval embedded` measures on all of it. *Speed* is how many times faster the LSTMs read "
            "35 tokens than the dense model's LSTMs in PyTorch, at batch 1 on one thread, side by side on "
            f"{made_with['processor']}. From [`docs/demo.json`](docs/demo.json), with PyTorch {made_with['torch']}. "
            "[Speed of one layer](#speed-of-one-layer) compares with the fastest engine for each size.",
        ]
    )


def _variant(row: Result) -> str:
    """Return the method, the storage unless it is float32, and the target."""
    storage = row.get("storage", "float32")
    words = [row["method"]] if row["method"] != "dense" or storage == "float32" else []
    words += [storage] if storage != "float32" else []
    return " ".join(words) + (f", {row['target']}" if row["target"] else "")


def perplexities(results: ResultFolder) -> str:
    """Return the test perplexities of the paper's cells on Penn Treebank, without training and tuned."""
    found = _by_name(results, "ptb_untuned").values()
    untuned: dict[Cell, Result] = {(one["method"], one["target"], one["rank"]): one for one in found}
    tuned = _by_name(results, "ptb_fine_tuned")
    columns = [(method, target) for target in ("hh", "ih") for method in PAPER]
    rows = [row for rank in sorted({rank for _, _, rank in untuned if rank}) for row in _of_rank(rank, untuned, tuned)]
    has_tuned = any("tuned" in row[0] for row in rows)
    of_untuned = "Rows without *tuned* had" if has_tuned else "The models had"
    of_tuned = _of_tuned(tuned["dense"]) if has_tuned else ""
    return "\n\n".join(
        [
            markdown(["rank", *(f"{method}, {target}" for method, target in columns)], rows),
            f"The numbers are test perplexities; the dense model has {untuned[DENSE]['perplexity']:.2f}. "
            f"{of_untuned} no training after compression ([`results/ptb_untuned`](results/ptb_untuned)). "
            f"{of_tuned}[The reproduction](docs/reproduction.md) says how the model was trained; compare columns with each "
            "other, not with published figures.",
        ]
    )


def _of_tuned(dense: Result) -> str:
    """Return how the tuned models were trained, of which one is dense."""
    how = f"{counted(dense['epochs'], 'epoch')} of {OPTIMIZERS[dense['config']['optimizer']]}"
    return (
        f"*Tuned* rows, from [`results/ptb_fine_tuned`](results/ptb_fine_tuned), have {how}, which brings the dense model "
        f"to {dense['perplexity']['test']:.2f}. "
    )


def _of_rank(rank: int, untuned: dict[Cell, Result], tuned: dict[str, Result]) -> Iterable[list[str]]:
    """Yield the row of a rank without training, and the tuned row, where all their cells were run."""
    columns = [(method, target) for target in ("hh", "ih") for method in PAPER]
    if all((*column, rank) in untuned for column in columns):
        found = [untuned[method, target, rank] for method, target in columns]
        yield [str(rank), *(marked(f"{one['perplexity']:.1f}", one) for one in found)]
    names = [f"{method}-{target}-{rank:03d}" for method, target in columns]
    if tuned.keys() >= {"dense", *names}:
        found = [tuned[name] for name in names]
        yield [f"{rank}, tuned", *(marked(f"{one['perplexity']['test']:.1f}", one) for one in found)]


def frontier(results: ResultFolder) -> str:
    """Return int8 beside rank and bits together at one size of each model, and their picture."""
    rows = [row for keep, row in _frontier_rows(results) if keep == SHOWN]
    return "\n\n".join(
        [
            markdown(FRONTIER_HEADER, rows),
            "Rises of the test loss are in nats per token; *int8* are Fisher factors. *Perplexity*: its change with "
            f"rank and bits. {_dense(results, FRONTIER)}",
            FRONTIER_PICTURE,
        ]
    )


def _frontier_rows(results: ResultFolder) -> Iterable[tuple[float, list[str]]]:
    """Yield the size, and the row with the rises of int8 and of rank and bits together."""
    for name, folder in FRONTIER.items():
        runs = {(run["keep"], run["method"]): run for run in _by_name(results, folder, "*-*-*").values()}
        for keep in sorted({keep for keep, method in runs if method == TOGETHER}, reverse=True):
            old, new = runs[keep, INT8], runs[keep, TOGETHER]
            yield (
                keep,
                [
                    f"{name}, {keep:.0%}",
                    f"{new['matrix_bytes'][0] / new['matrix_bytes'][1]:.1f}x",
                    marked(f"{old['rise']:+.4f}", old),
                    marked(f"{new['rise']:+.4f}", new),
                    f"{new['rise'] / old['rise']:.2f}",
                    f"{math.exp(new['rise']) - 1:+.1%}",
                ],
            )


def quality(results: ResultFolder) -> str:
    """Return the rise of the loss by every method at equal bytes, and by rank and bits together."""
    runs = {name: list(_by_name(results, folder, "*-*").values()) for name, folder in QUALITY.items()}
    rows = [
        [f"{name}, {keep:.0%}", *(_rise(own, keep, method) for method in METHODS)]
        for name, own in runs.items()
        for keep in sorted({run["keep"] for run in own}, reverse=True)
    ]
    ptb = runs["Penn Treebank"]
    return "\n\n".join(
        [
            markdown(["model, matrices' bytes left", *METHODS], rows),
            "The numbers are the rise of the test text's log-perplexity when all hh and ih matrices are compressed to that "
            "fraction of their bytes, without training. In brackets, the rise is divided by the rise with SVD at that "
            "size. Pruning keeps as many weights as the factors in float32 hold, and saves no bytes. Calibration saw "
            f"{ptb[0]['config']['calibration_tokens']:,} tokens of training text. The predicted and the measured rise put "
            f"the {len(ptb)} plans of the first model in nearly the same order (Spearman's "
            f"ρ = {_correlation(ptb):.3f}, [picture](docs/prediction.png)), but the rise is "
            f"{statistics.median(run['rise'] / run['predicted_rise'] for run in ptb):.1f} times the predicted one (median; "
            "[why](docs/decisions/0007-calibration.md)). "
            f"{_dense(results, QUALITY, has_tokens=True)} From "
            "[`results/quality_ptb`](results/quality_ptb) and [`results/quality_embedded`](results/quality_embedded).",
            "### Rank and bits together",
            FRONTIER_PICTURE,
            markdown(FRONTIER_HEADER, [row for _, row in _frontier_rows(results)]),
            "The numbers are the rise of the whole test text's log-perplexity at the same bytes: by the Fisher method in "
            'int8, and by `LowRank("fisher", bytes=..., storage="auto")`, which chooses rank and bits of every matrix '
            "together. *Ratio* divides the second rise by the first. *Perplexity* is its change with rank and bits "
            "together. Factors are fitted once here, and the embedded model reads its whole test text, so *int8* differs "
            "a little from *fisher-int8* above. From [`results/frontier_ptb`](results/frontier_ptb) and "
            "[`results/frontier_embedded`](results/frontier_embedded).",
            f"{_calibration(results)}A byte is worth more in some matrices than in others:",
            "![Predicted rise of the loss against bytes of each matrix](docs/sensitivity.png)",
        ]
    )


def _dense(results: ResultFolder, folders: Mapping[str, str], has_tokens: bool = False) -> str:
    """Return a sentence with the perplexity of every dense model, by which a reader tells trainings and texts apart."""
    runs = {name: results.read(results.folder / folder / "dense.json") for name, folder in folders.items()}
    texts = {name: f" ({run['predictions']:,} tokens)" * has_tokens for name, run in runs.items()}
    told = ", ".join(f"{name} {math.exp(run['loss']):.1f}{texts[name]}" for name, run in runs.items())
    return f"Dense test perplexities: {told}."


def _rise(runs: Sequence[Result], keep: float, method: str) -> str:
    """Return a method's rise of the loss, and in brackets its ratio to SVD's; a dash if it was not run."""
    found = {run["method"]: run for run in runs if run["keep"] == keep}
    if method not in found:
        return "-"
    one, svd = found[method], found["svd"]
    return marked(f"{one['rise']:+.4f} ({one['rise'] / svd['rise']:.2f})", one, svd)


def _correlation(runs: Sequence[Result]) -> float:
    """Return Spearman's rank correlation of predicted and measured rises."""
    predicted, measured = (_order([run[key] for run in runs]) for key in ("predicted_rise", "rise"))
    return statistics.correlation(predicted, measured)


def _order(values: Sequence[float]) -> list[int]:
    return [sorted(values).index(value) for value in values]


def _calibration(results: ResultFolder) -> str:
    timed = results.read(results.folder / "calibration.json")
    whole = timed["compression"]
    return (
        f"Calibration takes {timed['ratio']:.2f} times as long as a plain forward and backward pass over the same text. "
        f"Everything from calibration on {whole['tokens']:,} tokens of Penn Treebank to rounding takes "
        f"{whole['processor_seconds']:.0f} s of processor time ([`results/calibration.json`](results/calibration.json)). "
    )


def finetuned(results: ResultFolder) -> list[str]:
    """Return the table of ten minutes of ``finetune``, and its text; nothing where they were not run."""
    runs = _by_name(results, "ptb_tuned")
    if not runs:
        return []
    rows = [
        [name, f"{run['config']['lr']:g}", *(f"{run['perplexity'][when]:.1f}" for when in ("before", "after"))]
        for name, run in sorted(runs.items())
    ]
    first = next(iter(runs.values()))
    return [
        markdown(["ten minutes of `finetune`", "learning rate", "perplexity before", "after"], rows),
        "The Penn Treebank model with a quarter of its recurrent weights learns from the dense model "
        f"({first['perplexity']['dense']:.1f}) in bfloat16 on {counted(first['provenance']['threads'], 'thread')}. From "
        "[`results/ptb_tuned`](results/ptb_tuned).",
    ]


def draw(results: ResultFolder, folder: Path) -> None:
    """Draw the predicted beside the measured rises, the frontier and the sensitivities into a folder."""
    points: dict[str, list[tuple[float, float]]] = {}
    for run in sorted(
        _by_name(results, QUALITY["Penn Treebank"], "*-*").values(), key=lambda run: METHODS.index(run["method"])
    ):
        points.setdefault(run["method"], []).append((run["predicted_rise"], run["rise"]))
    plots.predictions(points, folder / "prediction.png")
    panels = {
        name: {
            line: [
                (100 * run["matrix_bytes"][1] / run["matrix_bytes"][0], run["rise"])
                for run in _by_name(results, own, "*-*-*").values()
                if run["method"] == method
            ]
            for method, line in {INT8: "fisher, int8", TOGETHER: "rank and bits together"}.items()
        }
        for name, own in FRONTIER.items()
    }
    plots.rises(panels, folder / "frontier.png", x_label="bytes left of the matrices (%)", y_label=RISE)
    panels = {
        name: {
            site.keys[0].removesuffix("_l0").replace("lstms.", "layer ").replace(".weight_", ", "): [
                (option.bytes / 1e3, option.loss) for option in site.options
            ]
            for site in Sensitivity.load(results.folder / own / "sensitivity.json").sites
        }
        for name, own in FRONTIER.items()
    }
    plots.rises(panels, folder / "sensitivity.png", x_label="bytes of the matrix (kB)", y_label=f"predicted {RISE}")


def _by_name(results: ResultFolder, folder: str, pattern: str = "*") -> dict[str, Result]:
    """Return the results of a folder whose names fit the pattern, in their order."""
    return {path.stem: results.read(path) for path in sorted((results.folder / folder).glob(f"{pattern}.json"))}
