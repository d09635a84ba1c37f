"""Write the tables of docs/formats.md from conversions that are made here and compared.

python docs/generate_formats.py            rewrite the tables
python docs/generate_formats.py --check    exit 1 if they are not what this would write

Small models of random weights are written in every format, read back, compared, and converted back
to the first format. So a "yes" in the table is a comparison that has just been made. The types that
are only read, or refused, are those of the reader's own table.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "formats.md"
BEGIN, END = "<!-- tables: written by docs/generate_formats.py -->\n", "<!-- end of tables -->\n"
sys.path.insert(0, str(ROOT / "tests"))
os.environ["BITLLM_DEVICE"] = "reference"

from bitllm.convert import plan_conversion, run_conversion  # noqa: E402
from bitllm.formats.gguf.ggml_types import GGML_TYPES  # noqa: E402
from model_directories import SUB_NORMS, write_huggingface  # noqa: E402

BITNET: dict[str, Any] = {**SUB_NORMS, "activation": "relu2", "tied_head": True}
LLAMA: dict[str, Any] = {"activation": "silu"}
MODELS = {"BitNet": ("multiply", BITNET), "Llama": ("divide", LLAMA)}
TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "Hugging Face, scale multiplies (`autobitlinear`)": ("out", {"convention": "multiply"}),
    "Hugging Face, scale divides (no `linear_class`)": ("out", {"convention": "divide"}),
    "MLX, affine 2-bit": ("out", {"to": "mlx"}),
    "GGUF I2_S (128/32 layout)": ("out.gguf", {"kind": "i2_s"}),
    "GGUF TQ2_0": ("out.gguf", {"kind": "tq2_0"}),
    "GGUF TQ1_0": ("out.gguf", {"kind": "tq1_0"}),
}
HEAD = (
    "| format | read | written | codes | scales of a BitNet (multiply, bf16) | "
    "scales of a Llama (divide, bf16) | back to the same safetensors bytes |"
)


def row(name: str, folder: Path) -> str:
    """Convert both models into a format and back; return the line of the table."""
    suffix, options = TARGETS[name]
    scales, same = [], []
    for model, (convention, switches) in MODELS.items():
        place = folder / f"{len(list(folder.iterdir()))}"
        place.mkdir()
        source = write_huggingface(place / "source", convention, **switches)
        # Raises if a code, or anything that the format can hold, comes back different.
        found = run_conversion(plan_conversion(source, place / suffix, **options)).verification
        assert found is not None
        assert found.logits_error is not None, f"{name}, {model}: {found.logits_skipped}"
        scales.append("equal" if found.scale_error == 0 else f"within {_bound(found.scale_error)}")
        back = plan_conversion(
            place / suffix, place / "back", to="huggingface", convention=convention
        )  # type: ignore[arg-type]
        run_conversion(back)
        weights = [place / name / "model.safetensors" for name in ("source", "back")]
        same.append(weights[0].read_bytes() == weights[1].read_bytes())
    returned = [model for model, equal in zip(MODELS, same, strict=True) if equal]
    verdict = "yes" if all(same) else f"{' and '.join(returned)} only" if returned else "no"
    return f"| {name} | yes | yes | equal | {scales[0]} | {scales[1]} | {verdict} |"


def _bound(error: float) -> str:
    """Return the power of two that is not exceeded; the random scales decide the rest."""
    power = 0
    while 2.0 ** (power - 1) >= error:
        power -= 1
    return f"2^{power}"


def tables() -> Iterator[str]:
    """Yield the lines between the markers."""
    yield HEAD
    yield "|" + "---|" * HEAD.count(" |")
    with tempfile.TemporaryDirectory() as folder:
        for name in TARGETS:
            yield row(name, Path(folder))
    yield ""
    kinds: dict[str, list[str]] = {}
    for types in GGML_TYPES.values():
        for kind in types:
            if kind.name not in kinds.setdefault(kind.kind, []):
                kinds[kind.kind].append(kind.name)
    yield "| types of tensors in GGUF files | |"
    yield "|---|---|"
    yield f"| read as ternary matrices | {', '.join(kinds['ternary'])} |"
    yield f"| read as embeddings, heads, norms | {', '.join(kinds['float'] + kinds['quantized'])} |"
    yield f"| recognised and refused | {', '.join(kinds['refused'])} |"


def main() -> int:
    """Write or check the tables; return the exit code."""
    page = PAGE.read_text(encoding="utf-8")
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        print(f"{PAGE}: the markers of the tables are missing")
        return 1
    wanted = before + BEGIN + "\n" + "\n".join(tables()) + "\n\n" + END + after
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(wanted, encoding="utf-8")
    elif wanted != page:
        print("docs/formats.md: the tables are out of date; run: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
