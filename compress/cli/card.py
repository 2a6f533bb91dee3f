"""`compress card`: an artifact on one page, for a model hub or a colleague. The text is in `evaluators.model_card`."""

from __future__ import annotations

from pathlib import Path

import click

from compress.cli.help import Command
from compress.errors import ConfigError, reason


@click.command("card", cls=Command)
@click.argument("artifact", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="File to write [default: print it].")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def command(artifact: str | None, out: Path | None, force: bool) -> None:
    """Describe ARTIFACT in Markdown: size in MB, bits a weight, KL in nats a token, recovery, recipe, how to load it.

    Figures are those of its last `compress evaluate`; what was not measured is said to be so. An artifact never
    changes, so the file lies outside it: copy it in as README.md where it is uploaded.
    """
    from compress.files import write_bytes_atomically
    from compress.output import check_apart
    from compress.workspace import is_candidate, resolve
    from evaluators.model_card import card

    source = resolve(artifact, accept=is_candidate)
    text = card(source.path)
    if out is None:
        click.echo(text, nl=False)
        return
    check_apart(out.parent, {"the artifact": source.path}, "-o")
    if out.exists() and not force:
        raise ConfigError(f"{out} exists already; pass --force to replace it, or -o for another file")
    try:
        write_bytes_atomically(out, text.encode())
    except OSError as e:
        raise ConfigError(f"{out} cannot be written ({reason(e)}); pass another file with -o") from None
    click.echo(f"wrote {out}")
