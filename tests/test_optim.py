"""fastnet.optim: torch.optim's results, state and interface, whichever of the two takes a step."""

import collections
import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import run_on_isa, threads
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fastnet
from fastnet import optim
from fastnet._library import NODES

needs_nodes = pytest.mark.skipif(NODES is None, reason="the kernel is for the torch of the build")

CASES = [
    ("Adam", {}),
    ("Adam", {"lr": 0.1, "betas": (0.3, 0.7), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {"lr": 0.01}),
    ("AdamW", {"weight_decay": 0.5, "eps": 0.1}),
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.2}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
]
# What only torch steps.
NATIVE = [
    ("Adam", {"amsgrad": True}),
    ("Adam", {"maximize": True}),
    ("Adam", {"lr": torch.tensor(0.01), "foreach": False}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5}),
    ("SGD", {"maximize": True}),
]
SHAPES = [(28, 784), (28,), (3, 5, 2, 2), (), (0, 4), (1,), (17,)]


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def take_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def steps(optimizer, params, count=4, first=0):
    for seed in range(first, first + count):
        take_gradients(params, seed)
        optimizer.step()


def kernel_steps(monkeypatch):
    """Which steps the kernel took, in turn."""
    taken = []

    class Counting:
        is_observed = staticmethod(NODES.is_observed if NODES is not None else bool)

        def optimizer_step(self, groups, state):
            taken.append(NODES.optimizer_step(groups, state))
            return taken[-1]

    if NODES is not None:
        monkeypatch.setattr(optim, "NODES", Counting())
    return taken


def assert_same(params, expected, **tolerance):
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.to(e.dtype), e, **tolerance)


def states(optimizer):
    return [v for state in optimizer.state.values() for v in state.values() if v is not None]


@needs_nodes
@pytest.mark.parametrize(("name", "options"), CASES)
def test_agrees_with_float64(name, options, monkeypatch):
    taken = kernel_steps(monkeypatch)
    params, exact = parameters(), parameters(dtype=torch.float64)
    own = getattr(optim, name)(params, **options)
    reference = getattr(torch.optim, name)(exact, **options)
    steps(own, params, 12)
    for seed in range(12):
        take_gradients(params, seed)
        for p, e in zip(params, exact, strict=True):
            e.grad = p.grad.double()
        reference.step()
    assert taken[1:] == [True] * 11  # the first one is torch's where there is a state to make
    assert_same(params, exact, rtol=1e-5, atol=1e-6)
    assert_same(states(own), states(reference), rtol=1e-5, atol=1e-6, check_dtype=False)


@needs_nodes
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    run_on_isa(isa, __file__, "agrees_with_float64 or infinite")


@pytest.mark.parametrize(("name", "options"), NATIVE)
def test_what_only_torch_steps(name, options, monkeypatch):
    taken = kernel_steps(monkeypatch)
    params, others = parameters(), parameters()
    steps(getattr(optim, name)(params, **options), params)
    steps(getattr(torch.optim, name)(others, **options), others)
    assert not any(taken)
    assert_same(params, others, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), [*CASES, *NATIVE])
def test_state_dicts_load_both_ways(name, options):
    for first, second in ((optim, torch.optim), (torch.optim, optim)):
        params, others = parameters(), parameters()
        before = getattr(first, name)(params, **options)
        steps(before, params, 3)
        with torch.no_grad():
            for p, other in zip(params, others, strict=True):
                other.copy_(p)
        after = getattr(second, name)(others, **options)
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        steps(before, params, 3, first=3)
        steps(after, others, 3, first=3)
        assert_same(params, others, rtol=1e-5, atol=1e-6)
        assert before.state_dict()["param_groups"] == after.state_dict()["param_groups"]


@needs_nodes
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=5),
    st.sampled_from(CASES),
    st.data(),
)
def test_any_shapes_and_missing_gradients(shapes, case, data):
    name, options = case
    params, others = parameters(shapes), parameters(shapes)
    own = getattr(optim, name)(params, **options)
    native = getattr(torch.optim, name)(others, **options)
    for seed in range(3):
        take_gradients(params, seed)
        take_gradients(others, seed)
        for p, other in zip(params, others, strict=True):
            if data.draw(st.booleans()):
                p.grad = other.grad = None
        own.step()
        native.step()
    assert_same(params, others, rtol=1e-5, atol=1e-6)


@needs_nodes
def test_threads_do_not_change_a_bit():
    results = []
    for count in (1, 2, 3):
        params = parameters([(777, 101), (5,), (333, 3)])
        with threads(count):
            steps(optim.Adam(params), params)
        results.append(params)
    for params in results[1:]:
        assert_same(params, results[0], rtol=0, atol=0)


@needs_nodes
def test_groups_closures_and_schedulers(monkeypatch):
    taken = kernel_steps(monkeypatch)
    runs = []
    for home in (optim, torch.optim):
        params = parameters()
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "betas": (0.5, 0.6)}]
        optimizer = home.Adam(groups, lr=0.01)
        scheduler = StepLR(optimizer, 2, gamma=0.5)

        def closure(params=params, optimizer=optimizer):
            optimizer.zero_grad()
            assert torch.is_grad_enabled()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        with torch.no_grad():
            losses = []
            for _ in range(5):
                losses.append(optimizer.step(closure).item())
                scheduler.step()
        assert optimizer.step() is None
        runs.append((params, losses))
    assert taken == [False] + [True] * 5
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-5)
    assert_same(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-6)


@needs_nodes
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(layout, monkeypatch):
    taken = kernel_steps(monkeypatch)
    weight = torch.randn(8, 3, 5, 5).to(memory_format=layout)
    params, others = [nn.Parameter(weight.clone())], [nn.Parameter(weight.clone())]
    own, native = optim.Adam(params), torch.optim.Adam(others)
    for _ in range(3):
        grad = torch.randn(8, 3, 5, 5)
        params[0].grad = grad.clone(memory_format=torch.preserve_format).to(memory_format=layout)
        others[0].grad = grad
        own.step()
        native.step()
    assert taken == [False, True, True]
    assert_same(params, others, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torchs(dtype, monkeypatch):
    taken = kernel_steps(monkeypatch)
    params, others = parameters(dtype=dtype), parameters(dtype=dtype)
    steps(optim.AdamW(params), params)
    steps(torch.optim.AdamW(others), others)
    assert not any(taken)
    assert_same(params, others, rtol=0, atol=0)


@needs_nodes
def test_what_a_step_cannot_do_it_leaves_whole(monkeypatch):
    """A last parameter that is not plain: none is stepped twice, by the kernel and by torch."""
    taken = kernel_steps(monkeypatch)
    for spoil in ("dtype", "layout", "shared", "view"):
        results = []
        for home in (optim, torch.optim):
            params = parameters([(6, 4), (6, 4)])
            if spoil == "dtype":
                params.append(parameters([(3,)], dtype=torch.float64)[0])
            if spoil == "shared":
                params.append(nn.Parameter(params[0].data))
            if spoil == "view":
                params.append(nn.Parameter(torch.ones(4, 6).t()[::2]))
            optimizer = home.SGD(params, lr=0.1, momentum=0.9)
            for seed in range(3):
                take_gradients(params, seed)
                if spoil == "layout":
                    params[-1].grad = params[-1].grad.t().contiguous().t()
                optimizer.step()
            results.append(params)
        assert_same(*results, rtol=1e-6, atol=1e-6)
    assert not any(taken)


@needs_nodes
def test_sparse_gradients_and_subclasses_are_torchs():
    embedding = nn.Embedding(7, 3, sparse=True)
    other = copy.deepcopy(embedding)
    own, native = optim.SGD([embedding.weight], lr=0.1), torch.optim.SGD([other.weight], lr=0.1)
    for layer, optimizer in ((embedding, own), (other, native)):
        layer(torch.tensor([1, 1, 5])).sum().backward()
        optimizer.step()
    assert_same([embedding.weight], [other.weight], rtol=0, atol=0)
    adam = optim.Adam([embedding.weight])
    with pytest.raises(RuntimeError, match="sparse"):
        adam.step()


@needs_nodes
def test_infinite_and_nan(monkeypatch):
    taken = kernel_steps(monkeypatch)
    hostile = torch.tensor([0.0, -0.0, 1e-45, 1e20, -1e38, float("inf"), float("nan"), 1.0, 2.0])
    for name, options in CASES:
        runs = []
        for home in (optim, torch.optim):
            params = [nn.Parameter(torch.linspace(-1, 1, 9)), nn.Parameter(hostile.clone())]
            optimizer = getattr(home, name)(params, **options)
            for _ in range(3):
                params[0].grad, params[1].grad = hostile.clone(), torch.linspace(-1, 1, 9)
                optimizer.step()
            runs.append(params)
        assert_same(*runs, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert all(taken[2::3])


@needs_nodes
def test_written_tensors_have_new_versions():
    params = parameters([(4, 4)])
    optimizer = optim.Adam(params)
    steps(optimizer, params)
    result = (params[0] * torch.ones(4, 4, requires_grad=True)).sum()
    take_gradients(params, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_hooks_are_called_once(monkeypatch):
    taken = kernel_steps(monkeypatch)
    params, calls = parameters(), []
    optimizer = optim.Adam(params)
    steps(optimizer, params)
    del taken[:]
    told = []
    handles = [
        optimizer.register_step_pre_hook(lambda _, args, kwargs: told.append((args[1:], kwargs))),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("any")),
    ]
    steps(optimizer, params, 1)
    assert sorted(calls) == ["after", "any", "before"]
    assert told == [((), {})]
    optimizer.step(closure=float)
    optimizer.step(float)
    assert told[1:] == [((), {"closure": float}), ((float,), {})]
    assert not taken
    del calls[3:]
    for handle in handles:
        handle.remove()
    steps(optimizer, params, 1)
    assert len(calls) == 3
    assert len(taken) == (NODES is not None)


def test_profilers_are_told():
    params = parameters()
    optimizer = optim.SGD(params, lr=0.1)
    steps(optimizer, params, 1)
    with torch.profiler.profile() as profile:
        steps(optimizer, params, 1)
        optimizer.zero_grad()
    names = [event.key for event in profile.key_averages()]
    assert "Optimizer.step#SGD.step" in names
    assert "Optimizer.zero_grad#SGD.zero_grad" in names


@needs_nodes
def test_observers_are_told(tmp_path):
    """Also those that are no profiler."""
    params = parameters()
    optimizer = optim.Adam(params)
    steps(optimizer, params, 2)
    file = tmp_path / "trace.json"
    observer = torch.profiler.ExecutionTraceObserver().register_callback(str(file))
    observer.start()
    steps(optimizer, params, 1)
    optimizer.zero_grad()
    observer.stop()
    observer.unregister_callback()
    assert "Optimizer.step#Adam.step" in file.read_text()
    assert "Optimizer.zero_grad#Adam.zero_grad" in file.read_text()


def test_subclasses():
    calls = []

    class Own(optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    class Grouping(optim.Adam):
        def _init_group(self, *args):
            calls.append("group")
            return super()._init_group(*args)

    params = parameters()
    optimizer = Own(params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    steps(optimizer, params, 2)
    assert calls == ["before"] * 2
    del calls[:]
    steps(Grouping(params), params, 3)
    assert calls == ["group"] * 3
    assert issubclass(optim.AdamW, optim.Adam)


def test_numbers_that_torch_refuses():
    """What torch says of them is said, and nothing is stepped."""
    for name, options in (
        ("Adam", {"betas": (1.0, 0.999)}),
        ("Adam", {"betas": (0.9, 1.5)}),
        ("Adam", {"eps": None}),
        ("Adam", {"lr": 10**400}),
        ("SGD", {"lr": 1e39}),
        ("SGD", {"weight_decay": 1e39}),
        ("SGD", {"weight_decay": "much"}),
    ):
        said = []
        for home in (optim, torch.optim):
            params = parameters()
            optimizer = getattr(home, name)(params, lr=0.1)
            steps(optimizer, params, 2)
            before = [p.detach().clone() for p in params]
            optimizer.param_groups[0].update(options)
            with pytest.raises((RuntimeError, ArithmeticError, TypeError)) as error:
                steps(optimizer, params, 1)
            said.append(error.type)
            if home is optim:
                assert_same(params, before, rtol=0, atol=0)
        assert said[0] is said[1]


@needs_nodes
@pytest.mark.parametrize("alias", ["count", "average", "gradient", "groups"])
def test_memory_that_is_shared(alias, monkeypatch):
    taken = kernel_steps(monkeypatch)
    runs = []
    for home in (optim, torch.optim):
        params = parameters([(6, 4), (6, 4)])
        groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.1}]
        optimizer = home.AdamW(groups if alias == "groups" else params)
        steps(optimizer, params, 1)
        first, second = (optimizer.state[p] for p in params)
        if alias == "count":
            second["step"] = first["step"]
        if alias == "average":
            second["exp_avg"] = first["exp_avg"]
        if alias == "groups":
            optimizer.param_groups[1]["params"].append(params[0])
        take_gradients(params, 1)
        if alias == "gradient":
            params[0].grad = params[0].detach()
        optimizer.step()
        runs.append(params)
    assert_same(*runs, rtol=1e-6, atol=1e-6)
    assert not any(taken)


@needs_nodes
def test_a_state_of_another_kind():
    params = parameters()
    optimizer = optim.Adam(params)
    steps(optimizer, params, 1)
    optimizer.state = collections.UserDict(optimizer.state)
    steps(optimizer, params, 1)
    assert all(state["step"] == 2 for state in optimizer.state.values())


def test_zero_grad():
    params = parameters()
    optimizer = optim.Adam(params)
    take_gradients(params, 0)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_copies_and_pickles():
    params = parameters()
    optimizer = optim.AdamW(params)
    steps(optimizer, params)
    buffer = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    pickled = pickle.loads(pickle.dumps((params, optimizer)))
    copied = copy.deepcopy((params, optimizer))
    steps(optimizer, params)
    for others, other in (tuple(loaded.values()), pickled, copied):
        steps(other, others)
        assert_same(others, params, rtol=0, atol=0)


def test_gradient_scaler():
    runs = []
    for home in (optim, torch.optim):
        params = parameters()
        optimizer = home.Adam(params, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            optimizer.zero_grad()
            loss = sum((p * (float("inf") if step == 2 else 1.0)).sum() for p in params)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        runs.append((params, scaler.get_scale()))
    assert runs[0][1] == runs[1][1]
    assert_same(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-6)


def test_compiles():
    params, others = parameters([(8, 8), (8,)]), parameters([(8, 8), (8,)])
    own, native = optim.Adam(params), torch.optim.Adam(others)
    compiled = torch.compile(own.step)
    for seed in range(3):
        take_gradients(params, seed)
        take_gradients(others, seed)
        compiled()
        native.step()
    assert_same(params, others, rtol=1e-5, atol=1e-6)


def test_under_another_torch(monkeypatch):
    monkeypatch.setattr(optim, "NODES", None)
    params, others = parameters(), parameters()
    steps(optim.Adam(params), params)
    steps(torch.optim.Adam(others), others)
    assert_same(params, others, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_mlp_trainer_takes_them(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    twin = copy.deepcopy(model)
    images, targets = torch.rand(64, 12), torch.randint(3, (64,))
    for network, home in ((model, optim), (twin, torch.optim)):
        optimizer = getattr(home, name)(network.parameters(), lr=0.01)
        torch.manual_seed(1)  # the order of the images
        fastnet.MLPTrainer(network, optimizer).fit(images, targets, batch_size=16, epochs=2)
    assert_same(model.parameters(), twin.parameters(), rtol=0, atol=0)


def test_bad_options_are_torchs_errors():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optim.Adam(parameters(), lr=-1.0)
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.SGD([], lr=0.1)
