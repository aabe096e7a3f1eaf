"""Trained ONNX files that others published, compressed and run as their users run them."""

import os
import wave
from pathlib import Path

import numpy as np
import pytest

from slimlstm import LowRank, Quantize
from slimlstm.onnx.compress import compress_onnx
from slimlstm.weight_files import find_matrices, read_tensors

onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
DATA = Path(os.environ.get("SLIMLSTM_DATA", "/nonexistent")) / "pretrained"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="SLIMLSTM_DATA names no folder of data sets")
VAD = DATA / "silero_vad" / "silero_vad.onnx"
DTLN = DATA / "dtln" / "model_1.onnx", DATA / "dtln" / "model_2.onnx"
RATE, KEEP = 16000, 0.49  # of the matrices, so that with the biases half is left


def recording():
    with wave.open(str(DATA / "silero_vad" / "test.wav")) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float32) / 32768


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def speech(path, audio, rate=RATE):
    """The probability of speech and the inputs of every frame: 32 ms, with 4 ms of those before, states carried on."""
    frame, before = rate * 512 // RATE, rate * 64 // RATE
    model, state, context = session(path), np.zeros((2, 1, 128), np.float32), np.zeros(before, np.float32)
    for start in range(0, len(audio) - frame + 1, frame):
        window = np.concatenate([context, audio[start : start + frame]])
        inputs = {"input": window[None], "state": state, "sr": np.array(rate, np.int64)}
        probability, state = model.run(None, inputs)
        context = window[-before:]
        yield probability.item(), inputs


def decisions(path, audio):
    return np.array([probability >= 0.5 for probability, _ in speech(path, audio)])


def denoised(paths, audio):
    """The output and both models' inputs, block by block: 512 samples, shifted by 128, overlapping outputs added."""
    masks, signals = map(session, paths)
    states = [np.zeros((1, 2, 128, 2), np.float32)] * 2
    block, added = np.zeros(512, np.float32), np.zeros(512, np.float32)
    for start in range(0, len(audio) - 127, 128):
        block = np.concatenate([block[128:], audio[start : start + 128]])
        spectrum = np.fft.rfft(block)
        first = {"input_2": np.abs(spectrum).astype(np.float32)[None, None], "input_3": states[0]}
        mask, state = masks.run(None, first)
        estimate = np.fft.irfft(mask.squeeze() * spectrum).astype(np.float32)
        second = {"input_4": estimate[None, None], "input_5": states[1]}
        signal, other = signals.run(None, second)
        states = [state, other]
        added = np.concatenate([added[128:], np.zeros(128, np.float32)]) + signal.squeeze()
        yield added[:128].copy(), first, second


def output(paths, audio):
    return np.concatenate([samples for samples, _, _ in denoised(paths, audio)])


def snr(reference, signal):
    return 10 * np.log10(np.sum(reference**2) / np.sum((signal - reference) ** 2))


@pytest.fixture(scope="module")
def vad():
    """The recording, and for calibration the first 15 s of it at both rates that the model has LSTMs for."""
    audio = recording()
    first = audio[: 15 * RATE]
    batches = [inputs for rate in (RATE, RATE // 2) for _, inputs in speech(VAD, first[:: RATE // rate], rate)]
    return audio, decisions(VAD, audio), batches


@pytest.mark.parametrize("config", [Quantize("int8"), LowRank("activation", keep=KEEP)], ids=["int8", "activation"])
def test_speech_is_found_where_it_was(config, vad, tmp_path):
    audio, expected, batches = vad
    weighted = batches if isinstance(config, LowRank) else None
    report = compress_onnx(VAD, config, tmp_path / "small.onnx", batches=weighted)
    assert report.lstm.bytes_after <= report.lstm.bytes_before / 2
    assert report.model.bytes_after == (tmp_path / "small.onnx").stat().st_size < report.model.bytes_before
    if weighted:
        assert all(site.rank is not None for site in find_matrices(read_tensors(tmp_path / "small.onnx")))
    agreement = np.mean(decisions(tmp_path / "small.onnx", audio) == expected)
    print(f"{config}: {agreement:.4f} of {len(expected)} frames; LSTM {report.lstm}; file {report.model}")
    assert 0.2 < expected.mean() < 0.9
    assert agreement >= 0.99


@pytest.fixture(scope="module")
def dtln():
    """20 s of the recording, the dense output of the last 15 s, and what both models take in the first 5 s."""
    audio = recording()[: 20 * RATE]
    blocks = list(denoised(DTLN, audio))
    first = 5 * RATE // 128
    inputs = [[block[which] for block in blocks[:first]] for which in (1, 2)]
    return audio, np.concatenate([block[0] for block in blocks]), inputs


@pytest.mark.parametrize("method", ["svd", "activation", "int8"])
def test_denoised_speech_is_what_it_was(method, dtln, tmp_path):
    audio, expected, inputs = dtln
    config = Quantize("int8") if method == "int8" else LowRank(method, keep=KEEP)
    paths = [tmp_path / path.name for path in DTLN]
    for source, path, batches in zip(DTLN, paths, inputs, strict=True):
        report = compress_onnx(source, config, path, batches=batches if method == "activation" else None)
        assert report.lstm.bytes_after <= report.lstm.bytes_before / 2
        print(f"{source.name} {method}: LSTM {report.lstm}; file {report.model}")
    found, held_out = output(paths, audio), slice(5 * RATE, None)
    ratio = snr(expected[held_out], found[held_out])
    print(f"{method}: {ratio:.1f} dB")
    assert ratio >= 20
