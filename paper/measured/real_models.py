"""Parts about trained models of others: what int8 and a search keep of their quality, and other methods at equal bytes."""

from __future__ import annotations

from collections.abc import Sequence

from paper.methods import TOGETHER
from paper.page.results import Result, ResultFolder
from paper.page.tables import markdown

SMALLEST, LIMIT = "smallest within 1%", 0.99
"""The variant that the search found, and the quality that it has to keep."""
METHODS = ("svd-int8", "fisher-int8", "dense-int4", TOGETHER)


def headline(results: ResultFolder) -> str:
    """Return the sentence at the top of README.md."""
    rows = [_int8(model) for model in _models(results)]
    speeds, qualities = [row["faster"] for row in rows], [row["quality"] for row in rows]
    return (
        f"Make a trained LSTM four times smaller and the whole model up to {max(speeds):.1f} times faster on CPUs, without "
        f"training it again. On five real models, int8 keeps {min(qualities):.1%} to {max(qualities):.1%} of the quality "
        "by each model's own measure. One call searches for the smallest model that loses at most 1%."
    )


def models(results: ResultFolder) -> str:
    """Return every model's int8 variant beside the smallest one within the limit."""
    rows = [
        [
            f"{model['model']} ({model['measure']})",
            f"{_int8(model)['bytes'][0] / 1e6:.2f} MB",
            *(text for one in (_int8(model), _variant(model, SMALLEST)) for text in (_kept(one), *_quality_and_speed(one))),
        ]
        for model in _models(results)
    ]
    header = ["model (measure)", "dense LSTM", "int8 bytes", "quality", "speed", "within 1% bytes", "quality", "speed"]
    return "\n\n".join(
        [
            markdown(header, rows),
            "*Bytes* are the share of the LSTMs' bytes left; *within 1%* is the smallest model that `sl.find_smallest` "
            "found. *1 - rise of the loss*: 99.9% means 0.001 nats more for each token. *Speed* compares whole models. "
            "DTLN runs in ONNX Runtime. A model that does much beside its LSTMs, such as Silero VAD, becomes smaller but "
            "hardly faster.",
        ]
    )


def variants(results: ResultFolder) -> str:
    """Return every variant of every model."""
    rows = [
        [model["model"], row["variant"], f"{row['kept']:.1%}", *_quality_and_speed(row)]
        for model in _models(results)
        for row in model["rows"]
    ]
    return "\n\n".join(
        [
            markdown(["model", "variant", "bytes left", "quality", "speed"], rows, left=2),
            "*Quality* is each model's own measure, on data that calibration did not see. *Speed* is how many times faster "
            "the whole model is than the dense one, timed side by side. From [`results/real_models`](results/real_models), "
            "made by the programs in `examples/real`.",
        ]
    )


def smallest(results: ResultFolder) -> str:
    """Return what each search found, beside the smallest configuration by hand that meets the same limit."""
    header = ["model (measure)", "found", "left", "quality", "evaluations", "processor time", "smallest by hand"]
    return "\n\n".join(
        [
            markdown(header, [_smallest(model) for model in _models(results)]),
            "*Found* and *left* count the bytes of the recurrent matrices. The search measured on one part of the data. "
            "The quality was measured on another part, which neither the search nor the calibration saw. The processor "
            "time includes the calibration. *Smallest by hand* is the smallest configuration that the same program names "
            "itself and that keeps 99% of the quality on the same data. From [`results/real_models`](results/real_models).",
        ]
    )


def _smallest(model: Result) -> list[str]:
    found, search = _variant(model, SMALLEST), model["search"]
    by_hand = [
        row
        for row in model["rows"]
        if row["quality"] >= LIMIT and row["variant"] != SMALLEST and "PyTorch" not in row["variant"]
    ]
    best = min(by_hand, key=lambda row: row["bytes"][1], default=None)
    return [
        f"{model['model']} ({model['measure']})",
        f"{found['bytes'][1] / 1e3:,.0f} kB",
        f"{found['kept']:.1%}",
        f"{found['quality']:.4f}",
        " + ".join(str(one["evaluations"]) for one in search.get("networks", [search])),
        f"{search['processor_seconds']:.0f} s",
        "-" if best is None else f"{best['bytes'][1] / 1e3:,.0f} kB ({best['variant']})",
    ]


def registry(results: ResultFolder) -> str:
    """Return how far the predictions of models from the package index move, by method and size."""
    rows = [
        [f"{path.stem}, {keep:.0%}", *(_difference(found, keep, method) for method in METHODS)]
        for path in sorted((results.folder / "registry_models").glob("*.json"))
        for found in [results.read(path)["rows"]]
        for keep in sorted({row["keep"] for row in found if row["method"] == TOGETHER}, reverse=True)
    ]
    return "\n\n".join(
        [
            markdown(["model, matrices' bytes left", *METHODS], rows),
            "The numbers say how far predictions are from the dense model's, on data that calibration did not see: for "
            "resemblyzer, the mean cosine distance of embeddings; for g2p-id, the fraction of words that are pronounced "
            "differently; for the other models, the mean difference of probabilities. *dense-int4* keeps all matrices "
            "whole, in 4 bits, rounded with feedback. From [`results/registry_models`](results/registry_models).",
        ]
    )


def _difference(rows: Sequence[Result], keep: float, method: str) -> str:
    return f"{next(row['difference'] for row in rows if (row['keep'], row['method']) == (keep, method)):.4f}"


def _models(results: ResultFolder) -> list[Result]:
    return [results.read(path) for path in sorted((results.folder / "real_models").glob("*.json"))]


def _variant(model: Result, name: str) -> Result:
    return next(row for row in model["rows"] if row["variant"] == name)


def _int8(model: Result) -> Result:
    return _variant(model, "int8")


def _kept(row: Result) -> str:
    return f"{row['kept']:.0%}"


def _quality_and_speed(row: Result) -> tuple[str, str]:
    return f"{row['quality']:.1%}", f"{row['faster']:.1f}x"
