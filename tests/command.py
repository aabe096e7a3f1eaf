"""A small AWD-LSTM with its vocabulary and a text, for tests of the command."""

import torch

from slimlstm.demo.awd_lstm import AWDLSTMConfig
from slimlstm.demo.corpora import words_of

WORDS = ["<eos>", *"abcdefghij"]
CONFIG = AWDLSTMConfig(len(WORDS), 12, 16, 2)
TEXT = "a b c\nd e f g h\n\ni j\n" * 40
RANKS = (1, 2)


def ids(text=TEXT):
    return torch.tensor([WORDS.index(word) for word in words_of(text)])
