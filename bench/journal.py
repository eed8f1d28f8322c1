"""What a long run has finished, kept on disk so that a restart measures only the rest.

One JSON object a line: first what the run is (`identity`), then ceilings and problems as they are measured. The file
is written anew beside the old one and moved over it, so a kill leaves a whole file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.ceilings import Ceilings, Row
from tucker_ops.errors import ConfigError

SUFFIX = ".partial.jsonl"


class Journal:
    """Opens the journal at `path`, or starts it; raises ConfigError where it belongs to another run.

    Without an identity it is opened as it stands.
    """

    def __init__(self, path: Path, identity: Mapping[str, object] | None = None) -> None:
        self._path = path
        self._entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        if identity is None:
            return
        if not self._entries:
            self._add({"identity": identity})
            return
        # Through JSON, as the file went: tuples become lists.
        begun, wanted = self._entries[0]["identity"], json.loads(json.dumps(identity))
        other = [
            f"{name} {begun.get(name)}, not {wanted[name]}"
            for name in wanted
            if begun.get(name) != wanted[name]
        ]
        if other:
            raise ConfigError(
                f"{path} keeps an unfinished run of another kind ({'; '.join(other)}); "
                "finish that one, or give --restart to throw it away"
            )

    @classmethod
    def beside(cls, destination: Path) -> Path:
        """Where the journal of a run with results in `destination` lies."""
        return destination.with_name(destination.name + SUFFIX)

    def finished(self, configuration: str) -> set[str]:
        """Names of the problems that need not be measured again."""
        return {entry["problem"] for entry in self._of(configuration) if "problem" in entry}

    def add_rows(self, configuration: str, problem: str, rows: Sequence[Row]) -> None:
        self._add({"configuration": configuration, "problem": problem, "rows": list(rows)})

    def add_ceilings(self, configuration: str, ceilings: Ceilings) -> None:
        self._add({"configuration": configuration, "ceilings": asdict(ceilings)})

    def rows(self, configuration: str) -> list[Row]:
        return [row for entry in self._of(configuration) for row in entry.get("rows", ())]

    def ceilings(self, configuration: str) -> list[Ceilings]:
        """In the order measured: each start of the run and, unless it was killed, its end."""
        return [Ceilings(**entry["ceilings"]) for entry in self._of(configuration) if "ceilings" in entry]

    def close(self) -> None:
        """The run is over and its results are written: forget it."""
        self._path.unlink()

    def _of(self, configuration: str) -> list[dict]:
        return [entry for entry in self._entries if entry.get("configuration") == configuration]

    def _add(self, entry: dict[str, object]) -> None:
        self._entries.append(json.loads(json.dumps(entry)))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(self._path.name + ".new")
        text = "".join(json.dumps(known, ensure_ascii=False) + "\n" for known in self._entries)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path)
