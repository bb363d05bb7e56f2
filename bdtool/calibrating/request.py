"""What a calibration is asked to do, as plain data. Loads neither torch nor onnx nor ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass

from calibration.methods import DEFAULT_METHOD, DEFAULT_PERCENTILE


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """What `bdtool calibrate` was asked for.

    Attributes:
        precision: one of `export.manifest.CALIBRATED`.
        policy: a POLICY; None is what the network was trained for (`NetworkSpec.default_policy`).
        limit: calibration images to draw.
        seed: draws them.
        method: one of `calibration.methods.METHODS`.
        percentile: of method "percentile", 50 to 100.
        at_least: images for each part: a choice; below some dozen a range is luck.
        include: of "policy" and "head": quantize these, too.
        max_accuracy_drop: percentage points.
        eval_limit: images for the gates that are drawn; None takes all.
        threads: CPU threads of an engine call; None takes the processors that are there, at most 4.
    """

    precision: str = "int8"
    policy: str | None = None
    limit: int = 512
    seed: int = 0
    method: str = DEFAULT_METHOD
    percentile: float = DEFAULT_PERCENTILE
    bias_correction: bool = True
    at_least: int = 64
    include: frozenset[str] = frozenset()
    max_accuracy_drop: float = 0.5
    eval_limit: int | None = None
    threads: int | None = None
