"""Options of TensorRT's builders: which backend has which."""

from dataclasses import fields

import pytest

from bdtool.errors import UsageError
from engines.trt_options import PROFILED, TensorRTOptions, backends_with

_GIVEN = {
    "min_batch": {"min_batch": 2, "opt_batch": 2},
    "opt_batch": {"opt_batch": 2},
    "max_batch": {"max_batch": 8},
    "sms": {"sms": (89,)},
    "optimization_level": {"optimization_level": 4},
    "version_compatible": {"version_compatible": True},
    "hardware_compatibility": {"hardware_compatibility": "ampere-plus"},
    "strip_weights": {"strip_weights": True},
    "refit": {"refit": True},
    "tf32": {"tf32": True},
}


def _takes(backend: str, options: TensorRTOptions) -> bool:
    try:
        options.check_for(backend)
    except UsageError:
        return False
    return True


@pytest.mark.parametrize("name", [field.name for field in fields(TensorRTOptions)])
def test_backends_that_are_named_with_an_option_are_those_that_take_it(name: str) -> None:
    options = TensorRTOptions(**_GIVEN[name])
    assert backends_with(name) == tuple(backend for backend in PROFILED if _takes(backend, options))
