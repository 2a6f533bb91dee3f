"""A teacher's distributions on disk: its likeliest tokens exactly, and a sample of all others that is right on average.

Of each position are kept the `top_k` likeliest tokens with their probabilities, and `tail` tokens drawn from the rest.
A drawn token stands for an equal share of the probability that the top tokens leave, so the estimate

    p^ = sum over top of p_i e_i  +  (1 - sum over top of p_i) / tail * sum over drawn of e_j

has expectation p, and with it everything linear in p, such as the gradient of forward KL. (Top tokens alone are biased:
"Sparse Logit Sampling", arXiv:2503.16870, which draws independently. Here the draws are systematic: one uniform number
and equal steps along the cumulative distribution, unbiased as well and with less variance.)

A part of the file holds some rows, one array behind the other, little-endian:

    top ids  [R, T, top_k, bytes of an id]   top mass  float32 [R, T, top_k]
    tail ids [R, T, tail, bytes of an id]    entropy   float32 [R, T]

Shapes: R rows of a part, T tokens in a row, P positions, V vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.distill.rows import Batch, Rows, read_rows
from compress.distill.student import Lesson
from compress.errors import ArtifactError, ConfigError
from compress.files import IO_THREADS, file_sha256, read_json
from compress.losses.heads import Head, SparseTeacher

FACTS = "cache.json"
SCHEMA = 1
MOST_TOP = 8
# Float64 probabilities held at once while a distribution is cut down.
_BLOCK = 1 << 23


@dataclass(frozen=True, kw_only=True)
class Settings:
    """top_k: tokens kept exactly (1 to 8). tail: tokens drawn. temperature: of the distribution. seed: of the draws.

    isolate: documents of a row were read as texts of their own. vocabulary: ids that the distribution is over.
    """

    top_k: int = 4
    tail: int = 8
    temperature: float = 1.0
    seed: int = 0
    isolate: bool = False
    vocabulary: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= MOST_TOP or not 1 <= self.tail <= 64:
            raise ConfigError(
                f"--top-k {self.top_k} --tail {self.tail}: a cache keeps 1 to {MOST_TOP} tokens exactly and draws 1 to "
                "64; pass --top-k 4 --tail 8"
            )

    @property
    def id_bytes(self) -> int:
        return 2 if self.vocabulary <= 1 << 16 else 3 if self.vocabulary <= 1 << 24 else 4

    @property
    def token_bytes(self) -> int:
        """Bytes that a position takes."""
        return self.top_k * (self.id_bytes + 4) + self.tail * self.id_bytes + 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Sparse:
    """Distributions cut down: top_PK, tail_PN int64; mass_PK, entropy_P float32 (nats)."""

    top_PK: Tensor
    mass_PK: Tensor
    tail_PN: Tensor
    entropy_P: Tensor

    def cpu(self) -> Sparse:
        return Sparse(
            top_PK=self.top_PK.cpu(),
            mass_PK=self.mass_PK.cpu(),
            tail_PN=self.tail_PN.cpu(),
            entropy_P=self.entropy_P.cpu(),
        )

    def teacher(self, vocabulary: int) -> SparseTeacher:
        num_tail = self.tail_PN.shape[1]
        left_P1 = (1 - self.mass_PK.double().sum(-1, keepdim=True)).clamp(min=0).float()
        return SparseTeacher(
            ids_PK=torch.cat([self.top_PK, self.tail_PN], 1),
            mass_PK=torch.cat([self.mass_PK, (left_P1 / num_tail).expand(-1, num_tail)], 1),
            entropy_P=self.entropy_P,
            vocabulary=vocabulary,
        )


@torch.no_grad()
def cut_down(hidden_PH: Tensor, head: Head, uniform_P: Tensor, settings: Settings) -> Sparse:
    """The head's distributions at some positions, as a cache holds them. uniform_P: float64 in [0, 1)."""
    step = max(1, _BLOCK // head.weight_VH.shape[0])
    parts = [
        _cut_block(head.logits(hidden_PH[rows]) / settings.temperature, uniform_P[rows], settings)
        for rows in (slice(i, i + step) for i in range(0, len(hidden_PH), step))
    ]
    return joined(parts)


def joined(parts: Sequence[Sparse]) -> Sparse:
    """The positions of several, one after the other."""
    return Sparse(
        top_PK=torch.cat([p.top_PK for p in parts]),
        mass_PK=torch.cat([p.mass_PK for p in parts]),
        tail_PN=torch.cat([p.tail_PN for p in parts]),
        entropy_P=torch.cat([p.entropy_P for p in parts]),
    )


def _cut_block(z_PV: Tensor, uniform_P: Tensor, settings: Settings) -> Sparse:
    log_PV = z_PV.double().log_softmax(-1)
    p_PV = log_PV.exp()
    entropy_P = -(p_PV * log_PV).sum(-1)
    mass_PK, top_PK = p_PV.topk(min(settings.top_k, p_PV.shape[1]), dim=-1)
    cumulative_PV = p_PV.scatter(1, top_PK, 0.0).cumsum_(-1)
    place_N = torch.arange(settings.tail, device=z_PV.device, dtype=torch.float64)
    points_PN = (place_N + uniform_P.to(z_PV.device)[:, None]) / settings.tail * cumulative_PV[:, -1:]
    tail_PN = torch.searchsorted(cumulative_PV, points_PN, right=True).clamp_(max=p_PV.shape[1] - 1)
    return Sparse(top_PK=top_PK, mass_PK=mass_PK.float(), tail_PN=tail_PN, entropy_P=entropy_P.float())


def uniforms(rows: Sequence[int], seq_len: int, seed: int) -> Tensor:
    """The numbers that the draws of some rows start from: float64 `[P]`; a row's depend on (seed, row) alone."""
    streams = [np.random.Generator(np.random.PCG64([seed, row])).random(seq_len) for row in rows]
    return torch.from_numpy(np.concatenate(streams))


# ---- bytes -------------------------------------------------------------------------------------------


def to_bytes(sparse: Sparse, settings: Settings) -> bytes:
    """A part of the file: see the module docstring."""
    pieces = (
        _pack_ids(sparse.top_PK, settings.id_bytes),
        sparse.mass_PK.cpu().numpy().astype("<f4").tobytes(),
        _pack_ids(sparse.tail_PN, settings.id_bytes),
        sparse.entropy_P.cpu().numpy().astype("<f4").tobytes(),
    )
    return b"".join(pieces)


def _pack_ids(ids: Tensor, width: int) -> bytes:
    whole = np.ascontiguousarray(ids.cpu().numpy().astype("<u4"))
    return whole.view(np.uint8).reshape(*whole.shape, 4)[..., :width].tobytes()


def _unpack_ids(raw: np.ndarray) -> Tensor:
    """uint8 `[..., width]` to int64 `[...]`."""
    out = np.zeros(raw.shape[:-1], dtype=np.int64)
    for i in range(raw.shape[-1]):
        out |= raw[..., i].astype(np.int64) << (8 * i)
    return torch.from_numpy(out)


class _Part:
    """One part of the file, through a memory map."""

    def __init__(self, path: Path, num_rows: int, seq_len: int, settings: Settings) -> None:
        shape, k, n, b = (num_rows, seq_len), settings.top_k, settings.tail, settings.id_bytes
        raw = np.memmap(path, dtype=np.uint8, mode="r")
        if raw.size != num_rows * seq_len * settings.token_bytes:
            raise ArtifactError(f"{path}: {raw.size} bytes, and its {num_rows} rows take others; make the cache again")
        sizes = [num_rows * seq_len * w for w in (k * b, k * 4, n * b, 4)]
        ends = np.cumsum(sizes)
        top, mass, tail, entropy = (raw[e - s : e] for e, s in zip(ends, sizes, strict=True))
        self.top = top.reshape(*shape, k, b)
        self.mass = mass.view("<f4").reshape(*shape, k)
        self.tail = tail.reshape(*shape, n, b)
        self.entropy = entropy.view("<f4").reshape(*shape)

    def rows(self, indices: Sequence[int]) -> Sparse:
        which = list(indices)
        return Sparse(
            top_PK=_unpack_ids(self.top[which]).flatten(0, 1),
            mass_PK=torch.from_numpy(self.mass[which].astype(np.float32)).flatten(0, 1),
            tail_PN=_unpack_ids(self.tail[which]).flatten(0, 1),
            entropy_P=torch.from_numpy(self.entropy[which].astype(np.float32)).flatten(),
        )


# ---- reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a cache says of itself. part_rows: rows in each part but the last; parts: sha256 of each."""

    settings: Settings
    teacher: Mapping[str, Any]
    rows_sha256: str
    part_rows: int
    parts: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.bin"


def read_facts(folder: Path) -> Facts:
    value = read_json(folder / FACTS)
    if value.pop("schema", None) != SCHEMA:
        raise ArtifactError(f"{folder / FACTS}: not a cache of this version; make it again with `compress teach`")
    return Facts(**{**value, "settings": Settings(**value["settings"])})


class CachedTeacher:
    """Lessons read from a cache. Its rows are those that were taught, and no others."""

    def __init__(self, folder: Path, facts: Facts, rows: Rows) -> None:
        self.facts = facts
        self.rows = rows
        starts = range(0, len(rows), facts.part_rows)
        self._parts = [
            _Part(part_path(folder, i), min(facts.part_rows, len(rows) - s), rows.seq_len, facts.settings)
            for i, s in enumerate(starts)
        ]

    @classmethod
    def open(cls, folder: Path) -> CachedTeacher:
        """Read a cache's facts and compare every file with its hash. ArtifactError names one that is not as written."""
        facts = read_facts(folder)
        rows = read_rows(folder, check=True)
        if rows.sha256 != facts.rows_sha256:
            raise ArtifactError(f"{folder}: its rows are not those that were taught; make it again")
        with ThreadPoolExecutor(IO_THREADS) as pool:
            paths = [part_path(folder, i) for i in range(len(facts.parts))]
            for path, expected, found in zip(paths, facts.parts, pool.map(_hash, paths), strict=True):
                if found != expected:
                    raise ArtifactError(f"{path}: its content is not what was written; make the cache again")
        return cls(folder, facts, rows)

    def refuse_other(self, folder: Path, *, teacher: Path, sha256: str, temperature: float, isolate: bool) -> None:
        """ConfigError, naming both, when the cache is another teacher's or was made in another way."""
        settings = self.facts.settings
        if self.facts.teacher["sha256"] != sha256:
            raise ConfigError(
                f"cache {folder} holds the word of {self.facts.teacher['path']} ({self.facts.teacher['sha256'][:12]}), "
                f"and the teacher is {teacher} ({sha256[:12]}); pass that teacher, or make a cache with `compress "
                "teach`"
            )
        for option, theirs, mine in (
            ("--temperature", settings.temperature, temperature),
            ("--isolate-documents", settings.isolate, isolate),
        ):
            if theirs != mine:
                raise ConfigError(
                    f"cache {folder} was made with {option} {theirs} and {mine} is asked for; use the same in both, or "
                    "make another cache with `compress teach`"
                )

    def lesson(self, batch: Batch) -> Lesson:
        found = [self._parts[i // self.facts.part_rows].rows([i % self.facts.part_rows]) for i in batch.rows]
        device = batch.ids_BT.device
        sparse = Sparse(
            top_PK=torch.cat([f.top_PK for f in found]).to(device),
            mass_PK=torch.cat([f.mass_PK for f in found]).to(device),
            tail_PN=torch.cat([f.tail_PN for f in found]).to(device),
            entropy_P=torch.cat([f.entropy_P for f in found]).to(device),
        )
        return Lesson(teacher=sparse.teacher(self.facts.settings.vocabulary))


def _hash(path: Path) -> str:
    return file_sha256(path) if path.is_file() else "gone"
