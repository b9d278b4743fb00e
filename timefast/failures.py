"""Videos that could not be used: named, classified, counted, bounded by a budget."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timefast.data.batch import Failure
from timefast.errors import InputError
from timefast.log import replace_json_lines

LEAST_BUDGET = 10  # a small data set may always hold this many bad files


class FailureLog:
    """Keeps `failures.jsonl` of a run: one line per video, with how often it failed.

    Of several processes all count all failures, and one `writes` the file.
    """

    def __init__(self, path: Path, videos: int, max_fraction: float, *, writes: bool = True):
        self.path, self._writes = path, writes
        self.budget = max(LEAST_BUDGET, int(max_fraction * videos))
        self.videos = videos
        self._seen: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, failures: Sequence[Failure]) -> list[Failure]:
        """Count these; returns those that are new. Raises InputError when the budget is spent."""
        new = list({f.path: f for f in failures if f.path not in self._seen}.values())
        for failure in failures:
            entry = self._seen.setdefault(failure.path, {"path": failure.path, "count": 0})
            entry |= {"id": failure.id, "class": failure.kind, "reason": failure.reason}
            entry["count"] += 1
        if failures:
            self._write()
        if len(self._seen) > self.budget:
            raise InputError(self._over_budget())
        return new

    def state(self) -> list[dict[str, Any]]:
        return list(self._seen.values())

    def restore(self, state: list[dict[str, Any]]) -> None:
        self._seen = {entry["path"]: dict(entry) for entry in state}
        self._write()

    def _write(self) -> None:
        if self._writes:
            replace_json_lines(self.path, list(self._seen.values()))

    def _over_budget(self) -> str:
        kinds = Counter(entry["class"] for entry in self._seen.values())
        lines = [
            f"{len(self._seen)} of {self.videos} videos cannot be used, more than the budget of "
            f"{self.budget} (--max-bad-fraction):"
        ]
        lines += [f"  {count:6d}  {kind}" for kind, count in kinds.most_common()]
        lines += [f"  {e['path']}: {e['reason']}" for e in list(self._seen.values())[:10]]
        lines.append(f"The whole list is in {self.path}. Repair the files or raise the budget.")
        return "\n".join(lines)
