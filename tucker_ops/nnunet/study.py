"""Long work in named steps, whose results outlive an interrupt: one JSON file a step, whole or not there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tucker_ops.nnunet.output import write_file

Result = dict[str, Any]


class Study:
    """Steps kept in `folder`. A step is made again when it was asked for with other arguments."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def step(self, name: str, arguments: Mapping[str, Any], make: Callable[[], Result]) -> Result:
        """The result of `make`, a JSON object: from the file of an earlier run with equal `arguments`, or made now."""
        path = self.folder / "steps" / f"{name}.json"
        asked = json.loads(json.dumps(arguments))
        if path.is_file():
            kept = json.loads(path.read_text())
            if kept["arguments"] == asked:
                return kept["result"]
        result = json.loads(json.dumps(make()))
        content = json.dumps({"arguments": asked, "result": result}, indent=1)
        write_file(path, content.encode(), force=True)
        return result
