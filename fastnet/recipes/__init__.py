"""The named trainings that `fastnet train` runs."""

from fastnet.recipes.cnns import CATS_DOGS, SIMPLE_CNN
from fastnet.recipes.generative import AUTOENCODER, DCGAN_RECIPE, GAN_RECIPE, LSGAN
from fastnet.recipes.mlps import ACTIVATION_NET, BATCH_NET, CIFAR_MLP, SIMPLE_NET
from fastnet.recipes.mnist_net import MNIST_NET
from fastnet.recipes.recipe import Recipe
from fastnet.recipes.regressions import (
    LINEAR_REGRESSION,
    LOGISTIC_REGRESSION,
    LOGISTIC_REGRESSION_SCRATCH,
    SOFTMAX_REGRESSION,
    SOFTMAX_REGRESSION_SCRATCH,
)
from fastnet.recipes.transfer import RESNET18_TRANSFER, VGG16_FEATURES, VGG16_TRANSFER

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        LINEAR_REGRESSION,
        SOFTMAX_REGRESSION,
        SOFTMAX_REGRESSION_SCRATCH,
        LOGISTIC_REGRESSION,
        LOGISTIC_REGRESSION_SCRATCH,
        MNIST_NET,
        SIMPLE_NET,
        ACTIVATION_NET,
        BATCH_NET,
        SIMPLE_CNN,
        CIFAR_MLP,
        CATS_DOGS,
        RESNET18_TRANSFER,
        VGG16_TRANSFER,
        VGG16_FEATURES,
        AUTOENCODER,
        GAN_RECIPE,
        LSGAN,
        DCGAN_RECIPE,
    )
}
# Trainings that are drawn in one figure.
COMPARISONS: dict[str, tuple[Recipe, ...]] = {
    "mlp-comparison": (SIMPLE_NET, ACTIVATION_NET, BATCH_NET)
}

__all__ = ["COMPARISONS", "RECIPES", "Recipe"]
