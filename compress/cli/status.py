"""`compress status`: what the workspace holds, how large, how good."""

from __future__ import annotations

import json

import click

from compress.cli.help import Command


@click.command("status", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print as one JSON object.")
def command(as_json: bool) -> None:
    """List the artifacts of ./artifacts: what they are, size in MB, scores and verdicts, and what could go.


    Recovery is the original's perplexity over the artifact's, KL in nats a token; both of the last evaluation.
    """
    from compress.cli.calibrated import console
    from compress.cli.gc import candidates
    from compress.cli.holdings import items, scores, verdict
    from compress.workspace import WORKSPACE

    found, notes = items(WORKSPACE)
    going = candidates(WORKSPACE, found)
    if as_json:
        values = [item.to_json(WORKSPACE) for item in found]
        could_go = [{"path": str(c.path), "why": c.why, "bytes": c.bytes} for c in going]
        print(
            json.dumps(
                {"workspace": str(WORKSPACE), "artifacts": values, "could_go": could_go, "notes": notes}, indent=2
            )
        )
        return
    if not found:
        print(f"{WORKSPACE}/ holds no artifact yet; `compress awq` or `compress run a100-awq` makes one")
    else:
        from rich.table import Table

        table = Table(title=f"{WORKSPACE}/, the newest last", title_justify="left")
        for column in ("artifact", "stage", "made", "MB", "recovery", "KL", "verdict"):
            table.add_column(column, justify="right" if column in ("MB", "recovery", "KL") else "left", no_wrap=True)
        for item in found:
            kept = scores(item.reports)
            recovery, kl = kept.get("perplexity_recovery"), kept.get("kl_mean")
            table.add_row(
                item.folder.relative_to(WORKSPACE).as_posix(),
                item.stage,
                item.made,
                f"{item.bytes / 1e6:.1f}",
                "-" if recovery is None else f"{recovery:.2%}",
                "-" if kl is None else f"{kl:.4f}",
                verdict(item.reports) or ("-" if item.reports else "not judged"),
            )
        out = console()
        out.print(table)
        print(
            f"{len(found)} artifact{'' if len(found) == 1 else 's'}, {sum(i.bytes for i in found) / 1e6:.1f} MB; "
            "lineage: compress log"
        )
    if going:
        size = sum(c.bytes for c in going) / 1e6
        print(f"{len(going)} leftovers of {size:.1f} MB could go: compress gc")
    for note in notes:
        print(f"note: {note}")
