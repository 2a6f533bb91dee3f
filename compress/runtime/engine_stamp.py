"""What a TensorRT engine is for, read from the stamp beside it before anything is loaded: card, library, shapes.

TensorRT's own refusals come late and as numbers; these come first and in words. Whatever is decided here needs no GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compress.errors import ArtifactError, ConfigError
from compress.files import read_json

ENGINE = "model.engine"
STAMP = "model.engine.json"
VERSION = 1
LIBRARIES = ("tensorrt", "tensorrt_rtx")
_FIELDS: Mapping[str, type] = {
    "library": str, "version": str, "sm": str, "capacity": int, "profiles": list, "shapes": dict, "caches": dict,
    "caches_in_place": bool, "engine_bytes": int, "onnx_data_bytes": int,
}  # fmt: skip
Role = Literal["prefill", "decode"]
Shapes = Mapping[str, Mapping[str, list[int]]]


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """An engine. profiles: names in the engine's order; shapes: by profile, input and `min`, `opt`, `max`.

    library: module that built it and loads it. caches: input -> the output that continues it. weight_bytes: of the
    graph that it was built from.
    """

    folder: Path
    library: str
    version: str
    sm: str
    capacity: int
    profiles: tuple[str, ...]
    shapes: Mapping[str, Shapes]
    caches: Mapping[str, str]
    caches_in_place: bool
    engine_bytes: int
    weight_bytes: int

    @property
    def package(self) -> str:
        """What pip calls the library."""
        return self.library.replace("_", "-")

    def profile(self, role: Role) -> int:
        """Index of the profile for a role: its own, or the one that does both."""
        return self.profiles.index(role if role in self.profiles else "any")

    def batches(self, role: Role) -> tuple[int, int]:
        """Fewest and most sequences of a call."""
        ids = self.shapes[self.profiles[self.profile(role)]]["input_ids"]
        return ids["min"][0], ids["max"][0]

    @property
    def longest(self) -> int:
        """Most prompt tokens of a call."""
        return self.shapes[self.profiles[self.profile("prefill")]]["input_ids"]["max"][1]

    def pieces(self, length: int) -> list[tuple[int, int]]:
        """A prompt of so many tokens as calls, `(start, stop)` each."""
        return [(start, min(start + self.longest, length)) for start in range(0, length, self.longest)]

    def refuse_request(self, capacity: int, batch: int) -> None:
        """ConfigError for more tokens or other batches than the engine was built for."""
        if capacity > self.capacity:
            raise ConfigError(
                f"{self.folder}: {capacity} tokens are asked for and its caches hold {self.capacity}; ask for fewer "
                "(--max-new-tokens), or export again with a larger --context"
            )
        low = max(self.batches("prefill")[0], self.batches("decode")[0])
        high = min(self.batches("prefill")[1], self.batches("decode")[1])
        if not low <= batch <= high:
            taken = str(low) if low == high else f"{low} to {high}"
            raise ConfigError(
                f"{self.folder}: a batch of {batch} is asked for and its profiles take {taken}; ask for that, or "
                f"export again with --batch {batch}"
            )

    def refuse_elsewhere(self, sm: str | None, version: str | None) -> None:
        """ConfigError unless this is its card and its library. sm, version: of this machine, None where absent."""
        if sm is None:
            raise ConfigError(
                f"{self.folder} is an engine for a GPU of SM {self.sm}, and PyTorch sees none here; take it there, or "
                "`compress doctor` says why"
            )
        if sm != self.sm:
            raise ConfigError(
                f"{self.folder} is an engine for SM {self.sm}, and the GPU here is SM {sm}; export again for this one, "
                "or run the artifact itself"
            )
        if version != self.version:
            found = "is not installed" if version is None else f"is {version} here"
            raise ConfigError(
                f"{self.folder} was built with {self.library} {self.version}, which {found}; pip install "
                f"{self.package}=={self.version}, or export again"
            )


def read(folder: Path) -> Stamp:
    """The stamp of a folder's engine. ArtifactError where it is missing, foreign, or not that engine's."""
    path = folder / STAMP
    if not path.is_file():
        raise ArtifactError(
            f"{folder}: {ENGINE} has no {STAMP} beside it, so it cannot be told what it runs on; build it with the "
            "build_engine.py of its export"
        )
    found = read_json(path)
    try:
        stamp = _stamp(folder, found)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:
        raise ArtifactError(f"{path}: not a stamp that build_engine.py wrote ({e!r}); build the engine again") from e
    if found.get("stamp") != VERSION:
        raise ArtifactError(f"{path}: stamp {found.get('stamp')} is not {VERSION}; build the engine again")
    size = (folder / ENGINE).stat().st_size if (folder / ENGINE).is_file() else 0
    if size != stamp.engine_bytes:
        raise ArtifactError(
            f"{folder / ENGINE} has {size} bytes, and its stamp says {stamp.engine_bytes}; build the engine again"
        )
    return stamp


def _stamp(folder: Path, found: Mapping[str, Any]) -> Stamp:
    """The stamp of a JSON object. Raises what Python raises where it is none, also for a library that is not ours."""
    for key, kind in _FIELDS.items():
        if type(found[key]) is not kind:
            raise TypeError(f"{key} is {found[key]!r}")
    if found["library"] not in LIBRARIES:  # it will be imported
        raise ValueError(f"library is {found['library']!r}")
    fields = {key: found[key] for key in _FIELDS if key not in ("profiles", "onnx_data_bytes")}
    stamp = Stamp(
        folder=folder, profiles=tuple(found["profiles"]), weight_bytes=int(found["onnx_data_bytes"]), **fields
    )
    for name in stamp.profiles:
        for shapes in stamp.shapes[name].values():
            if not all(type(n) is int and n > 0 for label in ("min", "max") for n in shapes[label]):
                raise ValueError(f"shapes of {name} are not counts")
    if not all(name in stamp.shapes[stamp.profiles[0]] for name in stamp.caches):
        raise ValueError("caches without shapes")
    if stamp.longest > stamp.capacity or stamp.batches("decode")[0] > stamp.batches("prefill")[1]:
        raise ValueError("profiles that do not go together")
    return stamp
