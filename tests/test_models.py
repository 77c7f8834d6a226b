"""The networks: each the same on both backends, and those by hand the same as torch's."""

from __future__ import annotations

import math
import subprocess
import sys
from urllib.error import URLError

import networks
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastnet
from fastnet.errors import FastnetError
from fastnet.models import (
    DCGAN,
    GAN,
    Autoencoder,
    CatsDogsCNN,
    MnistNet,
    SimpleCNN,
    classifier,
    discriminator_loss,
    generator_loss,
    mlp,
    resnet18,
    scratch,
    vgg16,
    vgg16_features,
)
from fastnet.models.layers import accelerated

# What makes it, the shapes of one input and its output, and the layers that are
# fastnet's own.
NETWORKS = {
    "mnist-net": (MnistNet, (1, 28, 28), (10,), ["fc1", "fc2"]),
    "simple-cnn": (
        SimpleCNN,
        (1, 28, 28),
        (10,),
        ["conv1", "conv2", "conv3", "fc1", "fc2", "fc3"],
    ),
    "mlp": (
        lambda backend: mlp(784, 30, 20, 10, backend=backend),
        (1, 28, 28),
        (10,),
        ["1", "2", "3"],
    ),
    "mlp-batch-norm": (
        lambda backend: mlp(784, 30, 20, 10, batch_norm=True, backend=backend),
        (1, 28, 28),
        (10,),
        ["1", "4", "7"],
    ),
    "autoencoder": (
        Autoencoder,
        (1, 28, 28),
        (1, 28, 28),
        [f"{part}.{layer}" for part in ("encoder", "decoder") for layer in (1, 2, 3, 4)],
    ),
    "gan": (
        GAN,
        (100,),
        (1, 28, 28),
        [
            f"{part}.{layer}"
            for part, layers in (("generator", "123"), ("discriminator", "135"))
            for layer in layers
        ],
    ),
    "gan-discriminator": (
        lambda backend: GAN(backend=backend).discriminator,
        (1, 28, 28),
        (),
        ["1", "3", "5"],
    ),
    "dcgan": (
        DCGAN,
        (96,),
        (1, 28, 28),
        ["generator.0", "generator.2", "discriminator.7", "discriminator.9"],
    ),
    "dcgan-discriminator": (
        lambda backend: DCGAN(backend=backend).discriminator,
        (1, 28, 28),
        (),
        ["7", "9"],
    ),
    # 39 -> 19 -> 9 -> 4 -> 2: pixels that no window has are left over twice.
    "cats-dogs-cnn": (
        lambda backend: CatsDogsCNN(39, backend=backend),
        (3, 39, 39),
        (2,),
        ["conv1", "conv2", "conv3", "conv4", "fc1", "fc2"],
    ),
    "classifier": (lambda backend: classifier(70, 3, backend), (70,), (3,), ["0", "2"]),
}


def on_both(make, *args, **kwargs) -> tuple[nn.Module, nn.Module]:
    """The same network from the same seed, fused and torch's own."""
    made = []
    for backend in ("fastnet", "torch"):
        torch.manual_seed(1)
        made.append(make(*args, backend=backend, **kwargs))
    return tuple(made)


def assert_same_values(fused: nn.Module, native: nn.Module) -> None:
    fused, native = fused.state_dict(), native.state_dict()
    assert list(fused) == list(native)
    for name, value in fused.items():
        torch.testing.assert_close(value, native[name], rtol=0, atol=0)


def assert_same_results(fused: nn.Module, native: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """Compares outputs and gradients; returns the outputs."""
    outputs, gradients = [], []
    for network in (fused, native):
        torch.manual_seed(2)  # for dropout
        given = input.clone().requires_grad_()
        output = network(given)
        (output * torch.randn(output.shape, dtype=output.dtype)).sum().backward()
        outputs.append(output.detach())
        gradients.append([given.grad, *(p.grad for p in network.parameters())])
    single = input.dtype == torch.float32
    # Normalised over three samples, roundings grow.
    rtol, atol = (1e-4, 1e-4) if single else (1e-9, 1e-11)
    torch.testing.assert_close(*outputs, rtol=rtol, atol=atol)
    for left, right in zip(*gradients, strict=True):
        if right is None:
            assert left is None
            continue
        size = max(1, right.abs().max().item())  # of the whole gradient: its elements are sums
        torch.testing.assert_close(left, right, rtol=rtol, atol=atol * size)
    return outputs[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_backends_begin_alike(name):
    make, _, _, layers = NETWORKS[name]
    fused, native = on_both(make)
    assert_same_values(fused, native)
    native.load_state_dict(fused.state_dict())

    def own_in(network):
        return [
            n for n, m in network.named_modules() if type(m).__module__ == fastnet.Linear.__module__
        ]

    assert own_in(fused) == layers
    assert own_in(native) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_backends_agree(name, batch, dtype):
    make, input_shape, output_shape, _ = NETWORKS[name]
    fused, native = (network.to(dtype) for network in on_both(make))
    normalises = any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in fused.modules())
    for training in (True, False):
        if training and normalises and batch == 1:
            continue  # one sample has no variance
        output = assert_same_results(
            fused.train(training),
            native.train(training),
            torch.rand(batch, *input_shape, dtype=dtype) * 2 - 1,
        )
        assert output.shape == (batch, *output_shape)
        assert output.isfinite().all()
        for network in (fused, native):
            network.zero_grad()


@pytest.mark.parametrize(
    "make",
    [
        MnistNet,
        SimpleCNN,
        Autoencoder,
        GAN,
        DCGAN,
        CatsDogsCNN,
        lambda backend: mlp(4, 3, 2, backend=backend),
        lambda backend: classifier(4, 2, backend),
        lambda backend: accelerated(nn.Linear(4, 2), backend),
    ],
)
def test_other_backends_are_refused(make):
    with pytest.raises(ValueError, match="backend must be one of fastnet, torch, not 'jax'"):
        make(backend="jax")


def test_mlp_has_its_layers_where_they_were():
    for relu in (True, False):
        names = list(mlp(784, 300, 100, 10, relu=relu).state_dict())
        assert names == [f"{at}.{what}" for at in (1, 2, 3) for what in ("weight", "bias")]
    assert list(mlp(784, 10).state_dict()) == ["1.weight", "1.bias"]
    for backend, kind in (("fastnet", fastnet.Linear), ("torch", nn.Linear)):
        network = mlp(9, 8, 7, relu=False, backend=backend)
        assert [type(m) for m in network[1:]] == [kind] * 2


def with_values_of(network: nn.Module, other: nn.Module) -> nn.Module:
    """The network with another's values, in their order."""
    values = other.state_dict().values()
    network.load_state_dict(dict(zip(network.state_dict(), values, strict=True)))
    return network


def test_mlp_with_batch_norm_is_the_documents():
    kinds = [fastnet.Linear, nn.BatchNorm1d, nn.ReLU]
    network = mlp(784, 300, 100, 10, batch_norm=True)
    assert [type(m) for m in network] == [nn.Flatten, *kinds, *kinds, fastnet.Linear]
    document = with_values_of(networks.BatchNet(), network)
    pictures = torch.rand(5, 1, 28, 28)
    for training in (True, False):
        found, expected = network.train(training)(pictures), document.train(training)(pictures)
        torch.testing.assert_close(found, expected)
    without = mlp(9, 8, 7, relu=False, batch_norm=True)
    assert [type(m) for m in without] == [nn.Flatten, kinds[0], kinds[1], kinds[0]]


def test_autoencoder_goes_through_its_code():
    network = Autoencoder()
    pictures = torch.rand(3, 1, 28, 28) * 2 - 1
    assert network.encoder(pictures).shape == (3, 3)
    assert (network.encoder(pictures) < 0).any()  # no ReLU on the code
    assert (network(pictures).abs() <= 1).all()
    assert network(pictures.flatten(1)).shape == (3, 784)
    widths = [p.shape[0] for p in network.parameters() if p.dim() == 2]
    assert widths == [128, 64, 12, 3, 12, 64, 128, 784]
    assert Autoencoder(12, [5])(torch.rand(2, 3, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize(("kind", "features"), [(GAN, 100), (DCGAN, 96), (GAN, 7), (DCGAN, 7)])
def test_gans_judge_what_they_make(kind, features):
    network = kind(features)
    assert (network.latent_features, network.latent_shape) == (features, (features,))
    noise = torch.rand(3, *network.latent_shape) * 2 - 1
    pictures = network(noise)
    assert pictures.shape == (3, 1, 28, 28)
    assert (pictures.abs() <= 1).all()
    assert network.discriminator(pictures).shape == (3,)
    assert network.discriminator(pictures[:1]).shape == (1,)


def test_gan_is_the_documents():
    network = GAN()
    generator = with_values_of(networks.Generator(), network.generator)
    discriminator = with_values_of(networks.Discriminator(), network.discriminator)
    pictures = generator(noise := torch.randn(3, 100))
    torch.testing.assert_close(network(noise).flatten(1), pictures)
    logits = network.discriminator(pictures.view(3, 1, 28, 28))
    torch.testing.assert_close(logits.sigmoid(), discriminator(pictures))


# Also where exp overflows.
LOGITS = torch.tensor([-1e4, -200.0, -3.0, 0.0, 0.5, 30.0, 1e4], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gan_losses_are_binary_cross_entropy(dtype):
    real, fake = (x.to(dtype).requires_grad_() for x in (LOGITS, LOGITS.flip(0) / 3))
    ones, zeros, bce = (
        torch.ones_like(real),
        torch.zeros_like(real),
        F.binary_cross_entropy_with_logits,
    )
    pairs = [
        (generator_loss(fake), bce(fake, ones)),
        (discriminator_loss(real, fake), bce(real, ones) + bce(fake, zeros)),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
        for x in (real, fake):
            torch.testing.assert_close(
                *(torch.autograd.grad(loss, x, allow_unused=True)[0] for loss in (found, expected))
            )


def test_gan_losses_are_squares():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0, -1.0])
    assert generator_loss(fake, least_squares=True).item() == pytest.approx((1 + 1 + 4) / 3 / 2)
    assert discriminator_loss(real, fake, least_squares=True).item() == pytest.approx(
        (0 + 4) / 2 / 2 + (0 + 4 + 1) / 3 / 2
    )


def test_cats_dogs_cnn_is_the_documents():
    network = CatsDogsCNN()
    assert network.fc1.in_features == 128 * 9 * 9
    assert network(torch.rand(1, 3, 150, 150)).shape == (1, 2)
    assert CatsDogsCNN(16, 5)(torch.rand(2, 3, 16, 16)).shape == (2, 5)
    with pytest.raises(ValueError, match="at least 16 pixels, for four poolings, not 15"):
        CatsDogsCNN(15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_and_losses_by_hand(dtype):
    logits = torch.randn(7, 5, dtype=dtype) * 3
    logits[0] = torch.tensor([1e4, -1e4, 0, 1e4, 5])  # two share all of it
    logits[1] = -1e4
    logits[2] = torch.tensor([-1e4, -1e4, -1e4, 1e4, -1e4])
    logits.requires_grad_()
    torch.testing.assert_close(scratch.softmax(logits), F.softmax(logits, 1))
    torch.testing.assert_close(scratch.log_softmax(logits), F.log_softmax(logits, 1))
    targets = torch.tensor([3, 1, 3, 0, 4, 4, 2])
    expected = F.cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(expected, logits)
    log_probabilities = scratch.log_softmax(logits)
    torch.testing.assert_close(
        scratch.nll(log_probabilities, targets), F.nll_loss(log_probabilities, targets)
    )
    for found in (
        scratch.cross_entropy(scratch.softmax(logits), targets),
        scratch.nll(log_probabilities, targets),
    ):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, logits)[0], gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_targets_cost_finitely(dtype):
    logits = torch.tensor([[1e4, -1e4], [0, 0]], dtype=dtype, requires_grad=True)
    loss = scratch.cross_entropy(scratch.softmax(logits), torch.tensor([1, 0]))
    expected = (-math.log(torch.finfo(dtype).tiny) + math.log(2)) / 2
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    torch.testing.assert_close(
        logits.grad, torch.tensor([[0, 0], [-0.25, 0.25]], dtype=dtype), rtol=1e-6, atol=1e-6
    )
    # With logarithms, what it costs is told.
    loss = scratch.nll(scratch.log_softmax(logits), torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((2e4 + math.log(2)) / 2)


def test_regressions_begin_as_the_documents():
    torch.manual_seed(5)
    logistic = scratch.LogisticRegression(784, 10)
    torch.manual_seed(5)
    torch.testing.assert_close(logistic.weight.data, torch.randn(784, 10) / math.sqrt(784))
    softmax, linear = scratch.SoftmaxRegression(784, 10), scratch.LinearRegression(1000)
    for network in (softmax, linear):
        assert network.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert network.weight.mean().item() == pytest.approx(0, abs=1e-3)
    shapes = {name: tuple(p.shape) for name, p in linear.named_parameters()}
    assert shapes == {"weight": (1000, 1), "bias": (1,)}
    for network in (logistic, softmax):
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        assert shapes == {"weight": (784, 10), "bias": (10,)}
    for network in (logistic, softmax, linear):
        assert not network.bias.any()
    pictures = torch.rand(3, 1, 28, 28)
    torch.testing.assert_close(softmax(pictures).sum(1), torch.ones(3))
    torch.testing.assert_close(logistic(pictures).exp().sum(1), torch.ones(3))


def test_accuracy_by_hand():
    output = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    assert scratch.accuracy(output, torch.tensor([1, 0, 0, 0])).item() == 0.75


def test_squared_loss_by_hand():
    output, targets = torch.randn(5, 1), torch.randn(5)
    expected = F.mse_loss(output, targets.view(5, 1)) / 2
    torch.testing.assert_close(scratch.squared_loss(output, targets), expected)
    torch.testing.assert_close(scratch.squared_loss(output, targets.view(5, 1)), expected)


@pytest.mark.parametrize("kind", ["linear", "logistic", "softmax"])
def test_regressions_learn_as_with_torchs_own(kind):
    if kind == "linear":
        network, loss, own_loss = (
            scratch.LinearRegression(6),
            scratch.squared_loss,
            lambda output, targets: F.mse_loss(output, targets.view(-1, 1)) / 2,
        )
        inputs = torch.randn(20, 6)
        targets = inputs @ torch.randn(6) + 4.2
    else:
        network, loss = {
            "logistic": (scratch.LogisticRegression(6, 3), scratch.nll),
            "softmax": (scratch.SoftmaxRegression(6, 3), scratch.cross_entropy),
        }[kind]
        inputs, targets, own_loss = torch.randn(20, 1, 2, 3), torch.randint(3, (20,)), None
    own = nn.Sequential(nn.Flatten(), nn.Linear(*network.weight.shape))
    own[1].load_state_dict({"weight": network.weight.T, "bias": network.bias})
    sgd, own_sgd = (
        scratch.SGD(network.parameters(), 0.1),
        torch.optim.SGD(own.parameters(), lr=0.1),
    )
    for _ in range(5):
        losses = loss(network(inputs), targets), (own_loss or F.cross_entropy)(own(inputs), targets)
        torch.testing.assert_close(*losses)
        for optimizer, value in zip((sgd, own_sgd), losses, strict=True):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    torch.testing.assert_close(network.weight.T, own[1].weight)
    torch.testing.assert_close(network.bias, own[1].bias)


def test_sgd_by_hand():
    moved, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = scratch.SGD([{"params": [moved], "lr": 0.5}, {"params": [still]}], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (moved**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert optimizer.step() is None
    assert moved.tolist() == [-1, -1]  # 1 - 0.5 * 2 * 1 = 0, and the same gradient once more
    assert still.tolist() == [1, 1]
    other = scratch.SGD([{"params": [moved]}, {"params": [still]}], lr=9)
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.1]
    with pytest.raises(ValueError, match="lr must not be negative, as -1 is"):
        scratch.SGD([moved], -1)


@pytest.fixture
def models():
    return pytest.importorskip("torchvision.models")


def test_torchvision_is_loaded_when_it_is_needed(monkeypatch):
    check = (
        "import sys, fastnet.models; print(bool({'torchvision', 'safetensors'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(FastnetError, match=r"^resnet18 needs torchvision: pip install 'fastnet"):
        resnet18(2)


def test_resnet18_on_both_backends(models):
    fused, native = on_both(resnet18, 3, weights="none")
    assert_same_values(fused, native)
    assert list(fused.state_dict()) == list(models.resnet18().state_dict())
    assert all(p.requires_grad for p in fused.parameters())
    pictures = torch.randn(2, 3, 64, 64)
    assert assert_same_results(fused, native, pictures).shape == (2, 3)
    assert_same_results(fused.eval(), native.eval(), pictures[:1])


def test_vgg16_on_both_backends(models):
    fused, native = on_both(vgg16, 3, weights="none")
    assert_same_values(fused, native)
    with torch.device("meta"):
        assert list(fused.state_dict()) == list(models.vgg16().state_dict())
    report = fastnet.accelerate_report(fused)
    convolutions = [row.fused for row in report.rows if row.name.startswith("features")]
    assert convolutions.count("ReLU, MaxPool2d") == 5
    assert report.fused == 7
    assert fastnet.accelerate_report(native).fused == 0
    assert isinstance(fused.classifier[5], nn.Dropout)
    # In evaluation, where dropout does not hide a difference; gradients are those of the head.
    output = assert_same_results(fused.eval(), native.eval(), torch.randn(2, 3, 64, 64))
    assert output.shape == (2, 3)
    trained = {name.split(".")[0] for name, p in fused.named_parameters() if p.requires_grad}
    assert trained == {"classifier"}
    assert all((p.grad is not None) == p.requires_grad for p in fused.parameters())


@pytest.mark.usefixtures("models")
def test_vgg16_is_trained_whole_unless_frozen():
    network = vgg16(2, weights="none", frozen=False)
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.usefixtures("models")
def test_vgg16_features_on_both_backends():
    fused, native = on_both(vgg16_features, weights="none")
    assert_same_values(fused, native)
    assert not fused.training
    assert fastnet.accelerate_report(fused).fused == 5
    # 70 -> 2 pixels, with some left over on the way.
    pictures = torch.randn(3, 3, 70, 70)
    features = fused(pictures)
    assert features.shape == (3, 512 * 2 * 2)
    assert not features.requires_grad
    torch.testing.assert_close(features, native(pictures), rtol=1e-4, atol=1e-5)
    head = classifier(features.shape[1], 2)
    head(features).sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def save(state: dict, path) -> None:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    else:
        torch.save(state, path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("backend", ["fastnet", "torch"])
def test_weights_from_a_file(models, tmp_path, backend, suffix):
    theirs = models.resnet18().eval()
    path = tmp_path / f"resnet18{suffix}"
    save(theirs.state_dict(), path)
    for given in (path, str(path)):
        network = resnet18(2, backend, given).eval()
    for name, value in theirs.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(network.state_dict()[name], value), name
    theirs.fc = network.fc
    pictures = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(pictures), theirs(pictures))


def test_files_that_are_no_weights(models, tmp_path, monkeypatch):
    with pytest.raises(FastnetError, match=r"no file .*absent.pth: --weights is imagenet, none"):
        resnet18(2, weights=tmp_path / "absent.pth")
    for suffix in (".pth", ".safetensors"):
        damaged = tmp_path / f"damaged{suffix}"
        damaged.write_bytes(b"these are no weights at all")
        with pytest.raises(FastnetError, match=rf"damaged{suffix} cannot be read: it is damaged"):
            resnet18(2, weights=damaged)
    # Cut off; with code in it, which is not run; and what is no state dict, or another's.
    save(models.resnet18().state_dict(), whole := tmp_path / "whole.pth")
    (cut := tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:100_000])
    torch.save(nn.Linear(2, 2), module := tmp_path / "module.pth")
    for path in (cut, module):
        with pytest.raises(FastnetError, match=f"{path.name} cannot be read: it is damaged"):
            resnet18(2, weights=path)
    others = [
        torch.ones(3),
        {},
        {1: torch.ones(3)},
        {"fc.weight": 5},
        models.resnet34().state_dict(),
        models.resnet18(num_classes=2).state_dict(),
    ]
    for other in others:
        torch.save(other, path := tmp_path / "other.pth")
        with pytest.raises(FastnetError, match=r"other.pth is no state dict of .*resnet18") as info:
            resnet18(2, weights=path)
        assert "\n" not in str(info.value)
        assert len(str(info.value)) < len(str(path)) + 250
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(FastnetError, match=r"needs safetensors: pip install 'fastnet\[vision\]'"):
        resnet18(2, weights=damaged)


def test_weights_of_imagenet(models, tmp_path, monkeypatch):
    """Without a connection: what would be downloaded is put there."""
    folder = tmp_path / "hub" / "checkpoints"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def no_connection(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_connection)
    with pytest.raises(FastnetError) as info:
        resnet18(2)
    message = str(info.value)
    assert message.startswith("resnet18-f37072fd.pth could not be downloaded")
    for part in (str(folder), "no route to host", "--weights none", "--weights FILE"):
        assert part in message
    file = folder / "resnet18-f37072fd.pth"
    file.write_bytes(b"not all of it")
    with pytest.raises(FastnetError, match=f"{file.name} cannot be read: it is damaged"):
        resnet18(2)
    state = models.resnet18().state_dict()
    torch.save(state, file)
    assert torch.equal(resnet18(2, weights="imagenet").conv1.weight, state["conv1.weight"])
