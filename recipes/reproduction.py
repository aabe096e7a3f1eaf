"""Results to the paper's tables, its pictures and its claims, with the printed numbers beside ours.

    python recipes/reproduction.py

Reads from the folder of results, for each corpus C of ``ptb`` and ``wikitext2``, what is there of

    C_untuned/      recipes/sweep.py
    C_fine_tuned/   recipes/sweep.py --tune
    C_controls/     recipes/language_model.py: the ``result.json`` of each config of a control, as CONFIG.json
    C_trained.json  recipes/language_model.py: the ``result.json`` of the dense model
    C_curve/        recipes/language_model.py: ``result.json`` and ``log.jsonl`` of a training from the start
    C_norms.json    recipes/norms.py
    C_speed.json    recipes/speed.py

and for each task T of ``sst5``, ``snli`` and ``squad``

    task_T/         recipes/tasks.py
    elmo_norms.json, elmo_trained.json  recipes/norms.py and recipes/elmo.py (its ``result.json``), of the ELMo inside

and writes tables and pictures into docs/paper, where recipes/heatmaps.py puts its own, and docs/reproduction.md. What has
not been run stays empty, and is said to be missing.
"""

import argparse
import csv
import itertools
import json
import math
import statistics
from pathlib import Path

from paper.analysis import efficiency
from paper.plots import norm_curves, spectra
from slimlstm.demo.plots import quality_curves

ROOT = Path(__file__).parents[1]
DRAWN = ROOT / "docs" / "paper"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder")
parser.add_argument("--printed", type=Path, default=ROOT / "results" / "printed.json")
parser.add_argument("--pictures", type=Path, default=DRAWN, help="folder for tables and pictures")
parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reproduction.md")
arguments = parser.parse_args()
arguments.pictures.mkdir(parents=True, exist_ok=True)
printed = json.loads(arguments.printed.read_text(encoding="utf-8"))
inside = arguments.pictures.is_relative_to(arguments.page.parent)
folder = arguments.pictures.relative_to(arguments.page.parent) if inside else arguments.pictures

# By the name of their files: what they are called, their key among the printed tables, the published AWD-LSTM's perplexity.
CORPORA = {"ptb": ("Penn Treebank", "penn_treebank", 58.8), "wikitext2": ("WikiText-2", "wikitext2", 65.6)}
METHODS, BEYOND, TARGETS = ("svd", "semi-nmf", "prune"), ("activation", "fisher"), ("hh", "ih")
RANKS = (10, 50, 100, 200, 250, 300, 350, 400)
CELLS = list(itertools.product(METHODS, TARGETS, RANKS))
SMALLEST = min(RANKS)
NORMS = {"l1": "‖W‖₁", "l1_std": "σ(‖W‖₁)", "nuclear": "‖W‖_Nuc"}
HEADER = (
    *("method", "target", "rank", "parameters"),
    *("perplexity", "printed", "E(r)", "printed E(r)", "tuned", "printed tuned", "tuned E(r)", "printed tuned E(r)"),
)
# What a control is, its file, and its row among the printed baselines.
CONTROLS = (
    ("dense", "untuned/dense", "AWD-LSTM"),
    ("hh as SVD factors of rank 10", "untuned/svd-hh-010", ""),
    ("hh as SVD factors of rank 10, fine-tuned", "fine_tuned/svd-hh-010", ""),
    ("int8, this library", "untuned/int8", ""),
    ("int8, PyTorch's dynamic quantisation", "untuned/pytorch-int8", ""),
    ("a smaller dense AWD-LSTM", "controls/ptb-13m", ""),
    ("TT-LSTM", "controls/ptb-tensor-train", "TT-LSTM"),
)
# By their key: what they are called, the task model, and how the paper's is scored.
TASKS = {
    "sst5": ("SST-5", "BCN", "accuracy"),
    "snli": ("SNLI", "ESIM", "accuracy"),
    "squad": ("SQuAD v1.1", "BiDAF", "f1"),
}
OPTIMIZERS = {"ntasgd": "SGD that turns into averaged SGD", "asgd": "averaged SGD", "adamw": "AdamW with one cycle"}
# How the model was made whose result.json is not there.
TRAINING = {
    "ptb": "has the paper's architecture and sizes, but was trained for eight epochs only, on two CPU cores, by AdamW with "
    "one cycle in bfloat16, with dropout at 0.6 of the published rates"
}


def load(name):
    """A result, or None where there is none."""
    path = arguments.results / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def load_log(name):
    """The epochs of a training, none where there is no log."""
    path = arguments.results / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def load_cells(name):
    """Results by (method, target, rank)."""
    found = {}
    for path in sorted((arguments.results / name).glob("*-*-*.json")):
        method, target, rank = path.stem.rsplit("-", 2)
        found[method, target, int(rank)] = json.loads(path.read_text(encoding="utf-8"))
    return found


def on_test(result):
    perplexity = result["perplexity"]
    return perplexity["test"] if isinstance(perplexity, dict) else perplexity


def markdown(header, rows, left=1):
    """A table whose first ``left`` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    texts = [["" if entry is None else str(entry) for entry in row] for row in (header, rule, *rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in texts)


def write_table(name, header, rows, left):
    """As CSV and LaTeX."""
    texts = [["" if entry is None else str(entry) for entry in row] for row in (header, *rows)]
    with (arguments.pictures / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(texts)
    # A hash or an underscore would need a backslash; there is none.
    first, *lines = (" & ".join(line) + r" \\" for line in texts)
    begin = "\\begin{tabular}{" + "l" * left + "r" * (len(header) - left) + "}"
    text = "\n".join([begin, r"\hline", first, r"\hline", *lines, r"\hline", r"\end{tabular}", ""])
    (arguments.pictures / f"{name}.tex").write_text(text, encoding="utf-8")


def picture(draw, name, *data, **options):
    for ending in ("png", "pdf"):
        draw(*data, arguments.pictures / f"{name}.{ending}", **options)


def share(number, form="{:.3f}"):
    return None if number is None else form.format(number)


def millions(count):
    return f"{count / 1e6:.2f}M"


def counted(count, noun):
    return f"{count} {noun}" + ("" if count == 1 else "s")


def verdict(outcomes):
    """In how many of the comparisons a claim is right, and what that makes of it."""
    if not outcomes:
        return "not measured"
    right = sum(outcomes) / len(outcomes)
    word = "holds" if right >= 0.9 else "does not hold" if right <= 0.1 else "holds in part"
    return f"**{word}** ({sum(outcomes)} of {counted(len(outcomes), 'comparison')})"


def told_of(found):
    """What a training was, from its result.json."""
    config, sizes = found["config"], ""
    if "sizes" in found:
        sizes = " (embedding {embedding_size}, hidden {hidden_size}; the paper's: 400, 1150)".format(**found["sizes"])
    return (
        f"has {millions(found['parameters'])} parameters{sizes} and was trained on {config['corpus'] or config['text']} "
        f"for {counted(found['epochs'], 'epoch')} by {OPTIMIZERS[config['optimizer']]} in {config['dtype']}, with dropout "
        f"at {config['dropout']:g} of the published rates, in {found['seconds'] / 60:.0f} minutes on {config['device']} "
        f"({found['provenance']['processor']})"
    )


class Corpus:
    """What was measured on one corpus, and what the paper printed of it."""

    def __init__(self, key):
        self.key = key
        self.name, printed_key, self.published = CORPORA[key]
        self.paper = printed[printed_key]
        self.printed = {(r["method"].replace("pruning", "prune"), r["target"], r["rank"]): r for r in self.paper["rows"]}
        self.untuned, self.tuned = load_cells(f"{key}_untuned"), load_cells(f"{key}_fine_tuned")
        self.dense, self.tuned_dense = load(f"{key}_untuned/dense"), load(f"{key}_fine_tuned/dense")
        self.trained, self.speed = load(f"{key}_trained"), load(f"{key}_speed")
        self.from_start, self.log = load(f"{key}_curve/result"), load_log(f"{key}_curve/log")
        beyond = list(itertools.product(BEYOND, TARGETS, RANKS))
        self.cells = [cell for cell in CELLS + beyond if cell in self.untuned or cell in self.printed]

    def perplexity(self, cell):
        return self.untuned[cell]["perplexity"]

    def efficiency(self, cell, result):
        """E(r) of a cell, None where it was not run or saves nothing."""
        if result is None or cell not in self.untuned or self.untuned[cell]["parameters"] >= self.dense["parameters"]:
            return None
        sizes = self.untuned[cell]["parameters"], self.dense["parameters"]
        return efficiency(on_test(result), self.dense["perplexity"], *sizes, lower=True)

    def row_of(self, cell):
        paper, found, tuned = self.printed.get(cell, {}), self.untuned.get(cell), self.tuned.get(cell)
        return (
            *cell,
            found and millions(found["parameters"]),
            *(found and f"{found['perplexity']:.2f}", paper.get("ppl")),
            *(share(self.efficiency(cell, found)), paper.get("efficiency")),
            *(tuned and f"{on_test(tuned):.2f}", paper.get("ppl_finetuned")),
            *(share(self.efficiency(cell, tuned)), paper.get("efficiency_finetuned")),
        )

    def rows(self):
        paper, tuned = self.paper["baseline"]["AWD-LSTM"], self.tuned_dense and on_test(self.tuned_dense)
        dense = (
            *("dense", None, None, millions(self.dense["parameters"])),
            *(f"{self.dense['perplexity']:.2f}", paper["ppl"], None, None),
            *(tuned and f"{tuned:.2f}", paper.get("ppl_finetuned"), None, None),
        )
        return [dense, *map(self.row_of, self.cells)]

    def curve(self, method, target):
        cells = [(method, target, rank) for rank in RANKS]
        return [(cell[-1], self.perplexity(cell)) for cell in cells if cell in self.untuned]

    def draw(self):
        curves = {
            target: {method: points for method in (*METHODS, *BEYOND) if (points := self.curve(method, target))}
            for target in TARGETS
        }
        labels = {"x_label": "rank", "y_label": "test perplexity"}
        picture(quality_curves, f"{self.key}-perplexity", curves, self.dense["perplexity"], **labels)

    # ---- the claims ----

    def compared(self, pairs, otherwise):
        """Whether the first cell of each pair has the lower perplexity, without and with fine-tuning."""
        told = []
        for when, found in (("", self.untuned), ("fine-tuned ", self.tuned)):
            ahead = {
                one: on_test(found[one]) < on_test(found[other]) for one, other in pairs if {one, other} <= found.keys()
            }
            lost = ", ".join(" ".join(map(str, cell)) for cell, won in ahead.items() if not won)
            if ahead or not when:
                told.append(when + verdict(list(ahead.values())) + (f", {otherwise} at {lost}" if lost else ""))
        return "; ".join(told)

    def hh_against_ih(self):
        cells = itertools.product(METHODS, RANKS)
        return self.compared([((method, "hh", rank), (method, "ih", rank)) for method, rank in cells], "not so")

    def factors_against_pruning(self):
        pairs = [(cell, ("prune", *cell[1:])) for cell in CELLS if cell[0] != "prune"]
        return self.compared(pairs, "pruning is ahead")

    def tuning(self):
        # A dense model that was not trained to the end gains by tuning too, so that only the tuned one is a fair measure.
        base = self.tuned_dense and on_test(self.tuned_dense)
        at = [on_test(found) for cell, found in self.tuned.items() if cell[1:] == ("hh", SMALLEST)]
        return verdict([value <= base for value in at] if base else [])

    # ---- the page ----

    def training(self):
        """What was trained, and how far it is from the paper's."""
        paper = self.paper["baseline"]["AWD-LSTM"]["ppl"]
        how = TRAINING.get(self.key, "was trained in a way that is not recorded")
        if self.trained:
            how = told_of(self.trained)
        base = self.dense["perplexity"]
        far = (
            "So our perplexities and the printed ones cannot be compared with each other; the changes from dense to "
            "compressed say which method, matrix and rank cost more, for this model. Whether they are the same for one "
            "that was trained to the end is open."
        )
        near = "Our perplexities can be compared with the printed ones."
        return (
            f"The dense model {how}. It has a test perplexity of {base:.2f}; the published AWD-LSTM has {self.published}, "
            f"the paper's {paper}. {near if base < 1.1 * paper else far}"
        )

    def coverage(self):
        yield f"Without fine-tuning, {self.told_of_cells(self.untuned, 'ppl')}."
        ways = {
            "for {} by {} from a rate of {:g} with dropout at {:g} of the published rates".format(
                *(counted(found["epochs"], "epoch"), OPTIMIZERS[found["config"]["optimizer"]]),
                *(found["config"]["lr"], found["config"]["dropout"]),
            )
            for found in self.tuned.values()
        }
        if ways or any("ppl_finetuned" in row for row in self.printed.values()):
            yield f"Fine-tuned, {self.told_of_cells(self.tuned, 'ppl_finetuned', ' or '.join(sorted(ways)))}."

    def told_of_cells(self, found, name, how=""):
        """How many have been run, and which of the printed ones are missing."""
        run, of_paper = sum(cell in found for cell in CELLS), [cell for cell, row in self.printed.items() if name in row]
        told = f"{run} of {len(CELLS)} cells have been run" + (f", each {how}" if how else "")
        if not of_paper:
            return told
        missing = [" ".join(map(str, cell)) for cell in of_paper if cell not in found]
        return f"{told}; missing, of the {len(of_paper)} that the paper prints: {', '.join(missing) or 'none'}"

    def section(self):
        text = f"## {self.name}\n\n{markdown(HEADER, self.rows(), left=3)}\n\n"
        text += f"Also as [CSV]({folder}/{self.key}.csv) and [LaTeX]({folder}/{self.key}.tex).\n\n"
        return text + f"![Perplexity against rank, {self.name}]({folder}/{self.key}-perplexity.png)"

    def learning(self):
        """The section on a training from the start, empty where there was none."""
        if not self.log:
            return ""
        rows = [
            (
                *(entry["epoch"] + 1, f"{math.exp(entry['train_loss']):.1f}", f"{entry['valid_perplexity']:.1f}"),
                *("averaged" if entry["averaged"] else "last", f"{entry['seconds'] / 60:.0f}"),
            )
            for entry in self.log
        ]
        header = ("epoch", "training perplexity", "validation perplexity", "weights", "minutes")
        return f"""## Training from the start, {self.name}

A model that {told_of(self.from_start)}. Its test perplexity is {on_test(self.from_start):.2f}.

{markdown(header, rows)}"""

    def results(self):
        """All that was read, for the commits."""
        single = (self.dense, self.tuned_dense, self.trained, self.from_start, self.speed)
        return [*filter(None, single), *self.untuned.values(), *self.tuned.values()]


class Norms:
    """The norms and spectra of one model's matrices."""

    def __init__(self, key, name):
        self.key, self.name, self.measured = key, name, load(f"{key}_norms")
        self.norms = {}
        for row in self.measured["rows"] if self.measured else []:
            self.norms.setdefault((row["method"], row["target"], row["rank"]), []).append(row)
        self.ranks = sorted({rank for _, _, rank in self.norms if rank})

    def mean(self, name, method, target, rank=0):
        """Over the layers."""
        return statistics.mean(row[name] for row in self.norms[method, target, rank])

    def curve(self, name, method, target):
        ranks = [rank for rank in self.ranks if (method, target, rank) in self.norms]
        return [(rank, self.mean(name, method, target, rank)) for rank in ranks]

    def draw(self):
        titles = {f"{symbol} of {target}": (name, target) for name, symbol in NORMS.items() for target in ("ih", "hh")}
        panels = {
            title: {method: self.curve(name, method, target) for method in METHODS}
            for title, (name, target) in titles.items()
        }
        dense = {title: self.mean(name, "dense", target) for title, (name, target) in titles.items()}
        picture(norm_curves, f"{self.key}-norms", panels, dense)
        found = self.measured["spectra"]
        values = {target: [one["singular_values"] for one in found if one["target"] == target] for target in TARGETS}
        picture(spectra, f"{self.key}-spectra", values)

    def spread(self):
        smallest = self.ranks[0]
        at = {
            (method, target): self.mean("l1_std", method, target, smallest)
            for method, target in itertools.product(METHODS, TARGETS)
        }
        dense = {target: self.mean("l1_std", "dense", target) for target in TARGETS}
        right = [(value < dense[target]) == (method == "prune") for (method, target), value in at.items()]
        numbers = "; ".join(
            f"{target}: dense {dense[target]:.3g}, " + ", ".join(f"{method} {at[method, target]:.3g}" for method in METHODS)
            for target in TARGETS
        )
        return f"{verdict(right)}; r = {smallest}, {numbers}"

    def nuclear(self):
        smallest = self.ranks[0]
        sums = {target: [row["nuclear"] for row in self.norms["dense", target, 0]] for target in TARGETS}
        ratios = [ih / hh for ih, hh in zip(sums["ih"], sums["hh"], strict=True)]
        held = {
            target: statistics.mean(e["energy"][str(smallest)] for e in self.measured["spectra"] if e["target"] == target)
            for target in TARGETS
        }
        told = verdict([1.5 <= ratio <= 2.5 for ratio in ratios])
        return (
            f"{told}; ratios {', '.join(f'{ratio:.2f}' for ratio in ratios)}, of their sums "
            f"{sum(sums['ih']) / sum(sums['hh']):.2f}; rank {smallest} holds of ‖W‖_F² on average {held['hh']:.1%} (hh) "
            f"and {held['ih']:.1%} (ih)"
        )

    def section(self):
        return f"""## Norms and spectra, {self.name}

Means over the layers; σ is the standard deviation of the column sums. The paper prints it without 1/n and root, which is
`l1_spread` in `results/`; the scale of its axes is not known.

![Norms against rank]({folder}/{self.key}-norms.png)

![Singular values, and the energy that they hold, against rank]({folder}/{self.key}-spectra.png)"""

    def results(self):
        return [self.measured]


class Task:
    """What was measured of the ELMo inside one task's model, and what the paper printed of it."""

    def __init__(self, key):
        self.key, (self.name, self.model, self.metric) = key, TASKS[key]
        self.paper = printed[key]
        self.printed = {(r["method"].replace("pruning", "prune"), r["target"]): r for r in self.paper["rows"]}
        self.trained = {kind: load(f"task_{key}/trained-{kind}") for kind in ("plain", "elmo")}
        self.latency = load(f"task_{key}/latency")
        self.files = {}
        for path in sorted((arguments.results / f"task_{key}").glob("*-seed*.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            self.files.setdefault((found["method"], found["target"], found["rank"]), []).append(found)
        self.ranks = sorted({rank for _, _, rank in self.files if rank})
        self.methods = [method for method in (*METHODS, *BEYOND) if any(cell[0] == method for cell in self.files)]
        self.is_there = bool(self.ranks and ("dense", "none", 0) in self.files)

    def score(self, cell):
        """The mean over seeds."""
        return statistics.mean(found["scores"][self.metric] for found in self.files[cell])

    def efficiency(self, cell):
        counts = self.files[cell][0]["parameters"]["model"]
        if counts["after"] >= counts["before"]:
            return None
        return efficiency(self.score(cell), self.score(("dense", "none", 0)), counts["after"], counts["before"])

    def row_of(self, method, target):
        cells = [(method, target, rank) for rank in self.ranks]
        there = [cell for cell in cells if cell in self.files]
        shares = [found for cell in there if (found := self.efficiency(cell)) is not None]
        scores, paper = [self.score(cell) for cell in there], self.printed.get((method, target), {})
        return (
            *(method, target),
            *(f"{self.score(cell):.2f}" if cell in self.files else None for cell in cells),
            *(f"{max(scores):.2f}", f"{statistics.mean(scores):.2f}"),
            share(statistics.mean(shares) if shares else None, "{:.2f}"),
            *(paper.get(name) for name in ("r10", "r400", "best", "average", "average_efficiency")),
        )

    def section(self):
        header = (
            *("method", "target", *(f"r = {rank}" for rank in self.ranks), "best", "mean", "mean E(r)"),
            *("printed r = 10", "printed r = 400", "printed best", "printed mean", "printed mean E(r)"),
        )
        pairs = itertools.product(self.methods, TARGETS)
        rows = [self.row_of(*pair) for pair in pairs if any(cell[:2] == pair for cell in self.files)]
        dense = self.files["dense", "none", 0]
        models = (self.model, self.trained["plain"]), (f"{self.model} + ELMo", self.trained["elmo"])
        baseline = "; ".join(
            f"{name} {self.of_seeds(found)} (printed {self.paper['baseline'][name]})" for name, found in models if found
        )
        seeds = f"Means of {len(dense)} seeds." if len(dense) > 1 else "One seed."
        limit = f" Cells are measured on the {dense[0]['limit']}." if dense[0]["limit"] else ""
        write_table(f"task-{self.key}", header, rows, left=2)
        return f"""## {self.name}, {self.model} with ELMo

{self.paper["metric"]}, trained on: {dense[0]["label"]}. Not compressed: {baseline}. {seeds}{limit}

{markdown(header, rows, left=2)}

Also as [CSV]({folder}/task-{self.key}.csv) and [LaTeX]({folder}/task-{self.key}.tex)."""

    def latency_rows(self):
        """One sentence, by part and version."""
        for part, what in (("elmo", "ELMo"), ("model", f"{self.model} with it")):
            for name, one in self.latency[part].items() if self.latency else ():
                yield (
                    *(self.name, what, name, f"{one['parameters']['after'] / 1e6:.2f}M"),
                    *(f"{one['milliseconds'][1]:.2f}", f"{one['faster']:.2f}x"),
                )

    def of_seeds(self, found):
        mean, deviation = (found["scores"][self.metric][name] for name in ("mean", "standard_deviation"))
        return f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")

    def results(self):
        return [*filter(None, (*self.trained.values(), self.latency)), *itertools.chain(*self.files.values())]

    def compared(self, pairs):
        """Whether the first cell of each pair scores better, by the differences that are more than chance."""
        differences = [self.score(one) - self.score(other) for one, other in pairs if {one, other} <= self.files.keys()]
        mean = self.score(("dense", "none", 0)) / 100.0
        # Of a mean of numbers from 0 to 1, at most.
        error = 100.0 * math.sqrt(mean * (1.0 - mean) / self.files["dense", "none", 0][0]["examples"])
        shown = [difference > 0.0 for difference in differences if abs(difference) > error]
        told = verdict(shown) if shown or not differences else "**not decided**"
        within = len(differences) - len(shown)
        return told + (
            f"; below the score's standard error of {error:.2f}: {within} of {len(differences)}" if within else ""
        )

    def hh_against_ih(self):
        return self.compared(((method, "hh", rank), (method, "ih", rank)) for method in METHODS for rank in self.ranks)

    def factors_against_pruning(self):
        cells = itertools.product(METHODS[:2], TARGETS, self.ranks)
        return self.compared((cell, ("prune", *cell[1:])) for cell in cells)


def of_elmo(trained):
    """What the ELMo inside the tasks is."""
    sizes, options = trained["options"]["lstm"], trained["config"]
    return (
        f"- ELMo: {trained['parameters']['bilm'] / 1e6:.2f}M parameters ({sizes['dim']} cells, projected to "
        f"{sizes['projection_dim']}; the paper's: 4096 and 512), trained on {' and '.join(options['corpus'])}, "
        f"{trained['tokens']:,} tokens, for {counted(trained['epochs'], 'epoch')} in {trained['seconds'] / 60:.0f} minutes "
        f"on {options['device']}; validation perplexity {trained['perplexity']['valid']:.1f} a token, both directions, "
        f"over {trained['vocabulary']:,} words. The released one was trained on the 1B Word Benchmark for 10 epochs, and a "
        "rank means more in a smaller one: columns can be compared with each other, not with the printed ones."
    )


def controls():
    """The table of controls on Penn Treebank, what is missing in it, and what was read."""
    rows, missing, read, perplexities = [], [], [], {}
    for name, path, key in CONTROLS:
        paper, found = printed["penn_treebank"]["baseline"].get(key, {}), load(f"ptb_{path}")
        parameters = f"{paper['params_millions']}M" if paper else None
        if found is None:
            missing.append(name)
            rows.append((name, None, None, None, None, parameters, paper.get("ppl")))
            continue
        read.append(found)
        size, how = found.get("bytes", 4 * found["parameters"]) / 1e6, None
        if "epochs" in found:
            how = f"{counted(found['epochs'], 'epoch')}, {found['config']['optimizer']} {found['config']['lr']:g}"
        perplexities[path] = on_test(found)
        numbers = millions(found["parameters"]), f"{size:.1f}", f"{perplexities[path]:.2f}"
        rows.append((name, how, *numbers, parameters, paper.get("ppl")))
    header = ("model", "trained", "parameters", "MB", "perplexity", "printed parameters", "printed")
    told = markdown(header, rows, left=2)
    if perplexities.get("controls/ptb-13m", math.inf) < perplexities.get("untuned/dense", 0.0):
        told += (
            "\n\nThat the smaller model is ahead of the dense one tells of training, not of size: it was trained by "
            "`recipes/language_model.py`, the dense one was not, and no model of full size has been by that for as long. "
            "What compression costs is said by the changes of one model alone."
        )
    return told, missing, read


def speed(result):
    """The table of how much faster hh as SVD factors makes the model."""
    paper = printed["penn_treebank"]["speedup"]
    rows = [
        (
            *("LSTM layers" if row["scope"] == "layers" else "whole model", row["steps"], row["batch"], rank),
            *(f"{ratios['fused']:.2f}x", f"{ratios['plain PyTorch']:.2f}x", share(paper.get(f"svd hh {rank}"), "{:.2f}x")),
        )
        for row in result["rows"]
        for rank, ratios in ((int(name.split()[1]), ratios) for name, ratios in row["faster"].items())
    ]
    return f"""How many times faster hh as SVD factors makes the model than the better of PyTorch's two engines for a dense
`nn.LSTM`, oneDNN and its own, on one thread; T time steps, B sequences. Of the printed speed neither hardware nor batch is
known; the paper also tells of about 1.5x at little loss.

{markdown(("timed", "T", "B", "rank", "fused kernel", "plain PyTorch", "printed"), rows)}"""


all_norms = [
    norms
    for norms in (*(Norms(key, name) for key, (name, _, _) in CORPORA.items()), Norms("elmo", "ELMo"))
    if norms.measured
]
for norms in all_norms:
    norms.draw()
everything, tasks = [Corpus(key) for key in CORPORA], [task for task in map(Task, TASKS) if task.is_there]
elmo_trained = load("elmo_trained")
corpora, ptb = [corpus for corpus in everything if corpus.dense], everything[0]
for corpus in corpora:
    write_table(corpus.key, HEADER, corpus.rows(), left=2)
    corpus.draw()


def verdicts(claim):
    """On everything that was measured for it, a line for each."""
    found = [(one.name, getattr(one, claim)()) for one in (*corpora, *tasks, *all_norms) if hasattr(one, claim)]
    return "".join(f"\n    - {name}: {told}" for name, told in found) or f"\n    - {verdict([])}"


CLAIMS = {
    "Compressing W_h costs less than compressing W_i at the same rank.": "hh_against_ih",
    "Factorisation beats pruning that keeps as many weights.": "factors_against_pruning",
    "At low rank σ(‖W‖₁) falls under pruning and rises under factorisation (at the smallest rank, mean over "
    "layers).": "spread",
    "The nuclear norm of W_i is about twice that of W_h (a ratio from 1.5 to 2.5, layer by layer).": "nuclear",
    f"With fine-tuning, W_h at r = {SMALLEST} costs nothing (no higher a perplexity than the dense model tuned "
    "alike).": "tuning",
}
numbered = "\n".join(f"{index}. {claim}{verdicts(found)}" for index, (claim, found) in enumerate(CLAIMS.items(), 1))
of_controls, without, control_results = controls()
absent = [corpus.name for corpus in everything if not corpus.dense] + without
absent += [] if ptb.speed else ["the speed claim (2.13x at r = 10)"]
absent += [name for key, (name, _, _) in TASKS.items() if key not in {task.key for task in tasks}]
trained = [f"- {corpus.name}: {corpus.training()}\n  " + "\n  ".join(corpus.coverage()) for corpus in corpora]
trained += [of_elmo(elmo_trained)] if elmo_trained and tasks else []
trained += [f"- Not run: {'; '.join(absent)}."] if absent else []
pictures = [
    f"![{target}, its low-rank product, and pruned, {of}]({folder}/{name}-{target}.png)"
    for name, of in (("heatmap", "Penn Treebank"), ("elmo-heatmap", "ELMo"))
    for target in TARGETS
    if (DRAWN / f"{name}-{target}.png").exists()
]
heatmaps = """## Heatmaps

|W| of a layer's matrices, block by block (the largest entry of each), rows by gate; beside it the product of its SVD
factors, and what pruning leaves with as many weights. Marked are the rows and columns with the largest sums."""
of_latency = (
    "## Latency of single sentences\n\nMedians on one machine, all by turns; times faster than the dense modules.\n\n"
    + markdown(
        ("task", "timed", "ELMo", "parameters", "ms", "faster"),
        [row for task in tasks for row in task.latency_rows()],
        left=3,
    )
)
sections = [
    *(corpus.section() for corpus in corpora),
    """E(r) = R(M, M') / R(P, P') where the perplexity rises, R(M, M') / (1 - R(P, P')) where it falls; R is the relative
change against the dense model as it came, P the parameters of the whole model. The paper applies it unevenly: on Penn
Treebank from a dense base of 59.0 and, for SVD without fine-tuning, without dividing by R(P, P'); on WikiText-2 in per
cent of the compressed model's perplexity, with the parameters of the LSTM alone. A matrix whose factors
would be no smaller stays dense: at the paper's sizes and rank 400 those of 4600 x 400 and 1600 x 400.""",
    f"""## Controls, Penn Treebank

{of_controls}

Both int8 models keep all of ih and hh so. The smaller dense AWD-LSTM has as many parameters as factors of rank 10 at hh
leave, and is trained from scratch, as the TT-LSTM is. The paper does not say which matrices that keeps as tensor trains,
nor their ranks; ours has three cores for each ih and hh, and as many parameters in all as theirs.""",
    *filter(None, (corpus.learning() for corpus in corpora)),
    *([f"## Speed\n\n{speed(ptb.speed)}"] if ptb.speed else []),
    *(task.section() for task in tasks),
    *([of_latency] if any(task.latency for task in tasks) else []),
    *(norms.section() for norms in all_norms),
    *([heatmaps, *pictures] if pictures else []),
]
read = [*control_results, *(result for one in (*corpora, *tasks, *all_norms) for result in one.results())]
commits = {result["provenance"]["commit"] for result in read + ([elmo_trained] if elmo_trained else [])}
body, lines = "\n\n".join(sections), "\n".join(trained)
arguments.page.write_text(
    f"""# The paper, reproduced

Winata et al., *On the Effectiveness of Low-Rank Matrix Factorization for LSTM Model Compression* (PACLIC 2019, arXiv
1908.09982). This page is generated by `python recipes/reproduction.py` from the files in
`results/`.

## What was trained, and what was not

{lines}

## The claims, from our numbers alone

A claim holds if at least nine tenths of the comparisons bear it out, does not hold if at most a tenth does, and holds in
part between.

{numbered}

{body}

Measured at {", ".join(sorted(map(str, commits)))}; processor and versions stand in every file.
""",
    encoding="utf-8",
)
