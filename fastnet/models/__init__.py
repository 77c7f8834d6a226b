"""The networks, each on the fused modules or, with backend="torch", on torch's own; and `scratch`,
those that do without either."""

from fastnet.models import scratch
from fastnet.models.autoencoder import Autoencoder
from fastnet.models.cats_dogs_cnn import CatsDogsCNN
from fastnet.models.gan import DCGAN, GAN, discriminator_loss, generator_loss
from fastnet.models.mlp import mlp
from fastnet.models.mnist_net import MnistNet
from fastnet.models.simple_cnn import SimpleCNN
from fastnet.models.transfer import classifier, resnet18, vgg16, vgg16_features

__all__ = [
    "DCGAN",
    "GAN",
    "Autoencoder",
    "CatsDogsCNN",
    "MnistNet",
    "SimpleCNN",
    "classifier",
    "discriminator_loss",
    "generator_loss",
    "mlp",
    "resnet18",
    "scratch",
    "vgg16",
    "vgg16_features",
]
