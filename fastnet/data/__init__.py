"""Data sets that live in memory as uint8, and batches of them as normalised tensors."""

from fastnet.data.batches import Batches
from fastnet.data.images import Dataset, ImageSet
from fastnet.data.mnist import FASHION_MNIST, MNIST, load_fashion_mnist, load_mnist

__all__ = [
    "FASHION_MNIST",
    "MNIST",
    "Batches",
    "Dataset",
    "ImageSet",
    "load_fashion_mnist",
    "load_mnist",
]
