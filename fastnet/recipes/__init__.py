"""The named trainings that `fastnet train` runs."""

from fastnet.recipes.mlps import (
    ACTIVATION_NET,
    LOGISTIC_REGRESSION,
    SIMPLE_NET,
    SOFTMAX_REGRESSION,
)
from fastnet.recipes.mnist_net import MNIST_NET
from fastnet.recipes.simple_cnn import SIMPLE_CNN
from fastnet.recipes.training import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        MNIST_NET,
        SOFTMAX_REGRESSION,
        LOGISTIC_REGRESSION,
        SIMPLE_NET,
        ACTIVATION_NET,
        SIMPLE_CNN,
    )
}

__all__ = ["RECIPES", "Recipe"]
