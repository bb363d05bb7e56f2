"""The rows of the paper's Table 1, one command each: train what a row needs, then measure it through exported engines.

    python benchmarks/table1.py resnet32 learned --data cifar10:ROOT --finetuned -o runs/resnet32-cifar10
    python benchmarks/table1.py resnet32 distribute --data cifar10:ROOT -o runs/resnet32-cifar10
    python benchmarks/table1.py resnet110 full --data cifar100:ROOT -o runs/resnet110-cifar100
    python benchmarks/table1.py resnet101 learned --data imagenet:ROOT --finetuned --device cuda -o runs/resnet101

Models in the directory `-o` are taken as they are, and an unfinished one is gone on with, so rows share their base, and
a row can be broken off and repeated. Without a base there, one is trained (ImageNet: put a torchvision checkpoint there
with `bdtool import`). Rows `taught`, `halved` and `one-mask-taught` take a better base from there, as
`teacher.safetensors`. Each row adds its figures to `table1.json` in that directory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bdtool.models.architectures import architecture, policy_downscale, policy_trunk
from bdtool.models.store import read_spec
from export.files import write_json

_HEURISTICS = ("first", "random", "distribute", "one-mask", "one-mask-taught")
POLICIES = ("full", *_HEURISTICS, "learned", "imitated", "warm-started", "taught", "halved")
# blocks kept by the heuristics: as many as the paper's learned policy keeps, rounded
N_KEPT = {"resnet32": 7, "resnet110": 17, "resnet101": 25}
_LONG = ("--epochs", 36, "--batch", 128, "--base-lr", 0.1)  # the last of an option given twice counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", choices=N_KEPT)
    parser.add_argument("policy", choices=POLICIES)
    parser.add_argument("--finetuned", action="store_true", help="base and policy, or base and heuristic, fine-tuned")
    parser.add_argument("--data", required=True, help="training images; a DATA of bdtool")
    parser.add_argument("--val", help="test images; default: the same DATA, whose test split is then taken")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    row = Row(args.arch, args.output, data=args.data, val=args.val or args.data, device=args.device)
    figures = row.measure(args.policy, finetuned=args.finetuned)
    name = f"{args.arch} {args.policy}{' finetuned' if args.finetuned else ''}"
    path = args.output / "table1.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**rows, name: figures})
    share = figures["flops_mean"] / figures["full_flops"]
    print(f"{name}: {figures['accuracy']:.4f}, {figures['blocks_mean']:.2f} blocks, {share:.3f} of the FLOPs")


class Row:
    """The models of one architecture and data set, made as they are needed."""

    def __init__(self, arch: str, directory: Path, *, data: str, val: str, device: str) -> None:
        self._arch, self._directory, self._data, self._val, self._device = arch, directory, data, val, device
        self._n_blocks = architecture(arch).n_blocks
        self._is_large = architecture(arch).family == "imagenet"

    def measure(self, policy: str, *, finetuned: bool) -> dict[str, Any]:
        """Return what `bdtool evaluate` says of the row's bundle."""
        kept = N_KEPT[self._arch]
        learned = {  # before fine-tuning, and after
            "learned": (self.curriculum, self.learned),
            "imitated": (self.imitated_policy, self.imitated),
            "warm-started": (self.warm_curriculum, self.warm_started),
            "taught": (self.warm_curriculum, self.taught),
            "halved": (self.halved_policy, self.halved),
        }
        if policy == "full":
            form, model = "all", self.base()
        elif policy in learned:
            form, model = "learned", learned[policy][finetuned]()
        elif policy == "one-mask-taught":
            form, model = self.mask(), self.one_mask_taught() if finetuned else self.halved_policy()
        else:
            form = self.mask() if policy == "one-mask" else f"{policy}:{kept}"
            model = self.heuristic(policy, form) if finetuned else self.base()
        bundle = self._directory / f"{model.stem}-bundle"
        if not bundle.exists():  # an earlier row's, written whole
            bdtool("export", model, "-o", bundle)
        bdtool("build", bundle)
        result = subprocess.run(
            _command("evaluate", bundle, "--data", self._val, "--policy", form, "--json", "-"),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return dict(json.loads(result.stdout))

    def base(self) -> Path:
        if self._is_large:
            self._require("base", "torchvision's weights")
        return self._train(
            "base", "pretrain", "--arch", self._arch, "--epochs", 30 if self._arch == "resnet32" else 160
        )

    def tolerant(self) -> Path:
        """The base after some epochs with blocks dropped at random, so that the policy network finds something to drop.

        The paper goes without, and trains the policy network for 5,000 epochs instead.
        """
        policy = f"random:{round(0.6 * self._n_blocks)}"
        return self._finetune("tolerant", self.base(), "--policy", policy, "--epochs", 4)

    def tolerant_of_depths(self) -> Path:
        """The base after epochs at many depths: more blocks must help it, or no image is worth more than another."""
        policy = f"random:{round(0.27 * self._n_blocks)}-{round(0.8 * self._n_blocks)}"
        return self._finetune("tolerant-of-depths", self.tolerant(), "--policy", policy, "--epochs", 7)

    def trunk(self) -> Path:
        """A classifier for the policy network to start from, on images normalized as the base's."""
        return self._trunk("trunk", policy_downscale(architecture(self._arch).family))

    def curriculum(self) -> Path:
        options = ("--gamma", 1.5, "--lr", 3e-4, "--entropy", 0.01, "--schedule", "cosine")
        options += ("--epochs", 5, "--stage-epochs", 3 / self._n_blocks, "--stage-blocks", 3)
        return self._train("curriculum", "curriculum", self.tolerant_of_depths(), "--trunk", self.trunk(), *options)

    def learned(self) -> Path:
        """Base and policy together, then the base along the paths that the policy network takes."""
        options = ("--alpha", 0.9, "--gamma", 1.7, "--lr", 4e-5, "--entropy", 0.005, "--epochs", 18)
        joint = self._finetune("joint", self.curriculum(), *options)
        return self._finetune("learned", joint, *self._along_paths(), "--epochs", 14)

    def imitated_policy(self) -> Path:
        """A policy network that gives harder images more blocks."""
        start = self.tolerant_of_depths()
        return self._train("imitated-policy", "imitate", start, "--trunk", self.trunk(), *self._mean_blocks())

    def imitated(self) -> Path:
        """The base along the paths of that policy network, after 29 epochs in all."""
        return self._finetune("imitated", self.imitated_policy(), *self._along_paths(), "--epochs", 18)

    def mask(self) -> str:
        """The mask that `imitate` found for so many blocks, for all images: what deciding for each one has to beat."""
        policy = self.imitated_policy()
        masks = read_spec(policy).provenance.get("masks")
        if masks is None:
            raise SystemExit(
                f"{policy}: was made before `bdtool train imitate` noted its masks; remove it to train it anew"
            )
        return str(masks[str(N_KEPT[self._arch])])

    def warm_curriculum(self) -> Path:
        """The paper's policy gradient, from the policy network that has learned by imitation."""
        options = ("--augment", "flip", "--gamma", 2.5, "--lr", 1e-4, "--entropy", 0.01, "--schedule", "cosine")
        options += ("--epochs", 4, "--stage-epochs", 1.5 / self._n_blocks, "--stage-blocks", 3)
        return self._train("warm-curriculum", "curriculum", self.imitated_policy(), *options)

    def warm_started(self) -> Path:
        """The base along the paths of that policy network, after 47 epochs in all."""
        return self._finetune("warm-started", self.warm_curriculum(), *self._along_paths(), *_LONG)

    def taught(self) -> Path:
        """And 20 epochs more, in which the base learns a teacher's answers, too."""
        teacher = self._require("teacher", "a public checkpoint")
        options = ("--teacher", teacher, *self._along_paths(), *_LONG, "--epochs", 20)
        return self._finetune("taught", self.warm_started(), *options)

    def halved_policy(self) -> Path:
        """A policy network that looks at images of half the size, for the base of `taught`."""
        trunk = self._trunk("halved-trunk", 2 * policy_downscale(architecture(self._arch).family))
        return self._train("halved-policy", "imitate", self.taught(), "--trunk", trunk, *self._mean_blocks())

    def halved(self) -> Path:
        """The base of `taught` along the paths of that policy network, with the same teacher: `r32-cifar10`."""
        return self._taught_again("halved", *self._along_paths())

    def one_mask_taught(self) -> Path:
        """One mask for all images, from the start of `halved`, for as long, with the same teacher."""
        return self._taught_again("one-mask-taught", "--policy", self.mask())

    def _taught_again(self, name: str, *words: object) -> Path:
        teacher = self._require("teacher", "a public checkpoint")
        options = ("--epochs", 6, "--batch", 128, "--base-lr", 0.02, "--teacher", teacher)
        return self._finetune(name, self.halved_policy(), *options, *words)

    def heuristic(self, name: str, form: str) -> Path:
        """The base under a heuristic, or one mask, from the start of `warm_started`, for as long, with its options."""
        return self._finetune(name, self.tolerant_of_depths(), "--policy", form, *_LONG)

    def _trunk(self, name: str, downscale: int) -> Path:
        colours = read_spec(self.base()).preprocessing
        mean, std = (",".join(map(str, values)) for values in (colours.mean, colours.std))
        arch = policy_trunk(architecture(self._arch).family).name
        options = ("--arch", arch, "--downscale", downscale, "--epochs", 12, "--mean", mean, "--std", std)
        return self._train(name, "pretrain", *options)

    def _mean_blocks(self) -> tuple[object, ...]:
        """Blocks of the easiest and the hardest images, on average about as many as the heuristics keep."""
        kept = N_KEPT[self._arch]
        return ("--fewest", round(kept * 5 / 7), "--most", round(kept * 9 / 7))

    def _along_paths(self) -> tuple[object, ...]:
        """A policy network that stays as it is, but for how many blocks it keeps on average."""
        return ("--freeze-policy", "--blocks", N_KEPT[self._arch] - 0.1)

    def _finetune(self, name: str, start: Path, *words: object) -> Path:
        return self._train(name, "finetune", start, "--base-lr", 0.05, *words)

    def _require(self, name: str, source: str) -> Path:
        path = self._path(name)
        if not path.exists():
            raise SystemExit(f"{path}: none there; make it with bdtool import from {source}")
        return path

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"

    def _train(self, name: str, stage: str, *words: object) -> Path:
        path = self._path(name)
        if not path.exists():
            place = ("--data", self._data, "--val", self._val, "--device", self._device)
            bdtool("train", stage, *words, *place, "--resume", "--json", path.with_suffix(".json"), "-o", path)
        return path


def bdtool(*words: object) -> None:
    subprocess.run(_command(*words), check=True)


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "bdtool", *map(str, words)]


if __name__ == "__main__":
    main()
