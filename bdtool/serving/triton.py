"""What Triton's Python backend runs: a bundle opened once, requests that wait answered as one batch.

Only the server has `triton_python_backend_utils`; a repository's `model.py` takes `TritonPythonModel` from here.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bdtool.errors import BdtoolError, UsageError
from bdtool.runtime.orchestrator import Orchestrator
from bdtool.serving.triton_files import BUNDLE, IMAGE, KEEP, LOGITS

_READ = {"backend": str, "precision": str, "strategy": str, "cuda_graph": str, "threads": int, "threshold": float}
_TAKEN = b"used_dltensor"  # DLPack's name for a capsule whose tensor somebody took; it has to outlive them
_set_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_SetName", ctypes.pythonapi)
)


class TritonPythonModel:
    """An instance of the model, in a process of its own."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle as the configuration says, on the GPU of an instance of KIND_GPU, else on the CPU.

        Args:
            args: of the Python backend: paths, the instance, and the configuration as JSON.

        Raises:
            BdtoolError: a parameter is none of `Orchestrator.open`, or the bundle does not open like that; Triton
                shows the message and does not serve the model.
        """
        options = _options(json.loads(args["model_config"]).get("parameters", {}))
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        bundle = Path(args["model_repository"]) / args["model_version"] / BUNDLE
        self._runtime = Orchestrator.open(bundle, device=device, **options)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, uint8 [n, height, width, 3] each, with logits float32 and keep bits uint8 of its images.

        Tensors pass as DLPack, as numpy's own do not where server and numpy are of different ages.
        """
        import triton_python_backend_utils as triton

        images = [np.from_dlpack(triton.get_input_tensor_by_name(request, IMAGE)) for request in requests]
        try:
            result = self._runtime.run(images[0] if len(images) == 1 else np.concatenate(images))
        except BdtoolError as exc:
            return [triton.InferenceResponse(error=triton.TritonError(str(exc))) for _ in requests]
        ends = np.cumsum([len(batch) for batch in images])[:-1]
        answers = zip(np.split(result.logits, ends), np.split(result.policy.view(np.uint8), ends), strict=True)
        return [
            triton.InferenceResponse([_given(triton.Tensor, LOGITS, logits), _given(triton.Tensor, KEEP, keep)])
            for logits, keep in answers
        ]

    def finalize(self) -> None:
        """Close the bundle."""
        self._runtime.close()


def _given(tensor: Any, name: str, values: np.ndarray) -> Any:
    """Return Triton's tensor of an array, uncopied.

    Triton renames the capsule that it takes to a name of its own. numpy knows DLPack's only, and would write a
    traceback to the server's log for each.
    """
    capsule = values.__dlpack__()
    given = tensor.from_dlpack(name, capsule)
    _set_capsule_name(capsule, _TAKEN)
    return given


def _options(parameters: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Return what the parameters of a configuration ask of `Orchestrator.open`.

    Names in capitals are Triton's own.

    Raises:
        UsageError: unknown names or values.
    """
    options = {}
    for name, value in parameters.items():
        if name.isupper():
            continue
        text = value.get("string_value", "")
        if name not in _READ:
            raise UsageError(f"config.pbtxt: unknown parameter {name!r}; known: {', '.join(_READ)}")
        try:
            options[name] = _READ[name](text)
        except ValueError:
            raise UsageError(f"config.pbtxt: {name} is {text!r}, expected a number") from None
    return options
