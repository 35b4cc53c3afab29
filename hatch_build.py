"""Build hook: recipes and data manifests travel inside the wheel, as `grace/recipes` and `grace/manifests`.

An editable install reads them from the checkout, so it gets no copies.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PackagedData(BuildHookInterface):
    """Adds files from outside `grace/` to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        files = {str(root / "recipes"): "grace/recipes"}
        files |= {
            str(path): f"grace/manifests/{path.name}" for path in sorted((root / "data").glob("*.yaml"))
        }
        build_data["force_include"].update(files)
