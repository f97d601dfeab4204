"""The Triton kernels: how they launch, and what the compiler makes of them for three GPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from bdu import native
from bdu.kernels import ewc_step

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "u8": 1, "i8": 1, None: 0}
COLUMNS = {
    "ewc_sgd_kernel": ("PARAM", "GRAD", "MOMENTUM_BUFFER", "FISHER", "ANCHOR", "FISHER_SCALE"),
    "ewc_adamw_kernel": (
        *("PARAM", "GRAD", "EXP_AVG", "EXP_AVG_SQ", "FISHER", "ANCHOR", "FISHER_SCALE"),
    ),
    "square_sum_kernel": ("GRAD",),
}
WRITTEN = {"ewc_sgd_kernel": (0, 2), "ewc_adamw_kernel": (0, 2, 3), "square_sum_kernel": ()}


def case(kernel: str, *dtypes: str | None, arch: int = 90, **changes: Any) -> dict[str, Any]:
    """One kernel to compile; a single dtype is that of all columns but the scale of F."""
    columns = len(COLUMNS[kernel]) - (kernel != "square_sum_kernel")
    if len(dtypes) == 1:
        dtypes *= columns
    dtypes += (None,) * (len(COLUMNS[kernel]) - len(dtypes))
    return {"kernel": kernel, "dtypes": dtypes, "arch": arch, **changes}


SGD_MIX = ("bf16", "bf16", "fp32", "fp32", "bf16")
ADAMW_MIX = ("bf16", "bf16", "fp32", "fp32", "fp32", "bf16")
ALIGNED = {
    "sgd-fp32": case("ewc_sgd_kernel", "fp32"),
    "sgd-bf16": case("ewc_sgd_kernel", "bf16"),
    "sgd-fp16-scaled": case("ewc_sgd_kernel", "fp16", on_device=True),
    "sgd-mixed": case("ewc_sgd_kernel", *SGD_MIX),
    "sgd-fp32-sm80": case("ewc_sgd_kernel", "fp32", arch=80, PULL=1),
    "sgd-fp32-sm100": case("ewc_sgd_kernel", "fp32", arch=100, NESTEROV=True),
    "adamw-fp32": case("ewc_adamw_kernel", "fp32"),
    "adamw-bf16": case("ewc_adamw_kernel", "bf16"),
    "adamw-mixed-scaled": case("ewc_adamw_kernel", *ADAMW_MIX, on_device=True),
    "adamw-bf16-sm80": case("ewc_adamw_kernel", "bf16", arch=80),
    "adamw-fp32-sm100": case("ewc_adamw_kernel", "fp32", arch=100, PULL=1),
    "norm-fp32": case("square_sum_kernel", "fp32"),
    "norm-bf16-sm80": case("square_sum_kernel", "bf16", arch=80),
    "norm-fp32-sm100": case("square_sum_kernel", "fp32", arch=100),
}
SMALL_SGD = ("bf16", "bf16", "bf16", "u8", "bf16", "bf16")
SMALL_ADAMW = ("bf16", "bf16", "bf16", "bf16", "i8", "bf16", "bf16")
IN_8_BITS = {
    "sgd-8-bits": case("ewc_sgd_kernel", *SMALL_SGD, rounding=True),
    "sgd-8-bits-sm80": case("ewc_sgd_kernel", *SMALL_SGD, arch=80),
    "adamw-8-bits-sm100": case("ewc_adamw_kernel", *SMALL_ADAMW, arch=100, rounding=True),
}
OTHERS = IN_8_BITS | {
    "sgd-not-aligned": case("ewc_sgd_kernel", "fp32", ALIGNED=False),
    "sgd-batch-fisher": case("ewc_sgd_kernel", "bf16", UPDATE_FISHER=True, on_device=True),
    "sgd-plain": case("ewc_sgd_kernel", "fp32", "fp32", None, None, None, PULL=0),
    "adamw-batch-fisher": case("ewc_adamw_kernel", "fp32", UPDATE_FISHER=True, PULL=1),
    "adamw-plain": case("ewc_adamw_kernel", "fp32", "bf16", "fp32", "fp32", None, None, PULL=0),
}
CASES = ALIGNED | OTHERS


def compile_case(settings: dict[str, Any]) -> dict[str, Any]:
    """PTX and ptxas' resource usage of one case; needs a process without the interpreter."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    settings = dict(settings)
    kernel = getattr(ewc_step, settings.pop("kernel"))
    target = GPUTarget("cuda", settings.pop("arch"), 32)
    on_device = "*fp32" if settings.pop("on_device", False) else "constexpr"
    rounding = "i64" if settings.pop("rounding", False) else "constexpr"
    types = {
        "table": "*i64",
        "rows": "i32",
        "partials": "*fp64" if kernel is ewc_step.square_sum_kernel else "*fp32",
        "first_partial": "i32",
        "steps": "*fp32",
        "s": ewc_step.PullScalars("fp32", "fp32", *[on_device] * 3, rounding, *["fp32"] * 5),
        "sgd": ewc_step.SgdScalars(*["fp32"] * 2),
        "adamw": ewc_step.AdamwScalars(*["fp32"] * 6),
    }
    dtype = {None: None, "fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    dtype |= {"u8": tl.uint8, "i8": tl.int8}
    columns = zip(COLUMNS[kernel.__name__], settings.pop("dtypes"), strict=True)
    constants: dict[Any, Any] = {name: dtype[kind] for name, kind in columns}
    switches = {"ALIGNED": True, "PULL": 2, "NESTEROV": False, "UPDATE_FISHER": False}
    switches |= {"BLOCK": ewc_step.BLOCK, **settings}
    constants |= {name: value for name, value in switches.items() if name in kernel.arg_names}
    if "s" in kernel.arg_names and on_device == "constexpr":
        place = kernel.arg_names.index("s")
        constants |= {(place, field): None for field in (2, 3, 4)}
    if "s" in kernel.arg_names and rounding == "constexpr":
        constants[kernel.arg_names.index("s"), 5] = None
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    options = {"num_warps": ewc_step.NUM_WARPS, "enable_fp_fusion": False}
    compiled = triton.compile(ASTSource(kernel, signature, constants), target, options)
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "case.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    numbers = re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)
    return {"ptx": compiled.asm["ptx"], **{name: int(value) for name, value in numbers}}


def compile_through_the_launcher() -> list[str]:
    """The kernels that steps of different settings compile, for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    launched: list[str] = []
    run = JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **others: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **others)

    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only
    triton.knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: launched.append(fn.name)
    for rows, lr, momentum in ((1, 0.1, 0.9), (2, 1.0, 0.5), (16, 0, 1.0), (33, 0.5, 0.9)):
        tensors = [torch.ones(7) for _ in range(rows)]
        lists = (tensors,) * 5
        ewc_step.ewc_sgd_step(*lists, lr=lr, momentum=momentum, ewc_lambda=lr, weight_decay=lr)
        steps = torch.ones(rows)
        betas = (momentum / 2, momentum / 3)
        ewc_step.ewc_adamw_step(*lists, tensors, steps, lr=lr, betas=betas, ewc_lambda=2 + lr)
        ewc_step.grad_norm(tensors)
    return launched


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case compiled, in one process that has not the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    result = subprocess.run(
        [sys.executable, __file__],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def count(ptx: str, pattern: str) -> int:
    return len(re.findall(pattern, ptx))


LOAD_128 = r"ld\.global\S*\.(?:v4\.[bu]32|v2\.[bu]64|b128)"
LOAD_64 = r"ld\.global\S*\.(?:v2\.[bu]32|b64) \{? ?%r[^d].*"
STORE_128 = r"st\.global\S*\.(?:v4\.[bu]32|v2\.[bu]64|b128)"


@pytest.mark.parametrize("name", ALIGNED)
def test_aligned_rows_are_moved_128_bits_at_a_time(
    name: str, compiled: dict[str, dict[str, Any]]
) -> None:
    elements = ewc_step.BLOCK // (32 * ewc_step.NUM_WARPS)
    words = [BYTES[dtype] * elements // 16 for dtype in CASES[name]["dtypes"]]
    ptx = compiled[name]["ptx"]
    assert count(ptx, LOAD_128) == sum(words)
    assert count(ptx, STORE_128) == sum(words[i] for i in WRITTEN[CASES[name]["kernel"]])


@pytest.mark.parametrize("name", IN_8_BITS)
def test_a_fisher_in_8_bits_is_read_8_entries_at_a_time(
    name: str, compiled: dict[str, dict[str, Any]]
) -> None:
    ptx, case = compiled[name]["ptx"], CASES[name]
    halves = [dtype == "bf16" for dtype in case["dtypes"][:-1]]
    assert count(ptx, LOAD_128) == sum(halves)
    assert count(ptx, STORE_128) == len(WRITTEN[case["kernel"]])
    assert count(ptx, LOAD_64) == 1


@pytest.mark.parametrize("name", CASES)
def test_no_register_is_spilled(name: str, compiled: dict[str, dict[str, Any]]) -> None:
    usage = compiled[name]
    assert usage["STACK"] == 0
    assert usage["LOCAL"] == 0
    assert usage["REG"] <= 128, "two blocks of 256 threads fit on a multiprocessor"


def test_rows_that_are_not_aligned_are_moved_element_by_element(
    compiled: dict[str, dict[str, Any]],
) -> None:
    ptx = compiled["sgd-not-aligned"]["ptx"]
    assert count(ptx, LOAD_128) == count(ptx, STORE_128) == 0


def test_products_are_fused_into_sums_only_where_the_update_rule_says_so(
    compiled: dict[str, dict[str, Any]],
) -> None:
    ptx = compiled["sgd-fp32"]["ptx"]
    elements = 2 * ewc_step.BLOCK // (32 * ewc_step.NUM_WARPS)  # with a mask and without
    # weight decay, momentum, the step and the pull
    assert count(ptx, r"fma\.rn\.f32") == 4 * elements
    assert count(ptx, r"fma\.rn\.ftz") == 0


# The CUDA kernels, as they were compiled into the package

NEEDS_CUDA_KERNELS = pytest.mark.skipif(
    not native.is_built() or native.library().cuda_build() is None,
    reason="installed where there was no CUDA compiler",
)
# Stored (0 float32, 1 bfloat16, 2 float16, 3 mixed) and pull (2 proximal), as mangled.
SASS = {
    "sgd-fp32": "ewc_sgd_kernelILNS_6StoredE0ELNS_4PullE2ELb1EEE",
    "sgd-bf16": "ewc_sgd_kernelILNS_6StoredE1ELNS_4PullE2ELb1EEE",
    "adamw-mixed": "ewc_adamw_kernelILNS_6StoredE3ELNS_4PullE2EEE",
}


def cuobjdump(*arguments: str) -> str:
    triton = pytest.importorskip("triton")
    path = triton.knobs.nvidia.cuobjdump.path
    command = [path, *arguments, native.library().__file__]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@NEEDS_CUDA_KERNELS
def test_no_register_of_a_cuda_kernel_is_spilled_on_any_gpu() -> None:
    usage = cuobjdump("--dump-resource-usage")
    for name in ("ewc_sgd_kernel", "ewc_adamw_kernel", "grad_norm_kernel"):
        assert usage.count(name) >= 3
    numbers = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(numbers) >= 3 * 40
    assert {(int(stack), int(local)) for _, stack, local in numbers} == {(0, 0)}
    # 65,536 of them are shared by blocks of 256 threads: one block at least, and two but for a mix.
    assert max(int(registers) for registers, _, _ in numbers) <= 168


@NEEDS_CUDA_KERNELS
@pytest.mark.parametrize("name", SASS)
def test_cuda_kernels_move_128_bits_at_a_time_through_global_memory(name: str) -> None:
    usage = cuobjdump("--dump-resource-usage")
    (function,) = {word.rstrip(":") for word in usage.split() if SASS[name] in word}
    sass = cuobjdump("-sass", "-arch", "sm_90", "-fun", function)
    loads, stores = count(sass, r"LDG\.E\.128"), count(sass, r"STG\.E\.128")
    columns = {"sgd-fp32": (5, 2), "sgd-bf16": (5, 2), "adamw-mixed": (12, 6)}
    assert (loads, stores) >= columns[name]
    assert count(sass, r"\b(?:LD|ST)\.E") == 0, "a load that may be of any kind of memory"


# How they launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_another_setting_or_number_of_tensors_compiles_nothing_anew(
    compiled: dict[str, Any],
) -> None:
    names = [name.rpartition(".")[2] for name in compiled["launcher"]]
    # The third step has lr and λ 0: without a pull it is another kernel.
    kernels = ["ewc_sgd_kernel", "ewc_adamw_kernel", "square_sum_kernel", "ewc_sgd_kernel"]
    assert names == kernels


Column = tuple[tuple[int, ...], tuple[torch.dtype | None, ...]]


def column(*dtypes: torch.dtype, first_address: int = 1 << 20) -> Column:
    return tuple(first_address + 4096 * i for i in range(len(dtypes))), dtypes


def groups(*columns: Column, numels: tuple[int, ...]) -> tuple[Any, ...]:
    first = tuple(accumulate(numels, initial=0))[:-1]
    return ewc_step._groups(columns, numels, first, torch.device("cpu"), 0)


FP32, BF16 = torch.float32, torch.bfloat16


def test_tensors_of_equal_dtypes_share_one_launch() -> None:
    numels = tuple(range(1, 21))
    (group,) = groups(column(*[FP32] * 20), column(*[BF16] * 20), numels=numels)
    assert group.aligned
    assert group.chunks == 20
    assert len(groups(column(*[FP32] * 20), column(*[FP32, BF16] * 10), numels=numels)) == 2


def test_a_table_holds_the_chunks_the_sizes_and_the_addresses() -> None:
    block = ewc_step.BLOCK
    params = column(FP32, FP32, FP32, FP32)
    absent = (0,) * 4, (None,) * 4
    (group,) = groups(params, absent, numels=(block, 0, block + 1, 1))
    assert group.dtypes[1] is None
    assert group.chunks == 4
    assert group.table.tolist() == [
        [0, 1, 3],
        [block, block + 1, 1],
        [0, 2, 3],
        [0, block, 2 * block + 1],
        [params[0][i] for i in (0, 2, 3)],
        [0, 0, 0],
    ]


def test_a_size_beyond_32_bits_is_kept() -> None:
    numel = 5 * 2**31 + 1
    (group,) = groups(column(BF16), numels=(numel,))
    assert group.chunks == numel // ewc_step.BLOCK + 1
    assert group.table[1].item() == numel


def test_rows_that_are_not_aligned_have_their_own_launch() -> None:
    addresses = 1 << 20, (1 << 21) + 4
    launches = groups((addresses, (FP32, FP32)), numels=(100, 100))
    assert [launch.aligned for launch in launches] == [True, False]


def test_a_table_is_made_again_only_when_something_has_moved() -> None:
    params = [torch.ones(3, device=DEVICE), torch.ones(5, device=DEVICE)]
    grads = [torch.ones(3, device=DEVICE), torch.ones(5, device=DEVICE)]
    none: list[Any] = [None, None]
    for _ in range(3):
        ewc_step._groups.cache_clear()
        for _ in range(3):
            ewc_step.ewc_sgd_step(params, grads, none, none, none, lr=0.1)
        assert ewc_step._groups.cache_info().misses == 1
    moved = torch.ones(3, device=DEVICE)
    ewc_step.ewc_sgd_step(params, [moved, grads[1]], none, none, none, lr=0.1)
    assert ewc_step._groups.cache_info().misses == 2


def test_factors_on_the_device_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.ones(3, device=DEVICE)]
    grads = [torch.full((3,), 8.0, device=DEVICE)]
    steps, clip, scale = torch.tensor([[1.0], [0.5], [4.0]], device=DEVICE)
    moments = [[torch.zeros(3, device=DEVICE)] for _ in range(2)]
    launched: list[Any] = []

    def refuse(*_: Any) -> None:
        raise AssertionError("waited for the device")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        fisher = [torch.zeros(3, device=DEVICE)]
        for arguments in ((params, grads, [None]), (params, grads, *moments)):
            launch = ewc_step.ewc_sgd_step if len(arguments) == 3 else ewc_step.ewc_adamw_step
            extra = () if len(arguments) == 3 else (steps,)
            lists = (*arguments, fisher, params)
            launched.append(
                launch(*lists, *extra, lr=1.0, ewc_lambda=1.0, clip=clip, grad_scale=scale[0])
            )
    assert moments[0][0].tolist() == pytest.approx([0.1] * 3)
    assert [penalty.item() for penalty in launched] == [0, 0]


def test_steps_that_do_not_fit_are_named() -> None:
    one = [torch.ones(3)]
    with pytest.raises(ValueError, match=r"steps: expected \(1,\) contiguous float32, got \(2,\)"):
        ewc_step.ewc_adamw_step(one, one, one, one, one, one, torch.ones(2), lr=0.1)


if __name__ == "__main__":
    results: dict[str, Any] = {name: compile_case(settings) for name, settings in CASES.items()}
    print(json.dumps(results | {"launcher": compile_through_the_launcher()}))
