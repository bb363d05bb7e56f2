"""Names in the layouts of public data sets, as they unpack."""

from typing import Literal

Split = Literal["train", "test"]
Labels = Literal["strict", "optional"]  # of class folders that are not the model's: refused, or left out
CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
CIFAR_ARCHIVES = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
# of the files in these folders, enough to tell them by
CIFAR_FILES = {"cifar10": frozenset({"data_batch_1"}), "cifar100": frozenset({"train", "test", "meta"})}
CIFAR10_BINARY = "data_batch_1.bin"  # of its version for C programs, which torchvision does not read
