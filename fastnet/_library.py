"""Loads the compiled libraries, which registers every op as `torch.ops.fastnet.*`; tells what this
build is and runs on, and how autograd stands at the moment."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch.autograd import forward_ad

try:
    from fastnet import _C
except ImportError as error:
    raise ImportError(
        f"fastnet's compiled kernels could not be loaded ({error}). They are built by "
        "`pip install .` in the source folder; an editable checkout builds them with `make build`."
    ) from error

# csrc/cpu/isa.cpp compares FASTNET_CPU_ISA with these alone, and takes anything else for "all that
# there is".
ISAS = ("baseline", "avx2", "avx512")
if os.environ.get("FASTNET_CPU_ISA", "") not in ("", *ISAS):
    raise ImportError(
        f"FASTNET_CPU_ISA must be one of {', '.join(ISAS)}, not "
        f"{os.environ['FASTNET_CPU_ISA']!r}: the widest vectors that fastnet may use."
    )


def _load_cuda() -> str:
    """Registers the CUDA kernels. Returns "loaded", or the reason why they are not."""
    # The one of this Python and this build: others may lie in a checkout that several have built.
    own = Path(_C.__file__)
    library = own.with_name(own.name.replace("_C.", "_C_cuda.", 1))
    if _C.build_info()["cuda_version"] is None or not library.exists():
        return "not built: no nvcc was found, or FASTNET_CUDA=0 set, when fastnet was installed"
    if torch.version.cuda is None:
        return "not loaded: this torch is a CPU build"
    # The kernels resolve torch's CUDA symbols, and the runtime's, from what is loaded already.
    torch_cuda = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    try:
        if torch_cuda.exists():
            ctypes.CDLL(str(torch_cuda), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))
    except OSError as error:
        reason = f"not loaded: {error.__cause__ or error}"
        warnings.warn(
            f"fastnet runs without its CUDA kernels; they were {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return reason
    return "loaded"


def _load_nodes() -> ModuleType | None:
    """The ops' nodes in autograd's graph, in C++. They are of use to the torch alone that they were
    compiled with; under another one there are those in Python (None)."""
    if _C.build_info()["torch_built_with"] != torch.__version__:
        return None
    try:
        from fastnet import _nodes
    except ImportError as error:
        warnings.warn(
            "fastnet's nodes in autograd's graph are those in Python, which are slower; the others "
            f"could not be loaded: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _nodes


CUDA_STATUS = _load_cuda()
NODES = _load_nodes()


@functools.cache
def is_built_for(device_index: int) -> bool:
    """Whether the CUDA kernels have code for this card: its own generation's, or PTX to compile.
    From then on the nodes in C++ take its tensors, too."""
    card = torch.cuda.get_device_capability(device_index)
    listed = build_info()["cuda_architectures"] or ""
    for major, minor, alone, ptx in re.findall(r"(\d+)\.(\d+)(a?)(\+PTX)?", listed):
        of = (int(major), int(minor))
        if alone:  # with what only this one has
            is_for_card = of == card
        elif ptx:
            is_for_card = of <= card
        else:
            is_for_card = of[0] == card[0] and of[1] <= card[1]
        if is_for_card:
            if NODES is not None:
                NODES.take_cuda(device_index)
            return True
    return False


def is_differentiated() -> bool:
    """In a backward pass: whether somebody wants to differentiate the gradient, which may have a
    tangent, or to map over it."""
    return (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_recorded() -> bool:
    """Whether autograd records what is done: in inference mode it does not, whatever else is
    enabled. (Of that mode torch.compile must not be asked.)"""
    if not torch.is_grad_enabled():
        return False
    return torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether it stands for several, as with `is_grads_batched=True`: it has no value then."""
    is_compiling = torch.compiler.is_compiling()
    return not is_compiling and torch._C._functorch.is_legacy_batchedtensor(tensor)


def build_info() -> dict[str, str | None]:
    """What this build of fastnet is, and what of it runs here.

    Returns:
        A dict with `version`, `torch_built_with`, `torch_minimum`, `torch` (the one in use),
        `compiler`, `cpu_isa` (the instruction set the CPU kernels run on), `cpu_products` (whose
        products of large float32 matrices linear layers take: "torch", its operator's, or
        "oneDNN", where the processor has wider vectors than that operator uses), `cuda_version`
        and `cuda_architectures` (what the CUDA kernels were compiled with and for; None without
        them), `cuda_status` ("loaded", or why not), and `autograd` (the language of the nodes:
        "C++" under the torch that this was built with, else "Python").
    """
    return {
        **_C.build_info(),
        "torch": torch.__version__,
        "cuda_status": CUDA_STATUS,
        "autograd": "Python" if NODES is None else "C++",
    }
