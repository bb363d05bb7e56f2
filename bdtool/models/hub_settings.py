"""A JSON file of Hugging Face's hub, read with errors that name file and key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdtool.errors import CheckpointError
from bdtool.models.checkpoint_formats import Colour, GivenInput
from bdtool.specs import Interpolation
from export.files import json_from_bytes

WHERE_HARMLESS = "Where that does not matter, give the file of weights itself, and measure the accuracy"


@dataclass(frozen=True, kw_only=True)
class HubSettings:
    """The values of a file, or of an object in it."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> HubSettings | None:
        """Return the settings of a file, or None where there is none.

        Raises:
            CheckpointError: it cannot be read, or holds no JSON object.
        """
        try:
            values = json_from_bytes(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise CheckpointError(f"{path} cannot be read: {exc.strerror or exc}") from exc
        except ValueError as exc:
            raise CheckpointError(f"{path} is not JSON ({exc}); download it again") from exc
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} holds a {type(values).__name__}, expected an object; download it again")
        return cls(path=path, values=values)

    def inner(self, key: str) -> HubSettings:
        """Return what an object in these settings says: nothing, where there is none."""
        values = self.values.get(key)
        return HubSettings(path=self.path, values=values if isinstance(values, dict) else {})

    def problem(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}")

    def require(self, key: str, expected: Any) -> None:
        """Refuse another value than that; a key that is not there has it."""
        value = self.values.get(key, expected)
        if value != expected:
            raise self.problem(f"{key} is {value!r}, expected {expected!r}, as bdtool has no other. {WHERE_HARMLESS}")

    def colour(self, key: str) -> Colour | None:
        """Return three numbers, or None where the key is not there."""
        match self.values.get(key):
            case None:
                return None
            case [int() | float() as red, int() | float() as green, int() | float() as blue]:
                return float(red), float(green), float(blue)
        raise self.problem(f"{key} is {self.values[key]!r}, expected three numbers")

    def share(self, key: str, usual: float) -> float:
        """Return a number from 0.01 to 1."""
        value = self.values.get(key, usual)
        if not isinstance(value, int | float) or not 0.01 <= value <= 1:
            raise self.problem(f"{key} is {value!r}, expected a number from 0.01 to 1")
        return float(value)

    def interpolation(self, key: str, names: Mapping[Any, Interpolation], given: GivenInput) -> Interpolation | None:
        """Return which of those that bdtool has is named; what the user says instead, or None where nobody does."""
        value = self.values.get(key)
        if given.interpolation is not None or value is None:
            return given.interpolation
        if not isinstance(value, str | int) or value not in names:
            known = " or ".join(f"{name!r} ({meant})" for name, meant in names.items())
            raise self.problem(f"{key} is {value!r}, expected {known}; give --interpolation, and measure the accuracy")
        return names[value]

    def resize_asked_for(self, key: str, side: int | None, given: GivenInput) -> int:
        """Return what the user says that pictures are scaled to, as the file has a way that bdtool does not have.

        Raises:
            CheckpointError: the user does not say it.
        """
        if given.resize is None:
            raise self.problem(
                f"{key} is {self.values.get(key)!r}: pictures are not scaled by their shorter side and then cut to "
                f"their middle, as bdtool does. Give --resize-to {side or 'N'} to have that, and measure the accuracy"
            )
        return given.resize
