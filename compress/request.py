"""What a user asks of every stage that reads calibration text: which model, where to, on what text, how to compute."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.calibration_rows import Text
from compress.errors import ArtifactError
from compress.stage import Job
from compress.workspace import Source


@dataclass(frozen=True, kw_only=True)
class CalibratedRequest:
    """What decides the artifact beside the stage's own options, and how the run is to be done.

    samples, seq_len: calibration rows, and tokens a row. self_samples: rows sampled from the model itself and added to
    the text; None leaves it to the stage. watch: a second text, to judge on. seed: of sampling. dtype: of the passes
    over the rows. force: replace `out`. resume: take up a killed run.
    """

    source: Source
    out: Path
    calib: str | None = None
    samples: int = 128
    seq_len: int = 512
    self_samples: int | None = None
    watch: str | None = None
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    force: bool = False
    resume: bool = True
    trust_remote_code: bool = False

    @property
    def tops_up(self) -> bool:
        """Whether a short text is topped up with the model's own (`calibration_rows.Text`)."""
        return False

    @property
    def watch_samples(self) -> int:
        """Rows of the watched text: as many as are enough to judge on, whatever is calibrated on."""
        return 32

    def job(self) -> Job:
        """What the driver is told."""
        return Job(
            source=self.source,
            out=self.out,
            text=Text(
                calib=self.calib,
                samples=self.samples,
                seq_len=self.seq_len,
                self_samples=self.self_samples,
                seed=self.seed,
                top_up=self.tops_up,
                watch=self.watch,
                watch_samples=self.watch_samples,
            ),
            dtype=self.dtype,
            device=self.device,
            force=self.force,
            resume=self.resume,
            trust_remote_code=self.trust_remote_code,
        )


def recorded_options(record: Mapping[str, Any], folder: Path, stage: str, known: Collection[str]) -> dict[str, Any]:
    """The fields of the request that made the artifact in `folder`, as its manifest's `record` tells them.

    known: names of those that this version can set. Raises ArtifactError for another stage, or for one more option.
    """
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in record["options"].items()}
    unknown = sorted(set(options) - set(known))
    if record.get("stage") != stage or unknown:
        what = f"option {unknown[0]}" if unknown else f"stage {record.get('stage')!r}"
        raise ArtifactError(
            f"{folder}: its manifest records {what}, which this version cannot run again; quantize its parent "
            f"{record['parent']['path']} yourself with `compress {stage}`"
        )
    return options
