"""Ways to damage a folder or a file, each drawn from one seeded generator: the same seed makes the same damage."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What a value of a JSON file may be replaced by.
VALUES: list[Any] = [
    None, True, False, "", "x", "\ud800", "../../etc/passwd", [], {}, [1, [2]], {"a": 1}, -1, 0, 1, 2, 3, 7, 0.5, -0.0,
    1e-30, 1e30, 1e308, float("nan"), float("inf"), 10**4, 10**7, 10**12, 2**31, 2**63, 2**64, 10**30, "float16", "64",
    "a" * 10_000,
]  # fmt: skip
TEXT_NOISE = [
    b"[" * 50_000,
    b'{"a":' * 2000,
    b"9" * 6000,
    b"\xff\xfe",
    b"\x00" * 64,
    b"null",
    b"[]",
    b'"x"',
    b"",
    b"NaN",
    b"{}",
]
ROWS = [
    b"", b"{}", b"[]", b"3", b"{", b'{"text": null}', b'{"text": 3}', b'{"text": ["a"]}', b'{"text": ""}',
    b'{"text": "\\ud800"}', b'{"text": NaN}', b'{"other": "x"}', b'{"messages": []}', b"[" * 9999, b'{"text": {}}',
]  # fmt: skip


def damage(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """Damage one thing in `folder`, a copy of which nothing else knows; says what was done."""
    ways: list[tuple[int, Callable[..., str]]] = [
        (5, flip_bits), (3, cut), (6, edit_json), (2, spoil_json), (8, change_tensor), (5, edit_header), (4, odd_file),
        (3, edit_index), (1, swap_file), (1, add_file), (1, two_sets),
    ]  # fmt: skip
    for _ in range(20):
        way = rng.choices([w for _, w in ways], [n for n, _ in ways])[0]
        try:
            said = way(rng, folder, others) if way is swap_file else way(rng, folder)
        except Exception:  # it cannot be read any more: an earlier damage was to the same file
            continue
        if said:
            return said
    return flip_bits(rng, folder)


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def pick(rng: random.Random, folder: Path, suffix: str = "") -> Path | None:
    found = [p for p in files_of(folder) if p.name.endswith(suffix)]
    return rng.choice(found) if found else None


def flip_bits(rng: random.Random, folder: Path) -> str:
    path = pick(rng, folder)
    assert path is not None
    data = bytearray(path.read_bytes())
    if not data:
        return ""
    end = rng.choice([64, 2048, len(data)])
    places = [rng.randrange(min(end, len(data))) for _ in range(rng.choice([1, 1, 3, 20]))]
    for at in places:
        data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return f"flip bits of {path.name} at {places[:3]}"


def cut(rng: random.Random, folder: Path) -> str:
    path = pick(rng, folder)
    assert path is not None
    size = path.stat().st_size
    with open(path, "rb+") as f:
        if rng.random() < 0.7:
            length = rng.choice([0, 1, 7, 8, 9, rng.randrange(size + 1), max(0, size - rng.randrange(1, 9))])
            f.truncate(min(length, size))
            return f"cut {path.name} to {min(length, size)} of {size}"
        f.seek(0, 2)
        f.write(rng.randbytes(rng.choice([1, 8, 4096])))
    return f"junk behind {path.name}"


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value can be changed; of a long list or table, some places."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, item) in enumerate(items):
        if number < 200:
            yield from _places(item, (*path, key))


def _changed(rng: random.Random, value: Any) -> tuple[Any, str]:
    """A deep copy of a JSON object with one change, and what it was."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return {"x": 1}, "add x"
    place = rng.choice(places)
    owner = value
    for key in place[:-1]:
        owner = owner[key]
    old, last = owner[place[-1]], place[-1]
    if rng.random() < 0.15:
        del owner[last]
        return value, f"delete {place}"
    if isinstance(old, int | float) and not isinstance(old, bool) and rng.random() < 0.5:
        new: Any = rng.choice(
            [old * 2, old // 2, old + 1, old - 1, old * 1000, -old, old * 10**6, str(old), float(old)]
        )
    elif isinstance(old, str) and rng.random() < 0.5:
        new = rng.choice(
            [old.upper(), old[:-1], old + "x", old.replace("Llama", "Mistral").replace("llama", "mistral")]
        )
    else:
        new = rng.choice(VALUES)
    owner[last] = new
    return value, f"{place} = {str(new)[:40]!a}"


def edit_json(rng: random.Random, folder: Path) -> str:
    path = pick(rng, folder, ".json") if rng.random() < 0.4 else folder / "config.json"
    if path is None or not path.is_file():
        return ""
    value, said = _changed(rng, json.loads(path.read_text(encoding="utf-8")))
    path.write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
    return f"{path.name}: {said}"


def spoil_json(rng: random.Random, folder: Path) -> str:
    path = pick(rng, folder, ".json")
    if path is None:
        return ""
    noise = rng.choice(TEXT_NOISE)
    data = path.read_bytes()
    at = rng.randrange(len(data) + 1)
    path.write_bytes(noise if rng.random() < 0.5 else data[:at] + noise + data[at:])
    return f"noise {noise[:8]!r} in {path.name}"


# ---- safetensors ---------------------------------------------------------------------------------------


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_raw(path: Path, header: bytes, body: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def edit_header(rng: random.Random, folder: Path) -> str:
    path = pick(rng, folder, ".safetensors")
    if path is None:
        return ""
    header, body = header_of(path)
    names = [n for n in header if n != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    kind = rng.choice(["shift", "offset", "dtype", "shape", "swap", "twice", "length", "json", "metadata", "reshape"])
    if kind == "shift":
        step = rng.choice([-4, -2, -1, 1, 2, 4, 2**40])
        entry["data_offsets"] = [n + step for n in entry["data_offsets"]]
    elif kind == "offset":
        entry["data_offsets"][rng.randrange(2)] = rng.choice([0, -1, 1, 2**63, 2**64, 1.5, None, "0", len(body)])
    elif kind == "dtype":
        entry["dtype"] = rng.choice(["F16", "BF16", "I16", "U16", "F32", "I8", "F8_E4M3", "F4", "F99", "", None, 3])
    elif kind == "shape":
        entry["shape"] = rng.choice([[], [0], [-1], [2**40, 2**40], [1.5], None, "64", [True], entry["shape"] + [1]])
    elif kind == "reshape":
        entry["shape"] = entry["shape"][::-1]
    elif kind == "swap":
        header[name], header[other] = header[other], entry
    elif kind == "metadata":
        header["__metadata__"] = rng.choice([None, 3, [], {"format": "tf"}, {"format": 1}, {}])
    text = json.dumps(header).encode()
    if kind == "twice":
        text = text[:-1] + f', "{name}": {json.dumps(entry)}}}'.encode()
    if kind == "json":
        text = rng.choice([text[:-1], b" " + text, text + b"x", b"[" * 5000, b"{" + b'"a":{' * 3000, text + b" " * 64])
    write_raw(path, text, body)
    if kind == "length":
        with open(path, "rb+") as f:
            f.write(struct.pack("<Q", rng.choice([0, 1, 2**32, 2**63, 2**64 - 1, len(text) - 1, len(text) + 8])))
    return f"header of {path.name}: {kind} of {name}"


def change_tensor(rng: random.Random, folder: Path) -> str:
    """A file whose header is right and whose tensors are not the model's."""
    import torch
    from safetensors.torch import load_file, save_file

    path = pick(rng, folder, ".safetensors")
    if path is None:
        return ""
    tensors = load_file(path)
    matrices = [n for n in tensors if tensors[n].ndim == 2] or list(tensors)
    name = rng.choice(matrices if rng.random() < 0.6 else list(tensors))
    value = tensors[name]
    kind = rng.choice(
        [
            "drop",
            "rename",
            "copy",
            "transpose",
            "halve",
            "pad",
            "nan",
            "inf",
            "huge",
            "zero",
            "noise",
            "scale",
            "bias",
            "block",
        ]
        + ["float32", "bfloat16", "int8", "int32", "float8_e4m3fn", "float64", "bool", "complex64", "swap", "empty"]
    )
    if kind == "drop":
        del tensors[name]
    elif kind == "rename":
        tensors[rng.choice(["x", f"{name}x", name.replace("model.", ""), f"model.{name}"])] = tensors.pop(name)
    elif kind == "copy":
        tensors[f"{name}_copy"] = value.clone()
    elif kind == "scale":
        tensors[f"{name}_scale_inv"] = torch.ones(1)
    elif kind == "bias":
        tensors[name.replace("weight", "bias")] = torch.ones(len(value) if value.ndim else 1)
    elif kind == "block":
        tensors[name.replace(".0.", ".9.").replace(".1.", ".9.")] = value.clone()
    elif kind == "swap":
        other = rng.choice([n for n in tensors if tensors[n].shape == value.shape])
        tensors[name], tensors[other] = tensors[other], value
    elif kind == "transpose":
        tensors[name] = value.t() if value.ndim == 2 else value[None]
    elif kind == "halve":
        tensors[name] = value[: max(1, len(value) // 2)] if value.ndim else value
    elif kind == "pad":
        tensors[name] = torch.cat([value, value[:1]]) if value.ndim else value
    elif kind == "empty":
        tensors[name] = value[:0] if value.ndim else value
    elif kind in ("nan", "inf", "huge", "zero", "noise"):
        value = value.clone()
        flat = value.view(-1)
        if value.is_floating_point():
            fill = {
                "nan": float("nan"),
                "inf": float("inf"),
                "huge": torch.finfo(value.dtype).max,
                "zero": 0.0,
                "noise": 9.0,
            }
            flat[rng.randrange(len(flat)) if kind != "zero" else slice(None)] = fill[kind]
        else:
            flat[rng.randrange(len(flat))] ^= 1 << rng.randrange(7)
        tensors[name] = value
    else:
        tensors[name] = value.to(getattr(torch, kind))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    return f"{kind} of {name} in {path.name}"


# ---- files ---------------------------------------------------------------------------------------------


def odd_file(rng: random.Random, folder: Path) -> str:
    path = pick(rng, folder)
    assert path is not None
    kind = rng.choice(["missing", "folder", "pipe", "loop", "dangling", "zero", "null", "empty", "renamed", "linked"])
    if kind == "linked":
        real = path.with_name(f"{path.name}.real")
        path.rename(real)
        path.symlink_to(real.name)
        return f"{path.name} is a link"
    if kind == "renamed":
        path.rename(path.with_name(f"x{path.name}"))
        return f"{path.name} is renamed"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind != "missing":
        targets = {"loop": path.name, "dangling": "nowhere", "zero": "/dev/zero", "null": "/dev/null"}
        path.symlink_to(targets[kind])
    return f"{path.name} is {kind}"


def edit_index(rng: random.Random, folder: Path) -> str:
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return ""
    value = json.loads(path.read_text())
    where = value["weight_map"]
    name, other = rng.choice(list(where)), rng.choice(list(where))
    kind = rng.choice(["wrong", "outside", "gone", "forgot", "more", "kind", "map"])
    if kind == "wrong":
        where[name] = where[other]
    elif kind == "outside":
        where[name] = rng.choice(["../x.safetensors", "/etc/passwd", "", ".", "config.json", 3, None, ["a"]])
    elif kind == "gone":
        (folder / where[name]).unlink()
    elif kind == "forgot":
        del where[name]
    elif kind == "more":
        where["model.layers.7.mlp.up_proj.weight"] = where[name]
    elif kind == "kind":
        value["weight_map"] = rng.choice([None, [], {}, "x", 3])
    else:
        value = rng.choice([[], None, {"weight_map": {name: where[name]}, "metadata": {}}])
    path.write_text(json.dumps(value))
    return f"index: {kind} of {name}"


def swap_file(rng: random.Random, folder: Path, others: list[Path]) -> str:
    """A file of another folder: the config or the weights of another model."""
    donor = rng.choice([o for o in others if o.name != folder.name] or others)
    path = pick(rng, donor)
    assert path is not None
    shutil.copy(path, folder / path.name)
    return f"{path.name} of {donor.name}"


def add_file(rng: random.Random, folder: Path) -> str:
    name, content = rng.choice(
        [
            ("adapter_config.json", b'{"base_model_name_or_path": "org/base", "peft_type": "LORA"}'),
            ("model_index.json", b'{"_class_name": "StableDiffusionPipeline"}'),
            ("model.gguf", b"GGUF"),
            ("pytorch_model.bin", b"\x80\x04"),
            ("model.onnx", b"x"),
            ("compress.json", b"{}"),
            ("chat_template.jinja", b"{{ messages"),
            ("generation_config.json", b"[1"),
            ("model-00001-of-00009.safetensors", b""),
            ("special_tokens_map.json", b"3"),
            ("added_tokens.json", b"[]"),
            ("hf_quant_config.json", b"x"),
        ]
    )
    (folder / name).write_bytes(content)
    return f"{name} is added"


def two_sets(rng: random.Random, folder: Path) -> str:
    """Beside the one file an index with shards of it, equal or not."""
    from safetensors.torch import load_file, save_file

    single = folder / "model.safetensors"
    if not single.is_file() or (folder / "model.safetensors.index.json").exists():
        return ""
    tensors = load_file(single)
    names = sorted(tensors)
    kind = rng.choice(["equal", "differing", "gone"])
    where = {n: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()) if kind != "gone" else ():
        part = {n: tensors[n] * (0.5 if kind == "differing" else 1) for n in names if where[n] == file}
        save_file({n: t.to(tensors[n].dtype) for n, t in part.items()}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return f"two sets of weights, {kind}"


# ---- one file ------------------------------------------------------------------------------------------


def damage_text(rng: random.Random, folder: Path) -> str:
    """Damage the one text file of `folder`: bits, cuts, rows of other kinds, odd files."""
    path = pick(rng, folder)
    assert path is not None
    kind = rng.choice(["bits", "cut", "rows", "rows", "odd", "noise"])
    if kind == "bits":
        return flip_bits(rng, folder)
    if kind == "cut":
        return cut(rng, folder)
    if kind == "odd":
        return odd_file(rng, folder)
    data = path.read_bytes()
    if kind == "noise" or not path.name.endswith(".jsonl"):
        noise = rng.choice(
            [*TEXT_NOISE, b"\r", b"\x1a", b"\xed\xa0\x80", b"\n" * 1000, b"a" * 100_000, b"\xe2\x80\xa8"]
        )
        at = rng.randrange(len(data) + 1)
        path.write_bytes(noise if rng.random() < 0.3 else data[:at] + noise + data[at:])
        return f"noise {noise[:8]!r} in {path.name}"
    rows = data.split(b"\n")
    row = rng.choice(ROWS)
    if rng.random() < 0.3:
        rows = [row] * len(rows)
    else:
        rows[rng.randrange(len(rows))] = row
    path.write_bytes(b"\n".join(rows))
    return f"row {row[:20]!r} in {path.name}"
