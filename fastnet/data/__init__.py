"""Data sets that live in memory as uint8, and batches of them as normalised tensors."""

from fastnet.data.batches import Batches
from fastnet.data.cifar import CIFAR10, load_cifar10
from fastnet.data.folders import (
    CATS_DOGS_150,
    IMAGENET_150,
    IMAGENET_224,
    load_folder,
    split_folder,
)
from fastnet.data.mnist import FASHION_MNIST, MNIST, load_fashion_mnist, load_mnist
from fastnet.data.samples import Dataset, Samples

__all__ = [
    "CATS_DOGS_150",
    "CIFAR10",
    "FASHION_MNIST",
    "IMAGENET_150",
    "IMAGENET_224",
    "MNIST",
    "Batches",
    "Dataset",
    "Samples",
    "load_cifar10",
    "load_fashion_mnist",
    "load_folder",
    "load_mnist",
    "split_folder",
]
