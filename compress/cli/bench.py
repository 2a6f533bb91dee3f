"""`compress bench`: how quick folders or a server are, as `evaluators.latency` and `evaluators.endpoint` measure it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.help import Command

if TYPE_CHECKING:
    from evaluators.latency import Settings, Subject


@click.command("bench", cls=Command)
@click.argument("models", nargs=-1)
@click.option("--prompt-len", type=click.IntRange(1), default=128, show_default=True, help="Tokens of the prompt.")
@click.option("--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens made after it.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Measured rounds, in turns.")
@click.option(
    "--graphs", default="on", show_default=True, help="CUDA Graphs with --runtime gpu or tensorrt: on, off, or on,off."
)
@click.option(
    "--runtime",
    type=click.Choice(["auto", "gpu", "torch", "onnx", "tensorrt"]),
    default="auto",
    show_default=True,
    help="gpu: our decode kernels; torch: transformers' forward; onnx: ONNX Runtime; tensorrt: an engine.",
)
@click.option("--endpoint", metavar="URL", help="Measure an OpenAI-compatible server instead of folders.")
@click.option("--model", "served", help="With --endpoint: the served model's name [default: the first it offers].")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write the result file (vLLM's names) here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the times between tokens into this PNG or SVG.")
@click.option("--json", "as_json", is_flag=True, help="Print the result file instead of a table.")
def command(
    models: tuple[str, ...],
    graphs: str,
    runtime: Any,
    endpoint: str | None,
    served: str | None,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
    **lengths: int,
) -> None:
    """Measure MODELS (folders or hub ids; without any, the newest artifact and its original) in turns in one run.

    \b
      compress bench artifacts/NAME-awq-w4g128 ORIGINAL --new-tokens 256

    First-token time, time between tokens (p50, p90, p99), tokens a second, share of the bandwidth measured in the same
    run, and each one's ratio to the first with its interval. Exit code 1 when nothing could be measured.
    """
    from evaluators.latency import Settings

    settings = Settings(**lengths)
    _refuse_places(out, plot)
    if endpoint:
        found = _endpoint(endpoint, served, settings)
    else:
        found = _folders(models, graphs, runtime, settings, quiet=as_json)
    text = json.dumps(found, indent=2) + "\n"
    if out is not None:
        out.write_text(text, encoding="utf-8")
    if plot is not None:
        _draw(found, plot)
    if as_json:
        print(text, end="")
    else:
        _print(found)


def _refuse_places(*paths: Path | None) -> None:
    from compress.errors import ConfigError

    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.absolute().parent} does not exist; make it, or pass another")


def _folders(models: tuple[str, ...], graphs: str, runtime: Any, settings: Settings, *, quiet: bool) -> dict[str, Any]:
    import torch

    from compress.cli.progress import Shown
    from compress.errors import ConfigError
    from evaluators import latency

    wanted = graphs.split(",")
    if not wanted or set(wanted) - {"on", "off"}:
        raise ConfigError(f"--graphs {graphs}: pass on, off, or on,off")
    subjects = [s for folder in _named(models) for s in _opened(folder, wanted, runtime, settings)]
    best = "cuda" if torch.cuda.is_available() else "cpu"
    devices = {s.label: "cpu" if s.decoder.runtime == "onnxruntime" else best for s in subjects}
    speeds = {device: latency.read_bandwidth(device) for device in set(devices.values())}
    with Shown(quiet=quiet) as shown:
        seen = latency.measure(subjects, settings, shown)
    return latency.report(subjects, settings, {k: speeds[d] for k, d in devices.items()}, seen)


def _named(models: tuple[str, ...]) -> list[Path]:
    """The folders asked for; without any, the newest artifact and the original that it came from."""
    from compress.artifact import parent_path, read_manifest
    from compress.workspace import is_judgeable, resolve

    if models:
        return [resolve(m, accept=is_judgeable).path for m in models]
    newest = resolve(None, accept=is_judgeable).path
    manifest = read_manifest(newest)
    return [newest] if manifest is None else [newest, parent_path(manifest.root, newest)]


def _opened(folder: Path, graphs: list[str], runtime: Any, settings: Settings) -> list[Subject]:
    from compress.runtime.open import open_decoder
    from compress.tell import Heard
    from evaluators.latency import Subject

    capacity = settings.prompt_len + settings.new_tokens
    found: list[Subject] = []
    for state in graphs:
        heard = Heard()
        decoder = open_decoder(
            folder, capacity=capacity, batch=settings.batch, runtime=runtime, graphs=state == "on", tell=heard
        )
        for note in heard.notes:
            print(f"note: {note}", file=sys.stderr)
        label = folder.resolve().name
        has_graphs = hasattr(decoder, "graph")
        found.append(
            Subject(
                label=f"{label} (graphs {state})" if has_graphs and len(graphs) > 1 else label,
                decoder=decoder,
                cache_bytes=_cache_bytes(decoder),
            )
        )
        if not has_graphs:
            break  # on and off are the same there
    return found


def _cache_bytes(decoder: Any) -> int:
    """Bytes of keys and values that one token of one sequence takes."""
    keys = getattr(decoder, "keys", None)
    if keys is not None:
        return int(2 * keys[:, 0, :, 0].numel() * keys.element_size())
    if hasattr(decoder, "cache_bytes_a_token"):
        return int(decoder.cache_bytes_a_token)
    if decoder.runtime == "onnxruntime":
        shapes = decoder.runner.pasts
        return int(sum(heads * size * decoder._types[name]().itemsize for name, (heads, _, size) in shapes.items()))
    from compress.kv_cache import bytes_a_token

    return bytes_a_token(decoder.model.model.config, decoder.model.dtype.itemsize)


def _endpoint(url: str, served: str | None, settings: Settings) -> dict[str, Any]:
    from evaluators import endpoint, latency

    offered = endpoint.models(url)
    name = served or offered[0]
    # each round's prompt begins otherwise: a server that keeps the caches of equal beginnings must compute it
    rounds = [
        endpoint.once(url, name, " ".join([str(number), *["the"] * (settings.prompt_len - 1)]), settings.new_tokens)
        for number in range(settings.warm_ups + settings.rounds)
    ]
    return latency.served(f"{name} at {url}", rounds[settings.warm_ups :], settings)


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    from compress.cli.console import Console

    table = Table(title="Decoding, milliseconds", title_justify="left")
    table.add_column("", overflow="fold")
    for column in ("first token", "p50", "p90", "p99", "tokens/s", "of bandwidth", "times the first"):
        table.add_column(column, justify="right")
    for r in found["results"]:
        against = r.get("against_first", {})
        said = f"{against['ratio']:.2f} ({against['low']:.2f}-{against['high']:.2f})" if against.get("ratio") else ""
        share = r.get("share_of_bandwidth")
        table.add_row(
            r["label"],
            f"{r['median_ttft_ms']:.1f}",
            *("-" if (ms := r[f"{q}_itl_ms"]) is None else f"{ms:.2f}" for q in ("median", "p90", "p99")),
            f"{r['output_throughput']:.1f}",
            "-" if share is None else f"{share:.0%}",
            said,
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for r in found["results"]:
        if r.get("graph_replays"):
            print(f"{r['label']}: {r['graph_replays']} CUDA graph replays of {r['launches_a_step']} launches each")
        if (reason := r.get("against_first", {}).get("reason")) is not None:
            print(f"{r['label']}: no ratio, {reason}")
        if r.get("too_few"):
            print(f"{r['label']}: {r['too_few']}")
    if memory := _memory(found):
        print(memory)
    for warning in found["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _memory(found: dict[str, Any]) -> str:
    """Peak memory and the card's utilisation and clock, as far as they are known."""
    parts = []
    for key, label in (("peak_device_memory_bytes", "device (torch)"), ("device_memory_used_bytes", "device (all)")):
        parts += [f"{label} {found[key] / 1e9:.2f} GB"] if found.get(key) else []
    parts += [f"host {found['peak_host_memory_bytes'] / 1e9:.2f} GB"] if found.get("peak_host_memory_bytes") else []
    said = [f"peak memory: {', '.join(parts)}"] if parts else []
    if found.get("utilisation") is not None:
        said.append(f"GPU busy {found['utilisation']:.0f} % of the time")
    mhz = [c["mhz"] for c in found.get("clocks", []) if c["mhz"]]
    said += [f"clock {min(mhz)} to {max(mhz)} MHz"] if mhz else []
    return "; ".join(said)


def _draw(found: dict[str, Any], path: Path) -> None:
    """Bars of the median time between tokens, whiskers to the 99th percentile."""
    from compress.errors import ConfigError

    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ConfigError('--plot needs matplotlib; pip install "compress-toolkit[report]"') from e
    results = found["results"]
    figure = Figure(figsize=(7, 0.6 * len(results) + 1.4), layout="constrained")
    axes = figure.subplots()
    medians = [r["median_itl_ms"] for r in results]
    high = [(r["p99_itl_ms"] or m) - m for r, m in zip(results, medians, strict=True)]
    axes.barh([r["label"] for r in results], medians, xerr=[[0.0] * len(high), high], color="#4477aa", capsize=3)
    axes.invert_yaxis()
    whiskers = ", and to the 99th percentile" if any(high) else ", too few for a 99th percentile"
    axes.set_xlabel(f"milliseconds between tokens: median{whiskers}")
    figure.savefig(path)
