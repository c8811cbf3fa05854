"""Launches after the first: what reaches the compiled kernel, and when Triton is asked again."""

from types import SimpleNamespace
from weakref import ref

import pytest
import torch

pytest.importorskip("triton")

from optim.kernels import launcher
from optim.kernels.launcher import Kernel, Launcher
from optim.kernels.table import TensorTable, same_objects

CUDA = torch.device("cuda", 0)  # nothing is launched


class FakeKernel:
    """Compiles on every call through Triton, and notes what its results are run with."""

    def __init__(self):
        self.compilations, self.runs = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **options):
            self.compilations.append((grid, arguments, options))
            done = SimpleNamespace(function="f", packed_metadata="m")
            done.run = lambda *values: self.runs.append(values)
            return done

        return compile_and_launch


@pytest.fixture
def fake(monkeypatch):
    stream = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 7))
    monkeypatch.setattr(launcher, "driver", stream)
    monkeypatch.setattr(launcher, "_several", lambda: False)
    return FakeKernel()


def test_launcher_compiles_once_per_dtypes(fake):
    x, y, fixed = torch.zeros(4), torch.ones(4), torch.zeros(2, dtype=torch.int32)
    launch = Launcher(fake, (5,), CUDA, {"table": fixed, "n": 3, "BLOCK": 64}, num_warps=4)
    launch(x)
    assert len(fake.compilations) == 1 and not fake.runs
    launch(y)
    tail = (fixed.data_ptr(), 3, 64)
    assert fake.runs == [(5, 1, 1, 7, "f", "m", None, None, None, y.data_ptr(), *tail)]
    launch(x.half())
    assert len(fake.compilations) == 2 and len(fake.runs) == 1


def test_kernel_compiles_for_what_triton_specializes_on(fake):
    kernel = Kernel(fake)
    x = torch.zeros(64)

    def call(tensor=x, number=32, scale=0.5, block=64, grid=(2, 3)):
        before = len(fake.compilations)
        kernel(grid, CUDA, (tensor, number, scale), {"BLOCK": block}, num_warps=4)
        return len(fake.compilations) > before

    assert call()
    assert not call(grid=(9, 1), scale=0.25)
    assert fake.runs[-1] == (9, 1, 1, 7, "f", "m", None, None, None, x.data_ptr(), 32, 0.25, 64)
    assert not call(number=48) and not call(tensor=torch.zeros(64))
    for changed in (
        {"number": 33},
        {"number": 1},
        {"number": 1 << 31},
        {"tensor": x[1:]},
        {"tensor": x.half()},
        {"block": 128},
    ):
        assert call(**changed), changed
        assert not call(**changed), changed


def test_a_caller_may_know_what_is_specialized_on(fake):
    kernel, x = Kernel(fake), torch.zeros(64)
    for number in (32, 33, 1):
        kernel((2,), CUDA, (x, number), {"BLOCK": 64}, (x.dtype,), num_warps=4)
    assert len(fake.compilations) == 1
    assert fake.runs[-1] == (2, 1, 1, 7, "f", "m", None, None, None, x.data_ptr(), 1, 64)
    kernel((2,), CUDA, (x.half(), 32), {"BLOCK": 64}, (torch.float16,), num_warps=4)
    assert len(fake.compilations) == 2


def test_a_profiler_sees_every_launch(fake, monkeypatch):
    kernel, x = Kernel(fake), torch.zeros(4)
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[print]), launch_exit_hook=None)
    monkeypatch.setattr(launcher, "knobs", SimpleNamespace(runtime=hooks))
    for _ in range(3):
        kernel((1,), CUDA, (x,), {}, num_warps=4)
    assert len(fake.compilations) == 3 and not fake.runs
    hooks.launch_enter_hook = None
    kernel((1,), CUDA, (x,), {}, num_warps=4)
    assert len(fake.compilations) == 3 and len(fake.runs) == 1


class Final:
    """Triton's launch in C, in its place."""

    def __init__(self):
        self.seen = []

    def __call__(self, *arguments):
        self.seen.append(arguments)


@pytest.mark.parametrize("described", [False, True])
def test_the_launcher_of_the_installed_triton_is_known(monkeypatch, described):
    """With its own code but for the driver, of which there is none here."""
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    from triton.tools.tensor_descriptor import TensorDescriptor

    encode = lambda address, *rest: ("map", address)  # noqa: E731
    names = ("fill_tma_descriptor", "fill_tma_descriptor_tiled")  # 3.6, 3.9
    active = SimpleNamespace(utils=SimpleNamespace(**dict.fromkeys(names, encode)))
    runtime = SimpleNamespace(driver=SimpleNamespace(active=active))
    monkeypatch.setattr(nvidia, "triton", SimpleNamespace(runtime=runtime))
    final = Final()
    signature = {0: "tensordesc<fp16[64,64]>" if described else "*fp16", 1: "i32"}
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [64, 64]}
    launch = nvidia.wrap_handle_tensordesc(
        final, signature, [{**meta, "fp4_padded": False}] if described else None
    )
    run = object.__new__(nvidia.CudaLauncher)
    sizes = {"global_scratch_size": 0, "profile_scratch_size": 0, "num_ctas": 1}
    sizes |= {"global_scratch_align": 1, "profile_scratch_align": 1}
    flags = dict.fromkeys(("launch_cooperative_grid", "launch_pdl", "gsan_enabled"), False)
    rest = {"arg_annotations": "a", "kernel_signature": b"s", "launch": launch}
    for name, value in {**sizes, **flags, **rest}.items():
        setattr(run, name, value)
    x = torch.zeros(128, 64, dtype=torch.float16)
    values = [TensorDescriptor.from_tensor(x, [64, 64]) if described else x.data_ptr(), 5]
    done = SimpleNamespace(run=run, function=3, packed_metadata="m")
    again = launcher._flattened(done, (3, 2, 1), values)
    assert again is not None and not final.seen
    run(3, 2, 1, 77, 3, "m", None, None, None, *values)
    again(77)
    assert final.seen[0] == final.seen[1] and str(x.data_ptr()) in str(final.seen[0])
    kept = ref(x)
    del x, values
    assert kept() is None  # no memory is held by what repeats a launch


def test_a_launch_of_unknown_build_is_not_repeated(fake):
    kernel = Kernel(fake)  # whose `run` has no `launch`
    assert kernel.again((2,), CUDA, (torch.zeros(4), 5), {}, num_warps=4) is None
    assert len(fake.compilations) == 1


def test_programs_of_an_iteration_are_found_by_address(monkeypatch):
    from optim.kernels import ns_launch, ns_products
    from optim.kernels.ns_table import hopper_path

    launched, repeated, hooked = [], [], []

    class Notes:
        def __call__(self, *arguments, **options):
            launched.append(arguments)

        def again(self, *arguments, **options):
            launched.append(arguments)
            number = len(launched)
            return lambda stream: repeated.append((stream, number))

    for name in ("_symmetric_tma", "_update_tma"):
        monkeypatch.setattr(ns_products, name, Notes())
    monkeypatch.setattr(ns_launch, "_programs", {})
    monkeypatch.setattr(ns_launch, "KEPT", 3)
    monkeypatch.setattr(ns_launch, "is_current", lambda device: not hooked)
    monkeypatch.setattr(
        ns_launch, "repeat_all", lambda program, device: [launch(7) for launch in program]
    )
    coefficients = ((1.0, 2.0, 3.0),) * 5
    for columns in (128, 640):  # both forms
        path = hopper_path(2, 128, columns)
        x, out, other = torch.zeros(3, 2, 128, columns, dtype=path.dtype)
        need = ns_launch.working_memory(path, x.shape, 5)
        work, spare = torch.empty(2, need, dtype=path.dtype)
        launched.clear(), repeated.clear()
        ns_launch.iterate(x, out, coefficients, path, work)
        first = len(launched)
        assert first >= 15 and not repeated
        ns_launch.iterate(x, out, list(coefficients), path, work)
        assert len(launched) == first and repeated == [(7, k + 1) for k in range(first)]
        for target, memory, steps in ((other, work, 5), (out, spare, 5), (out, work, 4)):
            before = len(launched)
            ns_launch.iterate(x, target, coefficients[:steps], path, memory)
            assert len(launched) > before
        hooked.append(True)
        before = len(launched)
        ns_launch.iterate(x, out, coefficients, path, work)
        assert len(launched) == before + first
        hooked.clear()
    assert len(ns_launch._programs) == 3


def test_tables_of_addresses_come_back():
    table = TensorTable([3, 5], 4, torch.device("cpu"))
    first = table.addresses((1, 2))
    assert table.addresses((1, 2)) is first
    second = table.addresses((3, 4))
    assert table.addresses((1, 2)) is first and table.addresses((3, 4)) is second
    for k in range(20):
        table.addresses((k, k))
    again = table.addresses((1, 2))
    assert again is not first and torch.equal(again, first)


def test_same_objects_are_objects_not_values():
    x, y = torch.zeros(2), torch.zeros(2)
    seen = [ref(x), ref(y)]
    assert same_objects([x, y], seen)
    assert not same_objects([y, x], seen)
    assert not same_objects([x], seen)
    assert not same_objects([x, None], seen)
    del y
    assert not same_objects([x, torch.zeros(2)], seen)
