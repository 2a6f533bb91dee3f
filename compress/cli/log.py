"""`compress log`: the workspace's lineage as a tree."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from compress.cli.help import Command


@click.command("log", cls=Command)
@click.option("--json", "as_json", is_flag=True, help="Print as one JSON object.")
def command(as_json: bool) -> None:
    """Show who was made from whom in ./artifacts, as a tree below each original model."""
    from compress.cli.holdings import Item, children, items, tree, verdict
    from compress.workspace import WORKSPACE

    found, notes = items(WORKSPACE)
    if as_json:

        def nested(item: Item) -> dict[str, Any]:
            return {**item.to_json(WORKSPACE), "children": [nested(c) for c in children(found, item)]}

        here = {str(i.folder.resolve()) for i in found}
        roots = [nested(i) for i in found if i.parent not in here]
        print(json.dumps({"workspace": str(WORKSPACE), "roots": roots, "notes": notes}, indent=2))
        return
    if not found:
        print(f"{WORKSPACE}/ holds no artifact yet; `compress awq` or `compress run a100-awq` makes one")
    for before, entry in tree(found):
        if isinstance(entry, str):
            print(entry)
            continue
        said = verdict(entry.reports)
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.time))
        name = entry.folder.relative_to(WORKSPACE).as_posix()
        facts = [entry.stage, entry.made, f"{entry.bytes / 1e6:.1f} MB", when, *([said] if said else [])]
        print(f"{before}{name}  {', '.join(f for f in facts if f)}")
    for note in notes:
        print(f"note: {note}")
