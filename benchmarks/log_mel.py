"""How fast log-mel frames are made, beside transformers' WhisperFeatureExtractor.

    python benchmarks/log_mel.py            64 recordings of 10 s
    python benchmarks/log_mel.py --smoke    a few of 1 s

80 bins, 16 kHz, both without padding to 30 s, on one thread of a CPU. The extractor's numpy path is the one that it takes where
torch is not installed; its torch path is timed too. Process CPU time, interleaved rounds, the smallest; and the largest difference.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from transformers import WhisperFeatureExtractor

from clipscale.data.speech import collate_speech, prepare_speech
from clipscale.inputs import SpeechInput


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a few short recordings")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    threadpool_limits(1)  # numpy's matrix products too: threads that wait for work would count as CPU time
    seconds, count, rounds = (1, 3, 1) if smoke else (10, 64, 5)
    draws = np.random.default_rng(0)
    waves = [(0.1 * draws.standard_normal(16_000 * seconds)).astype(np.float32) for _ in range(count)]
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=seconds)
    spec = SpeechInput(features="whisper_log_mel", num_mels=80, max_seconds=float(seconds), pad_to_max=True)
    frames: dict[str, np.ndarray] = {}

    def ours() -> None:
        frames["ours"] = prepare_speech(collate_speech(waves, spec), spec)["mel"].numpy()

    def theirs_numpy() -> None:
        frames["numpy"] = extractor._np_extract_fbank_features(np.stack(waves), "cpu")

    def theirs_torch() -> None:
        frames["torch"] = extractor._torch_extract_fbank_features(np.stack(waves), "cpu")

    taken: dict[str, list[float]] = {"ours": [], "numpy": [], "torch": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("numpy", theirs_numpy), ("torch", theirs_torch)):
            begun = time.process_time()
            run()
            taken[name].append(time.process_time() - begun)
    fastest = {name: min(times) for name, times in taken.items()}
    measured = {
        "ours over WhisperFeatureExtractor's numpy path": round(fastest["numpy"] / fastest["ours"], 2),
        "ours over WhisperFeatureExtractor's torch path": round(fastest["torch"] / fastest["ours"], 2),
        "largest difference": {name: float(np.abs(frames["ours"] - frames[name]).max()) for name in ("numpy", "torch")},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "numpy")}},
    }
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
