"""The language model that comes with slimlstm: three LSTMs of up to 448 units, trained on WikiText-2."""

import torch
from registry import arguments, study

import slimlstm as sl
from slimlstm.demo.model import embedded_model, held_out_tokens
from slimlstm.evaluate import NextTokens, pieces


@torch.no_grad()
def losses(model, batches):
    loss = NextTokens()
    return torch.cat([loss(model, batch) for batch in batches])


def kept(model, part):
    batches, before = part
    return 1 - (losses(model, batches) - before)


dense = embedded_model()
text = held_out_tokens()[: 3_000 if arguments().brief else None]
seen, *held_out = [pieces(tokens, streams=10, steps=70) for tokens in text.chunk(3)]
validation, test = [(batches, losses(dense, batches)) for batches in held_out]
configs = {
    "int8": sl.Quantize("int8"),
    "fisher, int8, 2.1 MB": sl.LowRank("fisher", bytes=2_100_000, storage="int8"),
    "fisher, int8, 1.4 MB": sl.LowRank("fisher", bytes=1_400_000, storage="int8"),
}
data = {"batches": seen, "loss": NextTokens(), "validation": validation, "test": test}
study("embedded", "1 - rise of the loss", dense, configs, kept, seen[0][1][:1, :1], **data)
