"""What a manager serves and where it keeps its own files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Settings:
    """Attributes:
    root: recipes are its folders with a train.py.
    state: the manager's own folder: jobs, their logs and outputs, uploads.
    weights, datasets: folders whose contents may be trained from; those of the recipes' samples
        and of uploads beside them.
    max_upload: bytes of one uploaded file.
    token: what clients must know, None for nothing.
    chosen: the recipe that the page opens first.
    """

    root: Path = PROJECT
    state: Path = PROJECT / "output/manager"
    weights: tuple[Path, ...] = (PROJECT / "output",)
    datasets: tuple[Path, ...] = field(default_factory=tuple)
    max_upload: int = 200 << 20
    token: str | None = None
    chosen: str | None = None

    @property
    def uploads(self) -> Path:
        return self.state / "uploads"

    @property
    def outputs(self) -> Path:
        """Of jobs, a folder each."""
        return self.state / "runs"
