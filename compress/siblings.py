"""Whether the packages beside `compress` are ours: their names are common, and other distributions use them too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from compress.errors import ArtifactError

SIBLINGS = ("exporters", "evaluators", "calibration_data")
DISTRIBUTION = "compress-toolkit"


def check_siblings() -> None:
    """Raise ArtifactError when a sibling would be imported from elsewhere, or belongs to another distribution too."""
    home = Path(__file__).resolve().parents[1]
    for name in SIBLINGS:
        spec = importlib.util.find_spec(name)
        where = Path(spec.origin).resolve().parents[1] if spec and spec.origin else None
        if where != home:
            raise ArtifactError(
                f"the package {name} would come from {where or 'nowhere'} and not from {home}, where compress is; "
                f"another distribution or a folder of that name is in the way: install {DISTRIBUTION} in an "
                "environment of its own"
            )
    if home.name in ("site-packages", "dist-packages"):
        check_owners()


def check_owners() -> None:
    """In a shared folder two distributions can have written into one package; their metadata tells."""
    from importlib.metadata import packages_distributions

    owners = packages_distributions()
    for name in SIBLINGS:
        others = sorted({o for o in owners.get(name, []) if o != DISTRIBUTION})
        if others:
            raise ArtifactError(
                f"the package {name} belongs to {others[0]} as well as to {DISTRIBUTION}, so its files are mixed; "
                f"install {DISTRIBUTION} in an environment of its own"
            )
