"""Imports point down: bdtool -> calibration -> engines -> export -> bdtool.errors, bdtool.specs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("bdtool", "export", "engines", "calibration")
GROUND_FLOOR = ("bdtool.errors", "bdtool.specs")

# What a room may import of ours; a module belongs to the longest name that contains it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "bdtool.errors": (),
    "bdtool.specs": (),
    "export": ("export", *GROUND_FLOOR),
    "engines": ("engines", "export", *GROUND_FLOOR),
    "calibration": ("calibration", "engines", "export", *GROUND_FLOOR),
    "bdtool": PACKAGES,
}
# Arrows inside bdtool/ that point up.
MUST_NOT_IMPORT = {
    "bdtool.models": ("bdtool.runtime", "bdtool.cli"),
    "bdtool.data": ("bdtool.runtime", "bdtool.cli"),
    "bdtool.runtime": ("bdtool.cli", "bdtool.models"),
}
# A backend is imported only in its room; bdtool.doctor looks packages up by name, without an import of its own.
BACKENDS = {
    "onnxruntime": ("engines", "export.check", "export.ort_threads", "calibration", "bdtool.doctor"),
    "cuda": ("engines.cuda_device", "engines.dispatch_kernel"),
    "tensorrt": ("engines.trt_library",),
    "tensorrt_rtx": ("engines.trt_library",),
    "tensorrt_rtx_bindings": ("engines.trt_library",),
}
HEAVY = ("cuda", "torch", "torchvision", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")


def wrong_arrows(root: Path) -> list[str]:
    """Return one line for each import below `root` that the tables above forbid."""
    files = dict(_modules(root))
    return [
        f"{path.relative_to(root)}:{line}: {module} must not import {target}"
        for module, path in files.items()
        for line, target in _imports(module, path, known=set(files))
        if not _allowed(module, target)
    ]


def _allowed(module: str, target: str) -> bool:
    if _inside(target, PACKAGES):
        room = max((room for room in MAY_IMPORT if _inside(module, (room,))), key=len)
        inner = next((room for room in MUST_NOT_IMPORT if _inside(module, (room,))), None)
        forbidden = MUST_NOT_IMPORT[inner] if inner else ()
        return _inside(target, MAY_IMPORT[room]) and not _inside(target, forbidden)
    return _inside(module, BACKENDS.get(target.partition(".")[0], PACKAGES))


def _inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(module: str, path: Path, *, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and target of every import, at whatever depth, `import_module("literal")` included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                base = _absolute(module, path, node)
                for alias in node.names:
                    submodule = f"{base}.{alias.name}"
                    yield node.lineno, submodule if submodule in known else base
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name


def _absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    n_up = node.level - (path.name == "__init__.py")  # a package's own `.` is itself
    return ".".join([*parts[: len(parts) - n_up], *([node.module] if node.module else [])])


def test_every_import_points_down() -> None:
    assert wrong_arrows(REPOSITORY) == []


def test_the_graph_is_not_empty() -> None:
    files = dict(_modules(REPOSITORY))
    assert set(PACKAGES) <= set(files)
    targets = {target for _, target in _imports("export.files", files["export.files"], known=set(files))}
    assert "bdtool.errors" in targets


@pytest.mark.parametrize(
    ("file", "code", "target"),
    [
        ("bdtool/errors.py", "from bdtool import specs", "bdtool.specs"),
        ("bdtool/specs.py", "import export", "export"),
        ("export/parts.py", "import engines.fake", "engines.fake"),
        ("export/parts.py", "from bdtool import Orchestrator", "bdtool"),
        ("export/parts.py", "def f():\n    from bdtool.models import resnet", "bdtool.models"),
        ("engines/fake.py", "if True:\n    from calibration import ranges", "calibration"),
        ("calibration/ranges.py", "import importlib as i\ni.import_module('bdtool.runtime')", "bdtool.runtime"),
        ("bdtool/models/resnet.py", "from ..runtime import chain", "bdtool.runtime"),
        ("bdtool/models/__init__.py", "from .. import cli", "bdtool.cli"),
        ("bdtool/data.py", "from . import cli", "bdtool.cli"),
        ("bdtool/runtime/chain.py", "from bdtool.models import resnet", "bdtool.models"),
        ("bdtool/runtime/chain.py", "import onnxruntime as ort", "onnxruntime"),
        ("export/bundle.py", "from onnxruntime.capi import _pybind_state", "onnxruntime.capi"),
        ("bdtool/profile.py", "try:\n    import tensorrt\nexcept ImportError:\n    pass", "tensorrt"),
    ],
)
def test_a_wrong_arrow_is_named(tmp_path: Path, file: str, code: str, target: str) -> None:
    _write_tree(tmp_path, {"bdtool/cli.py": "", "bdtool/errors.py": "", "bdtool/specs.py": "", file: code})
    [line] = wrong_arrows(tmp_path)
    assert line.startswith(f"{file}:")
    assert line.endswith(f"must not import {target}")


def test_right_arrows_pass(tmp_path: Path) -> None:
    allowed = {
        "bdtool/errors.py": "import os",
        "bdtool/specs.py": "import numpy",
        "bdtool/cli.py": "import bdtool.runtime, engines, calibration, export",
        "bdtool/runtime/chain.py": "from bdtool.errors import BdtoolError\nfrom . import other\nimport engines",
        "bdtool/runtime/other.py": "",
        "export/check.py": "import onnxruntime\nfrom bdtool import errors, specs\nfrom . import files",
        "export/files.py": "",
        "engines/onnxrt.py": "import onnxruntime\nfrom export.files import write_json",
        "calibration/ranges.py": "from engines import onnxrt",
    }
    _write_tree(tmp_path, allowed)
    assert wrong_arrows(tmp_path) == []


def _write_tree(root: Path, files: dict[str, str]) -> None:
    for name, code in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)


def test_import_bdtool_loads_nothing_heavy() -> None:
    assert _heavy_modules_after("import bdtool") == []


@pytest.mark.parametrize("command", [[], ["calibrate"], ["export"], ["build"]])
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    words = [*command, "--help"]
    code = f"from bdtool.cli import main\ntry:\n    main({words})\nexcept SystemExit as end:\n    assert not end.code"
    assert _heavy_modules_after(code) == []


def _heavy_modules_after(code: str) -> list[str]:
    """Run `code` in a fresh interpreter and return which heavy packages it loaded."""
    report = f"{code}\nimport sys\nprint('loaded:', *sorted({set(HEAVY)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", report], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].removeprefix("loaded:").split()
