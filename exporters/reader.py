"""What an export format is: the layout its reader needs, and a function that writes and proves a folder.

A format is a module with two names:

    LAYOUT: Layout                   what its reader demands of the artifact's quantized weights
    write(job: Job) -> Written       write `job.staged`, run what was written, compare it with the artifact

`write` raises UnsupportedError for a model that the format cannot hold ("not supported by FORMAT yet", naming the
architecture), and ArtifactError when what it wrote does not compute what the artifact says. The driver
(`exporters.export`) resolves the artifact, checks that it fits the target, quantizes it again where the layout asks for
that, adds the manifest, and renames the staged folder into place: a format never does any of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from compress.checkpoint import Checkpoint
from compress.contents import SMALL_BYTES, Checked, check_files
from compress.formats import Stored, stored
from compress.model import StreamedModel
from compress.plan import LayerPlan, LayerScheme
from compress.scheme import Scheme
from compress.tell import SILENT, Tell
from exporters.readme import Usage
from exporters.sizing.inventory import Model, read_model
from exporters.sizing.targets import Target


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a reader demands of quantized weights; an unquantized folder always passes.

    num_bits, group_sizes: what it reads (None: anything). symmetric: every zero point must be 2**(num_bits - 1).
    Of INT8 (`is_int8`), which is taken as it is or refused: w8_group_sizes, those of weights whose inputs stay floats
    (-1: one scale a row; None: any); w8a8, the input quantizers, as `ActivationScheme.label` calls them.
    """

    num_bits: tuple[int, ...] = (4,)
    group_sizes: tuple[int, ...] | None = None
    symmetric: bool = False
    w8_group_sizes: tuple[int, ...] | None = ()
    w8a8: tuple[str, ...] = ()

    def wants(self, scheme: Scheme) -> Scheme | None:
        """The scheme to quantize again with, or None when `scheme` will do. The smallest change that fits."""
        num_bits = scheme.num_bits if scheme.num_bits in self.num_bits else self.num_bits[0]
        sizes = self.group_sizes
        group_size = scheme.group_size if sizes is None or scheme.group_size in sizes else sizes[0]
        wanted = Scheme(num_bits=num_bits, group_size=group_size, symmetric=scheme.symmetric or self.symmetric)
        return None if wanted == scheme else wanted

    def takes_int8(self, scheme: LayerScheme) -> bool:
        """Whether it reads INT8 layers of this scheme. Readers take symmetric weights only, integer products with one
        scale a row."""
        weight = scheme.weight
        if weight is None or weight.num_bits != 8 or not weight.symmetric:
            return False
        if scheme.input is not None:
            return weight.group_size == -1 and scheme.input.label() in self.w8a8
        return self.w8_group_sizes is None or weight.group_size in self.w8_group_sizes


def is_int8(scheme: LayerScheme) -> bool:
    """Weights of 8 bits or inputs as integers. No reader is given other codes in their place: 4 bits are not 8."""
    return scheme.input is not None or (scheme.weight is not None and scheme.weight.num_bits == 8)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What an export reads, each thing opened once and then carried along."""

    path: Path

    @cached_property
    def folder(self) -> Stored:
        """Its headers, and its quantized layers as its config states them."""
        return stored(Checkpoint.open(self.path))

    @cached_property
    def plan(self) -> LayerPlan:
        """Its layers as their codes are: AutoAWQ's config does not say whether they are symmetric."""
        return self.folder.exact_plan()

    @cached_property
    def model(self) -> Model:
        """Its inventory, for sizing. A folder with nothing but a config has one too."""
        return read_model(self.path)

    @cached_property
    def streamed(self) -> StreamedModel:
        """The model of its config, names and shapes of all tensors compared with it. UnsupportedError where unknown."""
        return StreamedModel.open(self.path)

    @cached_property
    def checked(self) -> Checked:
        """The hash of every file, compared with its manifest's: all bytes, read once."""
        return check_files(self.path, known=self._small.hashes)

    @cached_property
    def _small(self) -> Checked:
        return check_files(self.path, below=SMALL_BYTES)

    def look(self) -> None:
        """Compare the small files with the manifest, so that no message is about what a damaged one says."""
        assert self._small is not None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export. `staged` is an empty folder; `context` and `batch` count tokens and sequences.

    opened: the artifact as the driver opened it; else it is opened when it is asked for.
    """

    artifact: Path
    target: Target
    context: int
    batch: int
    staged: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    tell: Tell = SILENT
    opened: Artifact | None = None

    @cached_property
    def source(self) -> Artifact:
        """The artifact, opened."""
        return self.opened or Artifact(path=self.artifact)

    def say(self, text: str) -> None:
        """One line, now."""
        self.tell.say(text)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a format made.

    record: JSON for the manifest (versions of the tools used, dialect, and under `verified` the tolerance and the
    largest difference seen). parts: bytes by name of part, such as `decoder linears`, `lm_head`, `embedding`. hashes:
    sha256 of those files in `staged` that the format knows; the driver takes that of the others. usage: how it is run,
    of which the driver writes README.md.
    """

    record: dict[str, Any]
    parts: dict[str, int]
    notes: list[str] = field(default_factory=list)
    hashes: Mapping[str, str] = field(default_factory=dict)
    usage: Usage | None = None
