"""Silero's voice activity detector: convolutions and an LSTM cell that read a stream, 32 ms at a time."""

import torch
from registry import package, speech, study
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Bernoulli

import slimlstm as sl

CHUNK, CONTEXT, STREAMS = 512, 64, 8


class SileroVAD(nn.Module):
    """The published network; takes samples [B, 576] and (h, c) or None, returns probabilities of speech [B] and (h, c)."""

    def __init__(self):
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, samples, state=None):
        x = self.stft_conv(nn.functional.pad(samples, (0, 64), mode="reflect")[:, None])
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        h, c = self.lstm_cell(x[:, :, 0], state)
        return self.final_conv(h.relu()[:, :, None]).sigmoid()[:, 0, 0], (h, c)


def published():
    """Return the network with the published weights."""
    folder = package("silero-vad==6.2.3", "7b7f5436cfcb02fae583a05b512ea96467fd449fe54cb49a5e4f06c51a1e43b8")
    model = SileroVAD().eval()
    model.load_state_dict(load_file(folder / "silero_vad/data/silero_vad_16k.safetensors"))
    return model


def chunks_of(sound):
    """Cut streams [B, N] into chunks [N / 512, B, 576], each with the last samples of the chunk before it."""
    return nn.functional.pad(sound, (CONTEXT, 0)).unfold(1, CHUNK + CONTEXT, CHUNK).transpose(0, 1)


def probabilities(model, chunks):
    state, found = None, []
    for chunk in chunks:
        speaking, state = model(chunk, state)
        found.append(speaking)
    return torch.stack(found)


@torch.no_grad()
def agreement(model, part):
    chunks, decisions = part
    # Neighbouring chunks are alike, and so are streams of the same speech; a segment with all its streams is one example.
    return ((probabilities(model, chunks) > 0.5) == decisions).double().unflatten(1, (-1, STREAMS)).mean((0, 2))


def prepared():
    """Return the dense model, inputs to time it with, and the data that calibrate and judge smaller models."""
    dense = published()
    # A minute of speech, as it is and with more and more noise: streams [STREAMS, N].
    noise = torch.randn(len(speech()), generator=torch.Generator().manual_seed(0))
    chunks = chunks_of(speech() + noise * torch.linspace(0, 0.03, STREAMS)[:, None])
    # A third calibrates. Segments of two seconds take turns in validating and testing.
    seen, segments = chunks[: len(chunks) // 3], chunks[len(chunks) // 3 :].split(60)[:20]
    held_out = [torch.cat(segments[start::2], dim=1) for start in (0, 1)]
    with torch.no_grad():
        validation, test = [(part, probabilities(dense, part) > 0.5) for part in held_out]
        state = dense(chunks[0, :1])[1]
    # Labels are sampled from the predictions of the dense model, so the recording needs none.
    data = {"batches": seen.split(100), "loss": lambda model, batch: Bernoulli(probabilities(model, batch))}
    return dense, (chunks[1, :1], state), data | {"validation": validation, "test": test}


if __name__ == "__main__":
    dense, inputs, data = prepared()
    configs = {
        "int8": sl.Quantize("int8"),
        "fisher 50%, int8": sl.LowRank("fisher", keep=0.5, storage="int8"),
        "fisher 25%, int8": sl.LowRank("fisher", keep=0.25, storage="int8"),
    }
    study("silero-vad", "same decisions", dense, configs, agreement, *inputs, **data)
