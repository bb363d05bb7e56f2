"""Fixtures for many tests: the public checkpoints and images that may lie beside the repository in `shared/`, and small
real models with random weights, exported once in a session."""

import functools
import importlib.util
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from hypothesis import settings

from export.files import sha256_of_file

if TYPE_CHECKING:  # tests that need no torch start without it
    import onnx
    import torch

    from bdtool.models.model import BlockDropModel
    from bdtool.specs import PartSpec

REPOSITORY = Path(__file__).resolve().parent.parent

settings.register_profile("bdtool", deadline=None)  # how long an example takes depends on what else the machine does
settings.load_profile("bdtool")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; tests of Ctrl-C hand it on
    signal.signal(signal.SIGINT, signal.default_int_handler)


class LabelledImages(NamedTuple):
    images: np.ndarray  # uint8 [N, 32, 32, 3]
    labels: np.ndarray  # [N]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("no directory 'shared' with public checkpoints and images beside the repository")
    return path


@pytest.fixture(scope="session")
def checkpoints_dir(shared_dir: Path) -> Path:
    path = shared_dir / "checkpoints"
    if not path.is_dir():
        pytest.skip("shared/ has no 'checkpoints'")
    return path


@pytest.fixture(scope="session")
def cifar10_test(shared_dir: Path) -> LabelledImages:
    """The 10,000 test images of CIFAR-10, with their labels."""
    tool = shared_dir / "tools" / "unpack_cifar10.py"
    if not tool.is_file() or not (shared_dir / "data" / "cifar10").is_dir():
        pytest.skip("shared/ lacks data/cifar10 or tools/unpack_cifar10.py")
    spec = importlib.util.spec_from_file_location("unpack_cifar10", tool)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return LabelledImages(*module.read_split("test"))


class Exported(NamedTuple):
    """A model with random weights, its MODEL file and its bundle."""

    model: "BlockDropModel"
    path: Path
    bundle: Path


@pytest.fixture(scope="session")
def random_model() -> Callable[..., "BlockDropModel"]:
    """Return a function from an architecture to a model whose weights leave nothing to chance: no batch-norm is the
    identity, and its policy keeps every block for about half of the images."""
    from bdtool.models.architectures import architecture
    from bdtool.models.model import BlockDropModel, ModelSpec, build_model
    from bdtool.specs import Preprocessing

    def make(
        arch: str,
        *,
        shortcut: str | None = None,
        has_policy: bool = True,
        policy_hidden: int = 0,
        downscale: int = 1,
        policy_downscale: int = 0,
        size: int | None = None,
        mask: str | None = None,
        seed: int = 0,
    ) -> BlockDropModel:
        layout = architecture(arch)
        side = size or layout.image_size
        spec = ModelSpec(
            arch=arch,
            n_classes=10,
            labels=None,
            preprocessing=Preprocessing(height=side, width=side, mean=(0.5, 0.4, 0.45), std=(0.2, 0.25, 0.22)),
            shortcut=shortcut or layout.default_shortcut,
            has_policy=has_policy,
            provenance={"created_by": "test"},
            policy_hidden=policy_hidden,
            downscale=downscale,
            policy_downscale=policy_downscale,
            mask=mask,
        )
        model = build_model(spec, seed=seed)
        _stir_batch_norms(model, seed)
        if has_policy:
            _balance_policy(model)
        return model

    return make


def _stir_batch_norms(model: "BlockDropModel", seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    ranges = {"weight": (0.5, 1.0), "bias": (-0.5, 0.5), "running_mean": (-0.3, 0.3), "running_var": (0.5, 1.5)}
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for name, (low, high) in ranges.items():
                getattr(layer, name).data.uniform_(low, high, generator=generator)


def _balance_policy(model: "BlockDropModel") -> None:
    """Scale and shift the policy's last layer until each probability lies on either side of 0.5 for half the images."""
    import torch

    images = _preprocessed(model, 16)
    layer = model.policy.logit
    with torch.no_grad():
        layer.bias.zero_()
        logits = torch.logit(model.policy(torch.from_numpy(images))).numpy()
        scale = torch.from_numpy(logits.std(axis=0))
        layer.weight /= scale[:, None]
        layer.bias -= torch.from_numpy(np.median(logits, axis=0)) / scale


def _preprocessed(model: "BlockDropModel", n: int) -> np.ndarray:
    from bdtool.data.synthetic import synthetic_images
    from bdtool.runtime.preprocess import preprocess

    size = model.spec.preprocessing
    return preprocess(synthetic_images(n, height=size.height, width=size.width), size)


@pytest.fixture(scope="session")
def preprocessed() -> Callable[["BlockDropModel", int], np.ndarray]:
    """Return a function that gives n preprocessed images float32 [n, 3, H, W] for a model."""
    return _preprocessed


@pytest.fixture(scope="session")
def pixels() -> Callable[["BlockDropModel", int], np.ndarray]:
    """Return a function that gives the n images uint8 [n, H, W, 3] which `preprocessed` gives preprocessed."""
    from bdtool.data.synthetic import synthetic_images

    def make(model: "BlockDropModel", n: int) -> np.ndarray:
        size = model.spec.preprocessing
        return synthetic_images(n, height=size.height, width=size.width)

    return make


@pytest.fixture(scope="session")
def torch_logits() -> Callable[..., np.ndarray]:
    """Return the oracle: logits of the masked forward in PyTorch, for images float32 [N, 3, H, W], keep bool [N, K]."""
    import torch

    def logits(model: "BlockDropModel", images: np.ndarray, keep: np.ndarray | None = None) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images), None if keep is None else torch.from_numpy(keep)).numpy()

    return logits


@pytest.fixture(scope="session")
def shared_traces() -> Iterator[None]:
    """Let all exports of the session share their traces: torch's exporter takes more than a second each time.

    Tests of the exporter itself export in a process of their own, where nothing is patched.
    """
    from export import onnx_model

    trace, memory = onnx_model.traced, {}

    def remembered(modules: "list[tuple[torch.fx.GraphModule, PartSpec]]") -> "list[onnx.ModelProto]":
        keys = [onnx_model.template_key(*module) for module in modules]
        if new := {key: module for key, module in zip(keys, modules, strict=True) if key not in memory}:
            memory.update(zip(new, trace(list(new.values())), strict=True))
        return [memory[key] for key in keys]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_model, "traced", remembered)
        yield


@pytest.fixture(scope="session")
def export_random(
    random_model: Callable[..., "BlockDropModel"], shared_traces: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Exported]:
    """Return a function that exports a random model (arguments as `random_model`), once in a session."""
    from bdtool.models.store import save_model
    from bdtool.pipeline import export_model

    @functools.cache
    def export(arch: str, **options: object) -> Exported:
        directory = tmp_path_factory.mktemp(arch)
        model = random_model(arch, **options)
        save_model(model, directory / "model.safetensors")
        export_model(directory / "model.safetensors", directory / "bundle")
        return Exported(model, directory / "model.safetensors", directory / "bundle")

    return export


@pytest.fixture(scope="session")
def tiny(export_random: Callable[..., Exported]) -> Exported:
    """The smallest ResNet there is, with a policy network, exported: three blocks, two of them change the shape.

    Its bundle belongs to all tests: read it, or take `bundle_copy`.
    """
    return export_random("resnet8", shortcut="average-pool")


@pytest.fixture
def bundle_copy(tiny: Exported, tmp_path: Path) -> Path:
    """A bundle of `tiny` that a test may damage; it has no engines."""
    return Path(shutil.copytree(tiny.bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("engines")))


@pytest.fixture
def digests() -> Callable[[Path], dict[str, str]]:
    """Return a function from a directory to the digest of every file in it, by relative path."""

    def of(directory: Path) -> dict[str, str]:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return {str(path.relative_to(directory)): sha256_of_file(path) for path in files}

    return of
