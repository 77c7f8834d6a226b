"""Data sets that live in memory as uint8, and batches of them as normalised tensors."""

from fastnet.data.batches import Batches
from fastnet.data.images import ImageSet
from fastnet.data.mnist import MNIST_MEAN, MNIST_STD, load_mnist

__all__ = ["MNIST_MEAN", "MNIST_STD", "Batches", "ImageSet", "load_mnist"]
