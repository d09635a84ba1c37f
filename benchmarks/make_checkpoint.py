"""Write a checkpoint of random ternary weights in the packed Hugging Face format.

    python benchmarks/make_checkpoint.py --shape 2b build/models/2b

What is written, and why it is good enough to measure with: src/bitllm/bench/random_model.py.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from bitllm.bench.random_model import SHAPES, write_checkpoint


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="2b")
    parser.add_argument("--layers", type=int, help="another number of layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--zero-rows",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="share of feed-forward neurons whose gate and up weights are all zero",
    )
    arguments = parser.parse_args()
    if not 0 <= arguments.zero_rows <= 1:
        parser.error("--zero-rows must lie in 0 .. 1")
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = dataclasses.replace(shape, layers=arguments.layers)
    write_checkpoint(arguments.directory, shape, seed=arguments.seed, zero_rows=arguments.zero_rows)
    size = (arguments.directory / "model.safetensors").stat().st_size
    print(f"{arguments.directory}: {size:,} bytes of weights")


if __name__ == "__main__":
    main()
