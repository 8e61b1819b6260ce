"""Test the solver and recipes on a CUDA GPU: equal results, within the memory budget. Skipped without a GPU."""

import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import byte_level_tokenizer, make_model, save, sentencepiece_tokenizer
from helpers.commands import merge_here, recipe
from helpers.solver_cases import random_rows
from safetensors.torch import load_file

from benchmarks.memory import peak, start_of_peak
from mergekit_omp.solver import solve_omp
from mergekit_omp.solver.reference import reference_omp
from mergekit_omp.solver.scan import fixed_shape, gpu_operations
from mergekit_omp.solver.scan.screening import Screen

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("common", [0.0, 2.0], ids=["isotropic", "common-direction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_supports_are_those_of_a_float64_reference(common: float, dtype: torch.dtype) -> None:
    atoms, targets = random_rows(3000, 96, 0, common).to(dtype), random_rows(40, 96, 1, common).to(dtype)
    expected = reference_omp(targets, atoms, 24)
    assert torch.equal(solve_omp(targets.to(GPU), atoms.to(GPU), 24).indices, expected.indices)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("normalize", [False, True])
def test_same_codes_as_on_the_cpu(size: float, normalize: bool) -> None:
    """Compare also rows whose norms exceed the range of float16, and rows with one dominant coordinate."""
    atoms, targets = size * random_rows(5000, 256, 2, 1.0), random_rows(3000, 256, 3, 1.0) / size
    atoms[:, 7] *= 30
    targets[5] = 0
    expected = solve_omp(targets, atoms, 20, normalize_atoms=normalize)
    codes = solve_omp(targets, atoms, 20, normalize_atoms=normalize, devices=[GPU])
    assert torch.equal(codes.indices, expected.indices)
    torch.testing.assert_close(codes.coefficients, expected.coefficients, rtol=1e-4, atol=0)
    torch.testing.assert_close(codes.relative_residuals, expected.relative_residuals)


def test_same_codes_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the code for machines without Triton."""
    assert gpu_operations.find_kernel(GPU) is not None
    atoms, targets = random_rows(5000, 256, 12, 1.0), random_rows(300, 256, 13, 1.0)
    atoms[7] = atoms[3] + 1e-4 * atoms[9]
    targets[0] = atoms[3] + 0.5 * atoms[7]
    expected = solve_omp(targets, atoms, 20, devices=[GPU])
    monkeypatch.setattr(gpu_operations, "find_kernel", lambda device: None)
    assert torch.equal(solve_omp(targets, atoms, 20, devices=[GPU]).indices, expected.indices)


def test_a_step_does_not_wait_for_the_host() -> None:
    atoms, targets = random_rows(5000, 256, 14, 1.0).to(GPU), random_rows(300, 256, 15, 1.0).to(GPU)
    pursuit = fixed_shape.FixedPursuit(targets, Screen(atoms, atoms.norm(dim=1), torch.float16), 8)
    pursuit.step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(7):
            pursuit.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(pursuit.support.cpu(), reference_omp(targets, atoms, 8).indices)


@pytest.mark.parametrize("places", [1, 16])
def test_a_captured_step_is_replayed(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with steps that are launched one by one, with crowded targets and without."""
    monkeypatch.setattr(fixed_shape, "PLACES", places)
    monkeypatch.setattr(fixed_shape, "_NOT_CAPTURED", set())
    atoms, targets = random_rows(5000, 256, 16, 1.0), random_rows(300, 256, 17, 1.0)
    atoms[7] = atoms[3] + 1e-6 * atoms[9]
    targets[:2] = atoms[[3, 9]]
    captured = solve_omp(targets, atoms, 20, devices=[GPU])
    assert not fixed_shape._NOT_CAPTURED
    monkeypatch.setattr(fixed_shape, "capture", lambda step, device: step)
    launched = solve_omp(targets, atoms, 20, devices=[GPU])
    assert torch.equal(captured.indices, launched.indices)
    assert torch.equal(captured.indices, reference_omp(targets, atoms, 20).indices)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_all_gpus_share_the_targets() -> None:
    """Check what ``--multi-gpu`` calls: a thread for each GPU captures and replays its own graph."""
    atoms, targets = random_rows(5000, 256, 18, 1.0), random_rows(3000, 256, 19, 1.0)
    expected = solve_omp(targets, atoms, 16, devices=[GPU])
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for _ in range(3):
        codes = solve_omp(targets.to(GPU), atoms.to(GPU), 16, devices=devices)
        assert torch.equal(codes.indices, expected.indices)


def test_low_precision_settings_do_not_affect_the_solver() -> None:
    atoms, targets = random_rows(20_000, 2048, 4, 1.0), random_rows(200, 2048, 5, 1.0)
    expected = solve_omp(targets, atoms, 16, devices=[GPU])
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        codes = solve_omp(targets, atoms, 16, devices=[GPU])
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_fp16_accumulation
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert torch.equal(codes.indices, expected.indices)


def test_a_gpu_and_a_cpu_share_the_targets() -> None:
    atoms, targets = random_rows(2000, 64, 6, 1.0), random_rows(61, 64, 7, 1.0)
    expected = solve_omp(targets, atoms, 16)
    for devices in ([GPU, CPU], [GPU, GPU]):
        assert torch.equal(solve_omp(targets, atoms, 16, devices=devices).indices, expected.indices)


@pytest.mark.parametrize(("atoms", "dim", "k"), [(50_000, 576, 64), (20_000, 4096, 64), (20_000, 1024, 256)])
@pytest.mark.parametrize("rows", ["random", "orthogonal"])
@pytest.mark.parametrize("budget", [2**31, 2**33])
def test_memory_stays_within_the_budget(atoms: int, dim: int, k: int, rows: str, budget: int) -> None:
    """Use targets orthogonal to all atoms, the worst case: every atom may be the best one."""
    draw = torch.Generator(GPU).manual_seed(0)
    atoms, targets = torch.randn(atoms + 1500, dim, generator=draw, device=GPU).split([atoms, 1500])
    if rows == "orthogonal":
        atoms[:, dim // 2 :], targets[:, : dim // 2] = 0, 1e-6
    solve_omp(targets[:8], atoms[:500], 4)
    before = start_of_peak(on_gpu=True)
    solve_omp(targets, atoms, k, memory_budget=budget)
    assert 0 < peak(on_gpu=True) - before <= 1.1 * budget


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit this process to two GiB, as on a GPU that others use too."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**31 / torch.cuda.get_device_properties(GPU).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_halves_the_chunk(little_memory: None, caplog: pytest.LogCaptureFixture) -> None:
    """Set a budget that the GPU does not have."""
    atoms, targets = random_rows(20_000, 512, 10, 1.0), random_rows(5000, 512, 11, 1.0)
    codes = solve_omp(targets, atoms, 256, devices=[GPU], memory_budget=2**36)
    assert "Out of memory" in caplog.text
    some = slice(0, 5000, 500)
    assert torch.equal(codes.indices[some], solve_omp(targets[some], atoms, 256).indices)


@pytest.mark.parametrize("options", [["--cuda"], ["--device", "cuda"], ["--cuda", "--read-to-gpu"], ["--multi-gpu"]])
def test_a_recipe_writes_the_same_model_as_on_the_cpu(
    options: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine, donors = byte_level_tokenizer(), sentencepiece_tokenizer()
    base = save(tmp_path / "base", make_model(mine), mine)
    donor = save(tmp_path / "donor", make_model(donors, hidden=48, seed=1), donors)
    written = []
    with caplog.at_level(logging.INFO):
        for name, more in [("cpu", []), ("gpu", options)]:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = merge_here(recipe(base, donor), tmp_path / name, *more)
            assert result.exit_code == 0, result.output
            assert (torch.cuda.max_memory_allocated() > before) == (name == "gpu")
            written.append(load_file(tmp_path / name / "model.safetensors"))
    assert written[0].keys() == written[1].keys()
    for tensor, rows in written[0].items():
        torch.testing.assert_close(written[1][tensor], rows, rtol=1e-4, atol=1e-6)
