"""DTLN removes noise from speech, 8 ms at a time: two ONNX files of two LSTMs each, compressed from ONNX to ONNX."""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from registry import arguments, data, show, speech

import slimlstm as sl
from slimlstm.bench import interleaved_seconds, median_ratios
from slimlstm.onnx.compress import compress_onnx
from slimlstm.search import shrink_onnx

FRAME, HOP, MEASURE = 512, 128, "1 - noise / signal"


def sessions(paths):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return [onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths]


def run(session, frame, state):
    """Return the output of one frame [1, 1, N], the state after it, and the inputs by name."""
    inputs = dict(zip((entry.name for entry in session.get_inputs()), (frame, state), strict=True))
    return *session.run(None, inputs), inputs


def denoised(first, second, sound, seen=([], [])):
    """Return the sound [samples] without its noise; append the inputs of both networks to ``seen``."""
    states, out = [np.zeros((1, 2, 128, 2), np.float32)] * 2, np.zeros_like(sound)
    for start in range(0, len(sound) - FRAME + 1, HOP):
        spectrum = np.fft.rfft(sound[start : start + FRAME])
        mask, states[0], inputs = run(first, np.abs(spectrum).astype(np.float32)[None, None], states[0])
        seen[0].append(inputs)
        estimate = np.fft.irfft(spectrum * mask[0, 0]).astype(np.float32)[None, None]
        frame, states[1], inputs = run(second, estimate, states[1])
        seen[1].append(inputs)
        out[start : start + FRAME] += frame[0, 0]
    return out


paths = [data(f"dtln/model_{part}.onnx") for part in (1, 2)]
dense, clean = sessions(paths), speech().numpy()
sound = clean + np.random.default_rng(0).normal(0, 0.3 * clean.std(), len(clean)).astype(np.float32)
length = 40_000 if arguments().brief else 160_000
batches, validation, test = ([], []), sound[-2 * length : -length], sound[-length:]
denoised(*dense, sound[:80_000], batches)
expected = {id(part): denoised(*dense, part) for part in (validation, test)}


def quality(pair, part):
    return 1 - float(((denoised(*pair, part) - expected[id(part)]) ** 2).sum() / (expected[id(part)] ** 2).sum())


def quality_with(part):
    """Return the metric of a file in the place of one of the two networks."""
    return lambda path: quality([*sessions([path]), dense[1]] if part == 0 else [dense[0], *sessions([path])], validation)


short, rows, calls = test[:8_000], [], {"dense": lambda: denoised(*dense, short)}
configs = {
    "int8": sl.Quantize("int8"),
    "activation 80%, int8": sl.LowRank("activation", keep=0.8, storage="int8"),
    "activation 50%": sl.LowRank("activation", keep=0.5),
}
with tempfile.TemporaryDirectory() as folder:
    small = [Path(folder) / path.name for path in paths]
    options = {"better": "higher", "evaluations": 3 if arguments().brief else 10}
    began = time.monotonic(), time.process_time()
    # Both networks together may lose 1%.
    found = [
        shrink_onnx(
            path, small[part], batches[part], at_most="0.5%", metric=quality_with(part), metric_name=MEASURE, **options
        )
        for part, path in enumerate(paths)
    ]
    cost = {"seconds": time.monotonic() - began[0], "processor_seconds": time.process_time() - began[1]}
    made = {"smallest within 1%": (sessions(small), [site for one in found for site in one.report.sites])}
    for label, config in configs.items():
        jobs = zip(paths, small, batches, strict=True)
        sites = [site for job in jobs for site in compress_onnx(job[0], config, job[1], batches=job[2]).sites]
        made[label] = sessions(small), sites
for label, (pair, sites) in made.items():
    before, after = sum(site.bytes_before for site in sites), sum(site.bytes_after for site in sites)
    calls[label] = lambda pair=pair: denoised(*pair, short)
    row = {"variant": label, "bytes": [before, after], "kept": after / before, "quality": quality(pair, test)}
    rows.append(row | {"snr_db": -10 * np.log10(1 - row["quality"])})
faster = median_ratios(interleaved_seconds(calls), "dense")
for row in rows:
    row["faster"] = faster[row["variant"]]
searches = [one.to_dict() | {"evaluations": 1 + len(one.trials)} for one in found]
show("dtln", MEASURE, rows, arguments(), cost | {"networks": searches})
for part, one in enumerate(found if arguments().output else []):
    one.report.to_html(arguments().output / f"dtln_{part + 1}.html", title=f"dtln, network {part + 1}", trials=one)
