"""The networks, each on the fused modules or, with backend="torch", on torch's own."""

from fastnet.models.mlp import mlp
from fastnet.models.mnist_net import MnistNet
from fastnet.models.simple_cnn import SimpleCNN

__all__ = ["MnistNet", "SimpleCNN", "mlp"]
