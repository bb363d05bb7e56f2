"""Installed packages, by their metadata: nothing is imported."""

from __future__ import annotations

from importlib import metadata

# The extras of pyproject.toml that an error or `bdtool doctor` sends to.
_EXTRAS = {
    "tensorrt": ("tensorrt>=10.13",),
    "tensorrt-cu12": ("tensorrt-cu12>=10.13",),
    "rtx": ("tensorrt-rtx-cu13-bindings>=1.7", "tensorrt-rtx-cu13-libs>=1.7"),
    "rtx-cu12": ("tensorrt-rtx-cu12-bindings>=1.7", "tensorrt-rtx-cu12-libs>=1.7"),
    "cuda": ("cuda-bindings>=13,<14", "nvidia-cuda-nvrtc>=13"),
    "cuda12": ("cuda-bindings>=12.9,<13", "nvidia-cuda-nvrtc-cu12>=12.4"),
    "pycuda": ("pycuda>=2026.1",),
    "report": ("Jinja2>=3.1", "plotly>=6.0"),
    "train": ("tensorboard>=2.20",),
}


def installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def install_command(extra: str) -> str:
    """Return the command that adds what an extra of bdtool holds.

    It names the packages, not `bdtool[extra]`: under that name the package index has a stranger's package, and pip
    would add PyTorch as well, without which bundles can be run.
    """
    return " ".join(["pip install", *(f'"{requirement}"' for requirement in _EXTRAS[extra])])
