"""The rows of token ids that a stage calibrates on: a text's, topped up from the model itself where that helps.

Shapes: N samples, T seq_len
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import calibration, sampling
from compress.calibration import CalibrationSet
from compress.checkpoint import Checkpoint
from compress.errors import ArtifactError, ConfigError
from compress.model import StreamedModel
from compress.tell import SILENT, Tell
from compress.texts import CALIBRATION, WATCHED, Purpose
from compress.tokens import ids_sha256, load_tokenizer

# A stage that learns from the rows adds as many of the model's own as the text has, and more up to ENOUGH_ROWS in all;
# not more than MOST_OWN_ROWS, as they are sampled token by token.
ENOUGH_ROWS = 128
MOST_OWN_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Text:
    """What to calibrate on. calib: see `calibration.load`. samples, seq_len: rows, and tokens a row, at most.

    self_samples: rows sampled from the model itself and added to the text; None: none, or, with `top_up`, as many as
    the text has, and at least what fills it up to `ENOUGH_ROWS`. seed: of sampling. watch: a second text, of which at
    most `watch_samples` rows are added; what is made is judged on them, and never fitted to them.
    """

    calib: str | None = None
    samples: int = 128
    seq_len: int = 512
    self_samples: int | None = None
    seed: int = 0
    top_up: bool = False
    watch: str | None = None
    watch_samples: int = 0


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All rows, int64 `[N, T]`: the text's, then those sampled from the model itself, then the watched text's.

    text, watched: where those came from. notes: for the user.
    """

    ids_NT: Tensor
    text: CalibrationSet
    notes: list[str] = field(default_factory=list)
    watched: CalibrationSet | None = None

    @property
    def num_watched(self) -> int:
        """Rows of the watched text, which are the last."""
        return 0 if self.watched is None else len(self.watched.ids_NT)

    @property
    def num_own(self) -> int:
        """Rows sampled from the model itself and added to the text."""
        return len(self.ids_NT) - len(self.text.ids_NT) - self.num_watched

    def sha256(self) -> str:
        """Of all rows."""
        return ids_sha256(self.ids_NT)

    def to_json(self, out: Path) -> dict[str, Any]:
        """The manifest's `calibration`. A file is named relative to `out`, so that the recipe can run from anywhere."""
        found = {**_text_json(self.text, out), "num_sampled_from_model": self.num_own}
        return found if self.watched is None else {**found, "watched": _text_json(self.watched, out)}


def _text_json(text: CalibrationSet, out: Path) -> dict[str, Any]:
    path = {}
    if text.source.startswith("file:"):
        path = {"path": os.path.relpath(Path(text.source.removeprefix("file:")).resolve(), out.resolve())}
    return {**text.record(), **path}


def read_rows(
    text: Text, model: StreamedModel, *, is_reference: bool, trust_remote_code: bool = False, tell: Tell = SILENT
) -> Rows:
    """The calibration rows. ConfigError when a text gives none, or cannot be read."""
    folder, device = model.checkpoint.path, str(model.device)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)

    def load(spec: str | None, num_samples: int, seq_len: int, purpose: Purpose) -> CalibrationSet:
        return calibration.load(
            spec,
            tokenizer,
            num_samples=num_samples,
            seq_len=seq_len,
            seed=text.seed,
            model=folder,
            is_reference=is_reference,
            vocab_size=model.vocab_size,
            device=device,
            purpose=purpose,
            trust_remote_code=trust_remote_code,
            tell=tell,
        )

    # What is quick is read first: a text that is not there is said before minutes of sampling.
    watched = None if text.watch is None else load(text.watch, text.watch_samples, text.seq_len, WATCHED)
    spec = calibration.chosen_text(
        text.calib, seq_len=text.seq_len, model=folder, is_reference=is_reference, device=device
    )
    if spec == "self" and text.self_samples:
        raise ConfigError(
            "--self-samples adds to a text, but all rows are sampled from the model itself already; raise --samples"
        )
    found = load(text.calib, text.samples, text.seq_len, CALIBRATION)
    seen = [] if watched is None else [watched.ids_NT]
    asked, notes = _own_rows(text, found, model)
    if not asked:
        return Rows(ids_NT=torch.cat([found.ids_NT, *seen]), text=found, notes=notes, watched=watched)
    own_NT = sampling.sample_from_folder(
        folder,
        tokenizer,
        num_samples=asked,
        seq_len=found.ids_NT.shape[1],
        seed=text.seed,
        device=device,
        chat=True,
        trust_remote_code=trust_remote_code,
        tell=tell,
    )
    notes = [f"calibrated on {len(found.ids_NT)} rows of the text and {asked} sampled from the model itself"]
    return Rows(ids_NT=torch.cat([found.ids_NT, own_NT, *seen]), text=found, notes=notes, watched=watched)


def _own_rows(text: Text, found: CalibrationSet, model: StreamedModel) -> tuple[int, list[str]]:
    """How many rows to sample from the model itself, and what to tell the user.

    Learning from some text fits that text. What the model writes itself costs no text and is what the model knows, so
    as much of that is added, unless told otherwise or the model is too large to be sampled from (sampling holds all of
    it in memory).
    """
    if text.self_samples is not None or not text.top_up or found.source == "self":
        return text.self_samples or 0, []
    missing = min(MOST_OWN_ROWS, max(ENOUGH_ROWS - len(found.ids_NT), len(found.ids_NT)))
    size = weight_bytes(model.checkpoint)
    if size > sampling.largest(str(model.device)):
        note = (
            f"the model ({size / 1e9:.1f} GB) was not sampled from for more calibration text: that holds all of it "
            f"in memory and goes token by token; give more text, or pass --self-samples {missing}"
        )
        return 0, [note]
    return missing, []


def weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of all tensors of a folder."""
    return sum(info.num_bytes for info in checkpoint.tensors.values())


def recorded_calib(record: Mapping[str, Any], folder: Path) -> str | None:
    """What to pass as `calib` to get the calibration set again that the manifest's `record` in `folder` tells of.

    ArtifactError, with the way out, when the file is gone.
    """
    told = record["calibration"]
    name = str(told["source"])
    if name.startswith("bundled:"):
        return None  # the default of the bundled model, which the parent then is
    if not name.startswith("file:"):
        return name  # self, or hf:...
    asked = Path(name.removeprefix("file:"))
    recorded = told.get("path")
    found = Path(folder, recorded).resolve() if recorded else asked.resolve()
    path = asked if asked.resolve() == found else Path(os.path.relpath(found))
    if not path.is_file():
        raise ArtifactError(
            f"{folder} was calibrated on {asked}, which is not there any more; put it back at {path}, or make it again "
            f"from {record['parent']['path']} with `compress {record['stage']} --calib FILE`"
        )
    return str(path)
