"""The README.md of an export: what it is, the command that runs it, what that needs, how large it is.

The same bytes for the same export, wherever it lies: its commands are typed in its folder.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

# In the words of a command: the export's folder.
FOLDER = "{folder}"


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How an export is used. what: one sentence. verb: what the command does, such as `run it`. command: its words.

    needs: what must be there, one line each. more: Markdown for whoever reads on.
    """

    what: str
    verb: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    more: str = ""

    def line(self, folder: str = ".") -> str:
        """The command, quoted, for an export that lies in `folder`."""
        return shlex.join(word.replace(FOLDER, folder) for word in self.command)


def text(
    usage: Usage, *, name: str, format: str, target: str, context: int, batch: int, parts: Mapping[str, int], fp16: int
) -> str:
    """README.md. name: the artifact's; parts: bytes by part; fp16: bytes of the same model in float16."""
    total = sum(parts.values())
    rows = "\n".join(f"| {part} | {size / 1e6:.2f} |" for part, size in parts.items())
    needs = "\n".join(f"- {need}" for need in usage.needs)
    more = f"\n{usage.more.strip()}\n" if usage.more else ""
    sequences = "one sequence" if batch == 1 else f"{batch} sequences"
    return f"""# {plain(name)}, {format} for {target}

{usage.what} Made for {sequences} of at most {context} tokens. To {usage.verb}, in this folder:

    {usage.line()}

Needs:

{needs}
{more}
| part | MB |
|---|---|
{rows}
| all | {total / 1e6:.2f} |
| the same model in FP16 | {fp16 / 1e6:.2f} |

`compress.json` holds the hash of every file, what was compared with the artifact when this folder was written, and how
the weights were made. `compress evaluate .` judges them.
"""


def plain(name: str) -> str:
    """A folder's name as Markdown takes it literally, on one line."""
    return re.sub(r"[^\w .+-]", "-", name).strip() or "model"
