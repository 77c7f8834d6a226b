"""Networks as tutorials write them: plain torch, each in the style that it is usually seen in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn


class MnistNet(nn.Module):
    """Functions in forward; log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 28)
        self.fc2 = nn.Linear(28, 10)

    def forward(self, x):
        x = x.view(-1, 784)
        x = F.relu(self.fc1(x))
        return F.log_softmax(self.fc2(x), dim=1)


class SoftmaxRegression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, x):
        return self.linear(x.view(x.size(0), -1))


class ActivationNet(nn.Module):
    """Small Sequentials, with ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(784, 300), nn.ReLU(True))
        self.layer2 = nn.Sequential(nn.Linear(300, 100), nn.ReLU(True))
        self.layer3 = nn.Sequential(nn.Linear(100, 10))

    def forward(self, x):
        x = x.view(x.size(0), -1)
        x = self.layer1(x)
        x = self.layer2(x)
        return self.layer3(x)


class BatchNet(nn.Module):
    """The same with batch normalisation between layer and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(784, 300), nn.BatchNorm1d(300), nn.ReLU(True))
        self.layer2 = nn.Sequential(nn.Linear(300, 100), nn.BatchNorm1d(100), nn.ReLU(True))
        self.layer3 = nn.Sequential(nn.Linear(100, 10))

    def forward(self, x):
        return self.layer3(self.layer2(self.layer1(x.flatten(1))))


class CifarMLP(nn.Module):
    """One ReLU module for several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(3 * 32 * 32, 1000)
        self.fc2 = nn.Linear(1000, 500)
        self.fc3 = nn.Linear(500, 10)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = x.view(-1, 3 * 32 * 32)
        x = self.relu(self.fc1(x))
        x = self.relu(self.fc2(x))
        return self.fc3(x)


class ConvNet(nn.Module):
    """Pooling first, then ReLU, with methods of the tensor; dropout as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.max_pool2d(self.conv2(x), 2).relu()
        x = self.fc1(x.view(-1, 320)).relu()
        x = F.dropout(x, training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class Generator(nn.Module):
    """Of a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.gen = nn.Sequential(
            nn.Linear(100, 256),
            nn.ReLU(True),
            nn.Linear(256, 256),
            nn.ReLU(True),
            nn.Linear(256, 784),
            nn.Tanh(),
        )

    def forward(self, x):
        return self.gen(x)


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dis = nn.Sequential(
            nn.Linear(784, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return self.dis(x).squeeze(1)
