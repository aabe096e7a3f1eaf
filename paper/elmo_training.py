"""Training of ELMo's language model (Peters et al. 2018) on sentences, with a sampled softmax.

Dimensions: B sentences, T tokens, C characters a token, P projection size, V words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear

from paper.characters import characters_of, sentence_marks
from paper.checkpoints import moments_of, read_tensors, restore_moments, with_prefix, without_prefix, write_tensors
from paper.elmo import BiLM
from paper.elmo_config import ELMoConfig
from paper.optimization import one_cycle, take_gradients
from paper.runs import Pace, check_settings, seed, write_log
from slimlstm.demo.corpora import EOS

BEGIN, END, UNKNOWN = 0, 1, 2
"""Ids of the marks around a sentence, and of words that training has not seen."""
WEIGHT_DECAY, CLIP, WARM_UP = 0.01, 1.0, 0.05
SENTENCE_ENDS = {".", "!", "?"}


def sentences_of(words: Iterable[str], longest: int) -> list[list[str]]:
    """Cut words into sentences: at line ends, after full stops, and after ``longest`` tokens.

    Examples:
        >>> sentences_of(["It", "works", ".", "So", "<eos>"], 60)
        [['It', 'works', '.'], ['So']]
    """
    sentences: list[list[str]] = []
    sentence: list[str] = []
    for word in words:
        if word != EOS:
            sentence.append(word)
        if sentence and (word == EOS or word in SENTENCE_ENDS or len(sentence) == longest):
            sentences.append(sentence)
            sentence = []
    return sentences


class SentenceEncoder:
    """Turns sentences into tensors; words are targets only, since the model reads characters.

    Args:
        sentences: the training text. The most frequent words get the lowest ids, as sampling needs them.
        max_characters: C.
        device: of the tensors.
    """

    def __init__(self, sentences: Iterable[Sequence[str]], max_characters: int, device: torch.device | str) -> None:
        counts = Counter(word for sentence in sentences for word in sentence)
        self.words = [word for word, _ in counts.most_common()]
        self.tokens = sum(counts.values())
        self._ids = {word: index + 3 for index, word in enumerate(self.words)}
        self._marks, self._device, self._width = sentence_marks(max_characters), device, max_characters
        # Every word is spelled once; padding and marks have rows of their own.
        self._spelled = torch.zeros(len(self.words) + 3, self._width, dtype=torch.int64)
        self._spelled[3:] = characters_of([self.words], self._width)[0]

    def __call__(self, sentences: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return characters [B, T, C], word ids [B, T] and lengths [B], marks included."""
        lengths = torch.tensor([len(sentence) + 2 for sentence in sentences])
        targets = torch.full((len(sentences), int(lengths.max())), END)
        for row, sentence in enumerate(sentences):
            found = [self._ids.get(word, UNKNOWN) for word in sentence]
            targets[row, : len(found) + 2] = torch.tensor([BEGIN, *found, END])
        characters = self._spelled[targets]
        for row, column in (targets == UNKNOWN).nonzero().tolist():
            characters[row, column] = characters_of([[str(sentences[row][column - 1])]], self._width)[0, 0]
        characters[targets == BEGIN], characters[targets == END] = self._marks[0], self._marks[1]
        characters[torch.arange(targets.shape[1]) >= lengths[:, None]] = 0
        return characters.to(self._device), targets.to(self._device), lengths.to(self._device)


def batches_of(sentences: Sequence[Sequence[str]], tokens: int, order: tuple[Any, ...] | None = None) -> list[list[int]]:
    """Return indices of sentences of similar length, in batches of about ``tokens`` tokens with their marks.

    With ``order``, the place in the run, equal lengths and batches come in an order that it seeds; else the shortest first.
    """
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    if order is not None:
        seed(*order)
        lengths = lengths + torch.rand(len(lengths))
    batches: list[list[int]] = []
    batch: list[int] = []
    for place in lengths.argsort().tolist():
        batch.append(place)
        if len(batch) * (len(sentences[place]) + 2) >= tokens:
            batches.append(batch)
            batch = []
    batches += [batch] if batch else []
    return batches if order is None else [batches[index] for index in torch.randperm(len(batches)).tolist()]


class Objective(nn.Module):
    """Mean loss a token of marked sentences, over both directions.

    ``forward(characters, targets, lengths, samples)`` takes characters [B, T, C], word ids [B, T] and lengths [B] as
    :class:`SentenceEncoder` makes them, and how many words compete with the right one, 0 for all.
    """

    def __init__(self, config: ELMoConfig, words: int) -> None:
        super().__init__()
        self.config = config
        self.bilm = BiLM(config)
        self.softmax = nn.Linear(config.proj_size, words + 3)
        nn.init.normal_(self.softmax.weight, std=config.proj_size**-0.5)
        nn.init.zeros_(self.softmax.bias)

    def forward(self, characters: Tensor, targets: Tensor, lengths: Tensor, samples: int) -> Tensor:
        top = self.bilm.run(self.bilm.tokens(characters), lengths)[0][-1]
        ahead, back = top.split(self.config.proj_size, dim=2)
        inside = torch.arange(targets.shape[1], device=targets.device) < lengths[:, None]
        # Each direction predicts its next token; the last mark that it reads predicts nothing.
        pairs = [(ahead[:, :-1], targets[:, 1:]), (back[:, 1:], targets[:, :-1])]
        hidden = torch.cat([outputs[inside[:, 1:]] for outputs, _ in pairs])
        wanted = torch.cat([words[inside[:, 1:]] for _, words in pairs])
        return self.loss(hidden, wanted, samples)

    def loss(self, hidden: Tensor, wanted: Tensor, samples: int) -> Tensor:
        """Return the cross-entropy of words ``wanted`` [N] at ``hidden`` [N, P], over all words or a sample of them.

        In a sample, each word is weighted by the inverse of its probability to be drawn, so that the sum over the sample is
        on average the sum over all words (Jean et al. 2015, arXiv 1412.2007).
        """
        weight, bias, size = self.softmax.weight, self.softmax.bias, self.softmax.out_features
        if not samples or samples >= size:
            return cross_entropy(self.softmax(hidden).float(), wanted)
        drawn, included = _sampled_words(samples, size, hidden.device)
        right = (hidden * embedding(wanted, weight)).sum(1) + bias[wanted]
        others = linear(hidden, weight[drawn], bias[drawn]) - included.log()
        others = others.masked_fill(drawn == wanted[:, None], -math.inf)
        logits = torch.cat([right[:, None], others], dim=1).float()
        return cross_entropy(logits, torch.zeros_like(wanted))


def _sampled_words(samples: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw word ids, each once, and return them with their probabilities to be among those drawn.

    The distribution is log-uniform: word k has log((k + 2) / (k + 1)) / log(V + 1), near Zipf's law where k is the rank.
    """
    drawn = (torch.rand(samples, device=device) * math.log(size + 1)).exp().long().sub(1)
    drawn = drawn.clamp(0, size - 1).unique()
    once = ((drawn + 2.0).log() - (drawn + 1.0).log()) / math.log(size + 1)
    return drawn, -torch.expm1(samples * torch.log1p(-once))


@dataclass(frozen=True)
class TrainingOptions:
    """Choices that a training's result depends on.

    Attributes:
        lr: peak learning rate.
        epochs: of the cycle.
        tokens: in a batch, about.
        samples: words that compete with the right one; 0 for all.
        seed: of all random numbers.
        bfloat16: compute in bfloat16 under autocast.
    """

    lr: float
    epochs: int
    tokens: int
    samples: int
    seed: int
    bfloat16: bool = False


class Training:
    """Training of a language model with AdamW and one cycle, whose random numbers depend on the place in the run alone.

    Args:
        objective: trained in place.
        encoder: makes the tensors of a batch.
        texts: the sentences of the splits ``train`` and ``valid``.
        options: see :class:`TrainingOptions`.
        device: of the objective.
    """

    def __init__(
        self,
        objective: Objective,
        encoder: SentenceEncoder,
        texts: Mapping[str, Sequence[Sequence[str]]],
        options: TrainingOptions,
        device: torch.device,
    ) -> None:
        self.objective, self.encoder, self.texts, self.options, self.device = objective, encoder, texts, options, device
        self.parameters = dict(objective.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=options.lr, betas=(0.9, 0.99), weight_decay=WEIGHT_DECAY
        )
        self.place: dict[str, Any] = {"epoch": 0, "batch": 0, "total": 0.0, "seconds": 0.0, "log": []}

    def run(self, save: Callable[[], None], write: Callable[[], None], pace: Pace, console: Console) -> None:
        """Train to the end, or until ``pace`` ends the process.

        Args:
            save: writes a checkpoint; called after each epoch, and when ``pace`` says so.
            write: writes the model; called after each epoch.
            pace: see :class:`paper.runs.Pace`.
            console: shows progress.
        """
        place, options, before = self.place, self.options, self.place["seconds"]
        while place["epoch"] < options.epochs:
            batches = batches_of(self.texts["train"], options.tokens, (options.seed, "order", place["epoch"]))
            for _ in self._steps(batches, console):
                place["seconds"] = before + pace.seconds()
                pace.after_step(save)
            self._end_epoch(len(batches), console)
            write()
            save()

    def _steps(self, batches: Sequence[Sequence[int]], console: Console) -> Iterator[None]:
        """Take the steps left in the epoch, and yield after each."""
        place = self.place
        self.objective.train()
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(f"epoch {place['epoch']}", total=len(batches), completed=place["batch"])
            while place["batch"] < len(batches):
                self.step(batches[place["batch"]], len(batches))
                bar.update(task, completed=place["batch"])
                yield

    def step(self, batch: Sequence[int], batches: int) -> None:
        """Learn from one batch of an epoch of ``batches``."""
        options, place = self.options, self.place
        chosen = self.encoder([self.texts["train"][index] for index in batch])
        seed(options.seed, "step", place["epoch"], place["batch"])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=options.bfloat16):
            loss = self.objective(*chosen, options.samples)
        parameters = self.parameters.values()
        take_gradients(loss, self.optimizer, parameters, clip=CLIP, lr=options.lr, epoch=place["epoch"])
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(batches)
        self.optimizer.step()
        place["total"] += loss.item()
        place["batch"] += 1

    def learning_rate(self, batches: int) -> float:
        """Return the rate at this place of an epoch of ``batches``."""
        done = (self.place["epoch"] + self.place["batch"] / batches) / self.options.epochs
        return self.options.lr * one_cycle(done, WARM_UP, 0.05 + done / WARM_UP)

    def _end_epoch(self, batches: int, console: Console) -> None:
        place, loss = self.place, self.validation_loss()
        entry = {
            "epoch": place["epoch"],
            "train_loss_sampled": place["total"] / batches,
            "valid_loss": loss,
            "valid_perplexity": math.exp(loss),
            "seconds": round(place["seconds"], 1),
        }
        place["log"].append(entry)
        console.print(entry)
        place.update(epoch=place["epoch"] + 1, batch=0, total=0.0)

    def validation_loss(self) -> float:
        """Return the mean loss over the validation text, by the full softmax; unseen words count as one word."""
        self.objective.eval()
        total = count = 0.0
        with torch.no_grad():
            for batch in batches_of(self.texts["valid"], self.options.tokens):
                chosen = self.encoder([self.texts["valid"][index] for index in batch])
                targets = 2 * int((chosen[2] - 1).sum())
                total, count = total + targets * self.objective(*chosen, 0).item(), count + targets
        self.objective.train()
        return total / count

    def write_checkpoint(self, folder: Path, settings: Mapping[str, str]) -> None:
        """Write ``checkpoint.safetensors`` and ``log.jsonl``."""
        tensors = with_prefix("model", self.parameters) | moments_of(self.optimizer)
        metadata = {"place": self.place, "settings": dict(settings)}
        write_tensors(folder / "checkpoint.safetensors", tensors, metadata)
        write_log(folder / "log.jsonl", self.place["log"])

    def read_checkpoint(self, folder: Path, settings: Mapping[str, str]) -> None:
        """Continue from ``checkpoint.safetensors``.

        Raises:
            SlimLSTMError: it is of a run with other settings.
        """
        path = folder / "checkpoint.safetensors"
        tensors, metadata = read_tensors(path, self.device)
        check_settings(path, metadata["settings"], settings)
        self.place.update(metadata["place"])
        with torch.no_grad():
            for name, tensor in without_prefix("model", tensors).items():
                self.parameters[name].copy_(tensor)
        restore_moments(self.optimizer, tensors)
