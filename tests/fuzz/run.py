"""Coverage-guided fuzzing of the parsers of file headers, by atheris (libFuzzer for Python).

python tests/fuzz/run.py TARGET [--seconds N] [--corpus DIR]

The exit code is 1 if an input ended in anything but a result or a `BitllmError`, took longer than
ten seconds or more than two gigabytes; the input is kept in the corpus' directory under the name
that is printed.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

import atheris

with atheris.instrument_imports(include=["bitllm.formats"]):
    # The finder of an editable install would load modules as they are.
    for finder in [each for each in sys.meta_path if "editable" in type(each).__module__]:
        sys.meta_path.remove(finder)
    from fuzz.targets import TARGETS, attempt

from gguf_files import gguf_bytes

SECONDS_FOR_ONE = 10
MEGABYTES = 2048
LONGEST = 4096


def seeds(target: str) -> list[bytes]:
    """Return whole files for the fuzzer to begin with."""
    if target == "safetensors":
        entry = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
        fields = {"__metadata__": {"format": "pt"}, "a": entry}
        header = json.dumps(fields).encode()
        return [struct.pack("<Q", len(header)) + header + bytes(8), struct.pack("<Q", 2) + b"{}"]
    if target == "gguf":
        metadata = {"general.architecture": ("str", "llama"), "tokens": ("[str]", ["a", "bc"]),
                    "ids": ("[i32]", [1, 2]), "eps": ("f32", 1e-5)}  # fmt: skip
        return [gguf_bytes(metadata, {}), gguf_bytes(metadata, {"w": ("F32", (2, 4), bytes(32))})]
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
        "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 9, "rms_norm_eps": 1e-5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1},
        "quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]},
    }  # fmt: skip
    return [json.dumps(config).encode(), b"{}"]


def main() -> None:
    """Fuzz one target until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    corpus = arguments.corpus or Path(tempfile.mkdtemp(prefix="bitllm-corpus-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for index, content in enumerate(seeds(arguments.target)):
        (corpus / f"seed-{index}").write_bytes(content)
    target = TARGETS[arguments.target]
    flags = [
        f"-max_total_time={arguments.seconds}",
        f"-timeout={SECONDS_FOR_ONE}",
        f"-rss_limit_mb={MEGABYTES}",
        f"-max_len={LONGEST}",
        f"-artifact_prefix={corpus}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], lambda content: attempt(target, content))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
