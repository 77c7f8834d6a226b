from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("fastnet", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("fastnet")


def pytest_report_header() -> str:
    import fastnet

    return f"fastnet: {fastnet.build_info()}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return request.param
