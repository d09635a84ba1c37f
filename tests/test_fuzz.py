"""A short run of each coverage-guided fuzzer; `make fuzz` runs them longer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "fuzz" / "run.py"
SECONDS = 20


def fuzz(target: str, corpus: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, str(RUN), target, "--corpus", str(corpus), *options],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=SECONDS + 100,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["safetensors", "gguf", "config"])
def test_no_input_breaks_a_reader(target: str, tmp_path: Path) -> None:
    done = fuzz(target, tmp_path, "--seconds", str(SECONDS))
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    found = re.search(r"new_units_added:\s+(\d+)", done.stderr)
    assert runs is not None
    assert int(runs[1]) > 1000
    # Inputs that reached further into the code than the seeds: the fuzzer sees its branches.
    assert found is not None
    assert int(found[1]) > 5
