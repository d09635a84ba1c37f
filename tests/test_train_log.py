"""What a run tells: the live view, the picture, TensorBoard, and what is missing for them."""

from __future__ import annotations

import io
import sys
import types

import pytest
from rich.console import Console

from bitllm.errors import BackendUnavailableError
from bitllm.train.live_view import LiveView, loss_curve
from bitllm.train.run_log import PICTURE_NAME, Progress, TensorBoard, draw_curves

AT = Progress(
    step=20, steps=100, loss=2.5, learning_rate=1e-3, gradient_norm=0.7, strength=0.5,
    tokens_per_second=1234.0, flops_per_second=5e9, seconds_left=90.0, held_out_bpb=1.25,
)  # fmt: skip
ROWS = [
    {"step": 10, "loss": 3.0, "learning_rate": 1e-3, "held_out_bpb": ""},
    {"step": 20, "loss": 2.5, "learning_rate": 5e-4, "held_out_bpb": 1.25},
]


def test_a_line_of_progress():
    assert str(AT) == (
        "step 20/100  loss 2.5000  held out 1.2500 bits/byte  strength 0.500  1234 tok/s  "
        "5.0 GFLOP/s  1.5 min left"
    )


def test_the_live_view_shows_figures_and_a_curve():
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=60, color_system=None)
    with LiveView("tiny", console) as view:
        view(AT)
    text = drawn.getvalue()
    for figure in ("tiny", "20 of 100", "2.5000 nats/token", "1.2500 bits/byte", "1,234 tok/s"):
        assert figure in text


def test_the_curve_falls_with_the_loss():
    assert loss_curve([3.0, 2.0, 1.0], 10) == "█▅▁"
    assert loss_curve([1.0, 1.0], 10) == "▁▁"
    assert len(loss_curve([float(i) for i in range(1000)], 40)) <= 40


def test_the_picture_is_drawn_whole(tmp_path):
    assert draw_curves(tmp_path, ROWS) == tmp_path / PICTURE_NAME
    assert (tmp_path / PICTURE_NAME).read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == [PICTURE_NAME]


def test_without_matplotlib_the_way_to_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match="picture needs Matplotlib"):
        draw_curves(tmp_path, ROWS)


def test_without_tensorboard_the_way_to_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BackendUnavailableError, match="needs the package tensorboard") as caught:
        TensorBoard(tmp_path)
    assert "pip install tensorboard" in caught.value.hint


def test_tensorboard_gets_every_figure(tmp_path, monkeypatch):
    """Against a writer of the same form; the package itself is no dependency."""
    written = {}

    class SummaryWriter:
        def __init__(self, folder):
            written["folder"] = folder

        def add_scalar(self, name, value, step):
            written[name] = (value, step)

        def flush(self):
            written["flushed"] = True

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    TensorBoard(tmp_path).add(AT)
    assert written["folder"] == str(tmp_path / "tensorboard")
    assert written["loss"] == (2.5, 20)
    assert written["held_out_bpb"] == (1.25, 20)
    assert written["flushed"]
