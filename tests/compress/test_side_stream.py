"""What captures share, as far as a CPU shows it."""

import torch

from compress.side_stream import first_cause, side_stream


def test_there_is_no_stream_on_a_cpu() -> None:
    with side_stream(torch.device("cpu")):
        assert float(torch.ones(3).sum()) == 3


def test_the_cause_is_what_broke_and_not_what_then_failed() -> None:
    try:
        try:
            raise ValueError("the model asks the GPU\nand more")
        finally:
            raise RuntimeError("the capture was broken")
    except RuntimeError as e:
        assert first_cause(e) == "the model asks the GPU"
    assert first_cause(RuntimeError("alone")) == "alone"
    assert first_cause(NotImplementedError()) == "NotImplementedError"
