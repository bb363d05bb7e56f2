"""What the user asked for in a report."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from bdtool.runtime.place import Place


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """The options of a report; the page repeats them as commands.

    Attributes:
        made_by: the command that makes the page, without bdtool's own options.
        by_profile: it is `bdtool profile`, which measures the page's latency alone, too.
    """

    made_by: str
    by_profile: bool = False
    bundle: Path
    data: str
    output: Path
    policy: str | None = None
    limit: int = 2000
    duration_s: float = 3
    resize: bool = False
    place: Place = field(default_factory=Place)

    def commands(self, *, has_labels: bool) -> tuple[str, ...]:
        """Return the command that makes this page, and what measures its accuracy and its latency alone.

        Args:
            has_labels: the images have some, without which nothing measures an accuracy.
        """
        place = self.place
        shared = ["--data", self.data, *(["--policy", self.policy] if self.policy else [])]
        shared += ["--resize"] if self.resize else []
        shared += ["--backend", place.backend, "--device", place.device, "--precision", place.precision]
        shared += ["--threads", str(place.threads)] if place.threads else []
        bundle = str(self.bundle)
        alone = [["evaluate", bundle, *shared, "--limit", str(self.limit)]] if has_labels else []
        if not self.by_profile:
            alone.append(["profile", bundle, *shared, "--duration", f"{self.duration_s:g}"])
        return (self.made_by, *(shlex.join(["bdtool", *words]) for words in alone))
