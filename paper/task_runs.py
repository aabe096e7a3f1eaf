"""Runs of a task: its data, and for every seed a task model, trained or read back.

Runs are in a folder with one subfolder ``seed-N``; an interrupted training continues there.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from paper.bcn import BCN, BCNConfig
from paper.bidaf import BiDAF, BiDAFConfig
from paper.elmo import BiLM, ELMo
from paper.esim import ESIM, ESIMConfig
from paper.runs import Pace, check_settings, lock_folder, read_json, seed
from paper.task_cells import in_kernel
from paper.task_data import Example, Sentence, read_task, read_vectors, with_phrases
from paper.task_training import Training, predictions_of, with_best_weights
from paper.tasks import Batch, Batches, Remembering, scores, texts_of, vocabulary_of
from slimlstm.files import write_json
from slimlstm.provenance import provenance

_HELD_OUT, _LONGEST_PARAGRAPH = 10, 400


@dataclass(frozen=True)
class TaskConfig:
    """Predictions of a training step, learning rate, and sizes of the model that differ from the published ones."""

    batch: int
    lr: float
    sizes: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Task:
    """A task of the paper.

    Attributes:
        model, model_config: the types of its model and of the model's sizes.
        splits: names for training, validation and the final score. A tenth of the training paragraphs replaces a missing
            validation split.
        metric: the score that early stopping watches.
        configs: by name.
    """

    model: Callable[[Any, ELMo | None], nn.Module]
    model_config: Callable[..., Any]
    splits: tuple[str, str | None, str]
    metric: str
    configs: Mapping[str, TaskConfig]


TASKS = {
    "sst5": Task(
        BCN,
        BCNConfig,
        ("train", "dev", "test"),
        "accuracy",
        {
            "published": TaskConfig(100, 1e-3),
            "small": TaskConfig(64, 1e-3, {"embedding_size": 100, "hidden_size": 100}),
        },
    ),
    "snli": Task(
        ESIM,
        ESIMConfig,
        ("train", "dev", "test"),
        "accuracy",
        {
            "published": TaskConfig(32, 4e-4),
            "small": TaskConfig(64, 1e-3, {"embedding_size": 100, "hidden_size": 100}),
        },
    ),
    "squad": Task(
        BiDAF,
        BiDAFConfig,
        ("train", None, "dev"),  # The test set is not public.
        "f1",
        {
            "published": TaskConfig(60, 1e-3),
            "small": TaskConfig(30, 2e-3, {"embedding_size": 50, "num_filters": 50, "hidden_size": 50}),
        },
    ),
}


class TaskTexts:
    """Examples of a task.

    Args:
        name: a key of :data:`TASKS`.
        folder: with data in the published format; None for the published data.

    Attributes:
        train, validation, test: the examples of each part.
        learnt: what training sees: ``train``, for SST-5 with its phrases.
        label: says which data training sees.
        splits: label and SHA-256 of every split that was read.
    """

    def __init__(self, name: str, folder: Path | None) -> None:
        train, validation, test = TASKS[name].splits
        found = {split: read_task(name, split, folder) for split in (train, validation, test) if split}
        self.splits = {split: {"label": part.label, "sha256": part.sha256} for split, part in found.items()}
        self.label = self.splits[train]["label"]
        self.train, self.test = found[train].examples, found[test].examples
        if validation is None:
            self.train, self.validation = _held_out(self.train)
        else:
            self.validation = found[validation].examples
        self.learnt = self.train
        if name == "sst5":
            self.learnt = with_phrases(cast("Sequence[Sentence]", self.train))
            self.label += f", with the phrases of over three tokens in them {len(self.learnt):,} examples"
        if validation is None:
            self.label += (
                f", of which every {_HELD_OUT}th paragraph is held out and those of over {_LONGEST_PARAGRAPH} tokens are "
                "left out"
            )

    def tokens(self) -> list[str]:
        """Return every distinct token, sorted."""
        parts = (self.train, self.validation, self.test)
        return sorted({token for part in parts for example in part for text in texts_of(example) for token in text})


def _held_out(examples: Sequence[Example]) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return paragraphs to train on, which are not too long, and those to validate on."""
    kept = [example for index, example in enumerate(examples) if index % _HELD_OUT]
    return [example for example in kept if len(texts_of(example)[0]) <= _LONGEST_PARAGRAPH], examples[::_HELD_OUT]


@dataclass(frozen=True)
class TaskOptions:
    """Choices that a run's models depend on.

    Attributes:
        task: a key of :data:`TASKS`.
        config: a key of its configs.
        lr, batch: the learning rate and the predictions of a step.
        elmo_dropout: the dropout rate of the ELMo's vectors.
        elmo: the ELMo's folder; None for no ELMo.
        vectors: a text file of word vectors; None for random ones.
        data: a folder of data in the published format; None for the published data.
    """

    task: str
    config: str
    lr: float
    batch: int
    elmo_dropout: float = 0.5
    elmo: Path | None = None
    vectors: Path | None = None
    data: Path | None = None


class TaskRun:
    """Training of one model a seed, and everything that its result files share.

    Args:
        options: see :class:`TaskOptions`.
        bilm: the language model of the ELMo that the options name, on the device of the run.
        runs: the folder that gets the run's folder.
        device: of the models.
    """

    def __init__(self, options: TaskOptions, bilm: BiLM | None, runs: Path, device: torch.device) -> None:
        self.options, self.bilm, self.device = options, bilm, device
        self.task = TASKS[options.task]
        self.fast_bilm = in_kernel(bilm) if bilm else None
        self.elmo_name = options.elmo.name if options.elmo else None
        self.folder = runs / f"{options.task}-{options.config}-{self.elmo_name or 'plain'}"
        self.texts = TaskTexts(options.task, options.data)
        tokens = self.texts.tokens()
        self._with_vectors: list[str] = []
        self._vectors: Tensor | None = None
        if options.vectors:
            self._with_vectors, self._vectors = read_vectors(options.vectors, {token.lower() for token in tokens})
        self.vocabulary = vocabulary_of(self.texts.train, self._with_vectors)
        has_characters = bilm is not None or options.task == "squad"
        self._batches = Batches(tokens, self.vocabulary, with_characters=has_characters, device=device)
        self.settings = {
            **{name: str(getattr(options, name)) for name in ("task", "config", "lr", "batch", "elmo_dropout")},
            "vectors": options.vectors.name if options.vectors else "none",
            "elmo": _sha256_of(options.elmo) if options.elmo else "none",
            "train": self.texts.splits["train"]["sha256"],
        }

    def batches(self, examples: Iterable[Example], size: int | None = None) -> list[Batch]:
        """Return batches of examples, by default of the size of a training step."""
        return self._batches(examples, self.options.batch if size is None else size)

    def _untrained(self, number: int, bilm: nn.Module | None) -> nn.Module:
        """Return a model with random weights, in which ``bilm`` replaces the language model."""
        seed(number, "weights")
        sizes = dict(self.task.configs[self.options.config].sizes)
        if self._vectors is not None:
            sizes["embedding_size"] = self._vectors.shape[1]
        elmo = ELMo(self.bilm, self.options.elmo_dropout) if self.bilm else None
        model: Any = self.task.model(self.task.model_config(len(self.vocabulary), **sizes), elmo)
        if self._vectors is not None:
            with torch.no_grad():
                model.embedder.words.weight[self.vocabulary.encode(self._with_vectors)] = self._vectors
        if elmo:
            elmo.bilm = cast(Any, bilm)
        return model.to(self.device)

    def trained(self, number: int) -> nn.Module:
        """Return the trained model of a seed; the kernel runs its language model where it can."""
        return self._with_best_weights(number, self.fast_bilm)

    def _with_best_weights(self, number: int, bilm: nn.Module | None) -> nn.Module:
        return with_best_weights(self._untrained(number, bilm), self._folder_of(number), self.device)

    def _folder_of(self, number: int) -> Path:
        return self.folder / f"seed-{number}"

    def train(self, numbers: Sequence[int], epochs: int, gigabytes: float, pace: Pace, console: Console) -> None:
        """Train the models of the seeds that have no result, or until ``pace`` ends the process.

        Args:
            numbers: the seeds.
            epochs: at most.
            gigabytes: of the language model's outputs that are remembered.
            pace: see :class:`paper.runs.Pace`.
            console: shows progress.
        """
        left = [number for number in numbers if not (self._folder_of(number) / "result.json").exists()]
        if not left:
            return
        lock = lock_folder(self.folder)
        memory = Remembering(self.fast_bilm, gigabytes) if self.fast_bilm else None
        learnt, validation, test = map(self.batches, (self.texts.learnt, self.texts.validation, self.texts.test))
        for number in left:
            training = Training(
                number,
                self._untrained(number, memory),
                self._folder_of(number),
                metric=self.task.metric,
                lr=self.options.lr,
                settings=self.settings,
                device=self.device,
            )
            training.run(learnt, validation, epochs, pace, console)
            self._write_result(training, self._with_best_weights(number, memory), test)
        lock.release()

    def _write_result(self, training: Training, model: nn.Module, test: Sequence[Batch]) -> None:
        of_elmo = sum(parameter.numel() for parameter in self.bilm.parameters()) if self.bilm else 0
        result = {
            "seed": training.number,
            "validation": training.best_entry(),
            "scores": scores(predictions_of([model], test)[0], test),
            "epochs": len(training.log),
            "parameters": {"model": sum(parameter.numel() for parameter in model.parameters()), "elmo": of_elmo},
            "seconds": round(training.place["seconds"], 1),
            "settings": self.settings,
        }
        write_json(self._folder_of(training.number) / "result.json", result)

    def results(self, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Return the results of trained seeds.

        Raises:
            SlimLSTMError: one is of a run with other settings.
        """
        found: list[dict[str, Any]] = []
        for number in numbers:
            path = self._folder_of(number) / "result.json"
            result = read_json(path)
            check_file(path, result.pop("settings"), self.settings)
            found.append(result)
        return found

    def summary(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return scores over the seeds, the results of each, and :meth:`common`."""
        over_seeds = {name: spread([result["scores"][name] for result in results]) for name in results[0]["scores"]}
        return {"metric": self.task.metric, "scores": over_seeds, "seeds": results, **self.common()}

    def common(self) -> dict[str, Any]:
        """Return the entries that all result files share."""
        config = {
            **self.settings,
            "elmo_name": self.elmo_name,
            "sizes": self.task.configs[self.options.config].sizes,
            "words": len(self.vocabulary),
        }
        return {
            "task": self.options.task,
            "label": self.texts.label,
            "data": self.texts.splits,
            "config": config,
            "provenance": provenance(),
        }


def _sha256_of(folder: Path) -> str:
    """Return the SHA-256 of an ELMo's weights and options."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*options.json"), *folder.glob("*weights*.hdf5")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def check_file(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, str]) -> None:
    """Check the settings that a file has among others.

    Raises:
        SlimLSTMError: a setting differs.
    """
    check_settings(path, {name: theirs.get(name, "None") for name in ours}, ours)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean, and the standard deviation if the values are several.

    Examples:
        >>> spread([50.0])
        {'mean': 50.0, 'standard_deviation': None}
    """
    return {"mean": statistics.fmean(values), "standard_deviation": statistics.stdev(values) if len(values) > 1 else None}
