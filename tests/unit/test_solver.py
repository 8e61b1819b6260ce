"""Test the solver against slow references, and in edge cases."""

import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.solver_cases import embedding, random_rows, supports
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from mergekit_omp.errors import OmpError
from mergekit_omp.solver import dispatch, memory, solve_omp
from mergekit_omp.solver.dispatch import plan_solve
from mergekit_omp.solver.gram import matrix as gram_matrix
from mergekit_omp.solver.gram import search as gram_search
from mergekit_omp.solver.gram import state as gram_state
from mergekit_omp.solver.gram.integers import multiply, pack
from mergekit_omp.solver.gram.layout import STEPS, STRIP, UNIT, padded
from mergekit_omp.solver.gram.matrix import Gram, build_gram
from mergekit_omp.solver.gram.verify import add_rows, verify
from mergekit_omp.solver.gram.workspace import workspace
from mergekit_omp.solver.least_squares import least_squares
from mergekit_omp.solver.memory import (
    KEPT_BLOCK,
    SLOTS,
    ProblemShape,
    gram_matrix_bytes,
    scan_chunk,
    scan_matrix_bytes,
)
from mergekit_omp.solver.precision import full_precision, has_backends
from mergekit_omp.solver.rates import Rates, measure_rates
from mergekit_omp.solver.reference import reference_omp
from mergekit_omp.solver.scan import fixed_shape, gpu_operations
from mergekit_omp.solver.scan import search as scan_search
from mergekit_omp.solver.scan.screening import Screen

CPU = torch.device("cpu")

SCREENS = ["float16", "float32"]
WHOLE, HALF, REPLAY = "whole gram", "half gram", "replay"


@pytest.fixture(params=[*SCREENS, WHOLE, HALF, REPLAY])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Force each method, independently of this machine."""
    force(monkeypatch, request.param)
    return request.param


def force(monkeypatch: pytest.MonkeyPatch, way: str | None = None, chunk: int | None = None) -> None:
    """Solve with a Gram matrix, a scan or, as on a GPU, steps of fixed shapes; with a number of targets per chunk."""
    if way in (WHOLE, HALF):
        monkeypatch.setattr(dispatch, "gram_pays", lambda *_: True)
        monkeypatch.setattr(memory, "gram_slots", lambda *_, half: (chunk or 16) if half == (way == HALF) else 0)
    elif way == REPLAY:
        monkeypatch.setattr(dispatch, "scan_dtype", lambda _: torch.float16)
        monkeypatch.setattr(scan_search, "has_fixed_shapes", lambda _: True)
    elif way is not None:
        monkeypatch.setattr(dispatch, "scan_dtype", lambda _: getattr(torch, way))
    if chunk is not None:
        monkeypatch.setattr(memory, "scan_chunk", lambda *_: chunk)


@pytest.mark.parametrize("common", [0.0, 2.0], ids=["isotropic", "common-direction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_supports_are_those_of_a_float64_reference(way: str, common: float, dtype: torch.dtype) -> None:
    atoms, targets = random_rows(3000, 96, 0, common).to(dtype), random_rows(40, 96, 1, common).to(dtype)
    codes, expected = solve_omp(targets, atoms, 24), reference_omp(targets, atoms, 24)
    assert torch.equal(codes.indices, expected.indices)
    torch.testing.assert_close(codes.coefficients, expected.coefficients, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(codes.relative_residuals, expected.relative_residuals)


def test_same_as_scikit_learn(way: str) -> None:
    """Compare with scikit-learn on unit atoms: the same selection and the same least-squares solution."""
    atoms = torch.nn.functional.normalize(random_rows(400, 48, 2))
    targets = random_rows(30, 48, 3)
    codes = solve_omp(targets, atoms, 12)
    expected = orthogonal_mp(atoms.double().numpy().T, targets.double().numpy().T, n_nonzero_coefs=12).T
    found = torch.zeros(30, 400).scatter_(1, codes.indices, codes.coefficients)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("model", ["smollm2_dir", "gemma3_dir"])
def test_real_rows(model: str, way: str, request: pytest.FixtureRequest) -> None:
    """Check that supports are those of float64 for real embeddings, which share directions and have near-copies."""
    rows = embedding(request.getfixturevalue(model))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    atoms, targets = rows[order[:6000]].float(), rows[order[6000:6008]].float()
    assert torch.equal(solve_omp(targets, atoms, 32).indices, reference_omp(targets, atoms, 32).indices)


def test_normalized_atoms_are_selected_by_angle() -> None:
    atoms = torch.tensor([[10.0, 10.0], [0.1, 0.0]])
    target = torch.tensor([[1.0, 0.1]])
    assert solve_omp(target, atoms, 1).indices.item() == 0
    by_angle = solve_omp(target, atoms, 1, normalize_atoms=True)
    assert by_angle.indices.item() == 1
    torch.testing.assert_close(by_angle.coefficients, torch.tensor([[10.0]]))


def test_exact_copies_and_multiples_stop_after_one_step(way: str) -> None:
    atoms = random_rows(500, 64, 4)
    targets = torch.stack([atoms[7], -3 * atoms[11], atoms[7] + atoms[11]])
    codes = solve_omp(targets, atoms, 8, normalize_atoms=True)
    assert [set(support) for support in supports(codes)][:2] == [{7}, {11}]
    torch.testing.assert_close(codes.coefficients[:2, 0], torch.tensor([1.0, -3.0]))
    assert (codes.indices[:2, 1:] == -1).all()
    assert (codes.coefficients[:2, 1:] == 0).all()
    assert (codes.relative_residuals < 1e-6).sum() >= 2


def test_zero_rows(way: str) -> None:
    atoms, targets = random_rows(300, 32, 5), random_rows(4, 32, 6)
    atoms[17] = 0
    targets[2] = 0
    codes = solve_omp(targets, atoms, 300)
    assert (codes.indices[2] == -1).all()
    assert codes.relative_residuals[2] == 0
    assert (codes.indices != 17).all()


def test_only_zero_atoms_give_empty_codes(way: str) -> None:
    codes = solve_omp(random_rows(3, 8, 7), torch.zeros(5, 8), 2)
    assert (codes.indices == -1).all()
    torch.testing.assert_close(codes.relative_residuals, torch.ones(3))


def test_of_equal_atoms_the_first_is_used_and_never_both(way: str) -> None:
    atoms = random_rows(400, 24, 8)
    atoms[200:] = atoms[:200].flip(0)
    codes = solve_omp(random_rows(20, 24, 9), atoms, 24)
    assert int(codes.indices.max()) < 200
    assert codes.coefficients.abs().max() < 1e3


def test_opposite_atoms_tie_and_the_first_is_used(way: str) -> None:
    """Check an exact tie, |⟨r, a⟩| = |⟨r, -a⟩|: the second atom is dependent and must not be selected next."""
    atoms = random_rows(200, 40, 10)
    atoms = torch.cat([atoms, -atoms])
    codes = solve_omp(random_rows(20, 40, 11), atoms, 30)
    assert int(codes.indices.max()) < 200


def test_more_steps_than_dimensions_end_with_a_zero_residual(way: str) -> None:
    codes = solve_omp(random_rows(10, 16, 12), random_rows(300, 16, 13), 64)
    assert ((codes.indices >= 0).sum(1) <= 16).all()
    assert codes.relative_residuals.max() < 1e-5


def test_k_above_the_number_of_atoms_uses_all_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        codes = solve_omp(random_rows(4, 32, 14), random_rows(6, 32, 15), 10)
    assert codes.indices.shape == (4, 6)
    assert (codes.indices.sort(1).values == torch.arange(6)).all()
    assert "k is 10" in caplog.text
    assert "6 atoms" in caplog.text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["targets", "atoms"])
def test_nan_and_infinity_are_named(bad: float, where: str) -> None:
    rows = {"targets": random_rows(10, 8, 16), "atoms": random_rows(20, 8, 17)}
    rows[where][3, 1] = rows[where][7, 2] = bad
    with pytest.raises(OmpError, match=f"{where} of lm_head.weight hold NaN or infinity, first in rows 3, 7"):
        solve_omp(rows["targets"], rows["atoms"], 2, name="lm_head.weight")


def test_no_atoms_and_k_below_one_are_errors() -> None:
    with pytest.raises(OmpError, match="no atoms"):
        solve_omp(random_rows(2, 8, 18), torch.empty(0, 8), 2)
    with pytest.raises(OmpError, match="k is 0"):
        solve_omp(random_rows(2, 8, 18), random_rows(5, 8, 19), 0)


def test_no_targets() -> None:
    codes = solve_omp(torch.empty(0, 8), random_rows(5, 8, 20), 2)
    assert codes.indices.shape == (0, 2)
    assert codes.apply(torch.ones(5, 3)).shape == (0, 3)


def test_chunks_devices_and_methods_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms, targets = random_rows(2000, 64, 21, 2.0), random_rows(61, 64, 22, 2.0)
    force(monkeypatch, "float32", 61)
    single_chunk = solve_omp(targets, atoms, 40)
    for way, chunk, devices in [
        (WHOLE, 1, [CPU]),
        (WHOLE, 13, [CPU] * 3),
        (HALF, 1, [CPU]),
        (HALF, 7, [CPU] * 2),
        (HALF, 100, [CPU]),
        (None, 1, [CPU]),
        (None, 7, [CPU]),
        ("float16", 61, [CPU] * 3),
        ("float32", 64, [CPU] * 2),
        (REPLAY, 61, [CPU]),
        (REPLAY, 7, [CPU] * 3),
    ]:
        monkeypatch.undo()
        force(monkeypatch, way, chunk)
        codes = solve_omp(targets, atoms, 40, devices=devices)
        assert torch.equal(codes.indices, single_chunk.indices)
        torch.testing.assert_close(codes.coefficients, single_chunk.coefficients, rtol=1e-6, atol=1e-6)


def test_devices_share_the_targets_and_progress_adds_up() -> None:
    finished: list[int] = []
    targets, atoms = random_rows(50, 32, 23), random_rows(200, 32, 24)
    codes = solve_omp(targets, atoms, 4, devices=[CPU] * 3, progress=finished.append)
    assert sum(finished) == 50
    assert len(finished) >= 3
    assert torch.equal(codes.indices, solve_omp(targets, atoms, 4).indices)


def test_threads_of_torch_are_unchanged() -> None:
    before = torch.get_num_threads()
    solve_omp(random_rows(50, 32, 23), random_rows(200, 32, 24), 4)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "setting", ["torch.set_float32_matmul_precision('medium')", "torch.backends.cuda.matmul.allow_tf32 = True"]
)
def test_low_precision_settings_do_not_affect_the_solver(setting: str) -> None:
    """Set «medium» precision, which computes float32 products in bfloat16 on CPUs that support it.

    Runs in a new process after an earlier solve: torch does not return its setting if the backends differ.
    """
    script = f"""
        import torch
        from mergekit_omp.solver import solve_omp

        draw = torch.Generator().manual_seed(0)
        targets, atoms = torch.randn(40, 256, generator=draw), torch.randn(2000, 256, generator=draw)
        expected = solve_omp(targets, atoms, 16)
        {setting}
        before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32
        assert torch.equal(solve_omp(targets, atoms, 16).indices, expected.indices)
        assert before == (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32)
        assert before != ("highest", False)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.skipif(not has_backends(), reason="torch before 2.9")
def test_no_solve_multiplies_in_the_precision_of_another() -> None:
    """Begin and end solves in any order: only the last one restores the setting of the program."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    one, other = full_precision(), full_precision()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert matmul.fp32_precision == "ieee"
    other.__exit__(None, None, None)
    assert matmul.fp32_precision == "bf16"
    matmul.fp32_precision = before


@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_made_the_faster_way(rate: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []

    def build(*arguments: Any, half: bool, in_integers: bool) -> Gram:
        used.append(in_integers)
        return build_gram(*arguments, half=half, in_integers=in_integers)

    monkeypatch.setattr(gram_matrix, "build_gram", build)
    monkeypatch.setattr(dispatch, "measure_rates", lambda: Rates(rate, 1.0))
    force(monkeypatch, WHOLE)
    targets, atoms = random_rows(20, 32, 91).to(dtype), random_rows(300, 32, 90).to(dtype)
    for normalize in (False, True):
        codes = solve_omp(targets, atoms, 4, normalize_atoms=normalize)
        assert used.pop() is (rate < 1)
        expected = reference_omp(targets, torch.nn.functional.normalize(atoms.double()) if normalize else atoms, 4)
        assert torch.equal(codes.indices, expected.indices)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    dim=st.integers(1, 300),
    exponent=st.integers(-120, 100),
    outlier=st.sampled_from([1.0, 1e3, 1e6]),
    bfloat16=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_products_of_integers(
    rows: int, columns: int, dim: int, exponent: int, outlier: float, bfloat16: bool, seed: int
) -> None:
    """Compare with float64, for rows of any size, within the rounding that is told; bfloat16 loses next to none."""
    left, right = (random_rows(*shape, 1.0) for shape in ((rows, dim, seed), (columns, dim, seed + 1)))
    left, right = left * 2.0**exponent, right.double()
    right[:, seed % dim] *= outlier
    right[-1] = 0
    if bfloat16:
        left, right = left.bfloat16().float(), right.bfloat16().double()
    left_norms, right_norms = left.double().norm(dim=1), right.norm(dim=1)
    one, other = pack(left, left_norms), pack(right, right_norms, threads=2)
    product = multiply(one.panels, 0, other.panels, 0, (rows, columns), dim)
    assert product.shape == (rows, columns)
    scaled = product.astype(np.float64) * one.factors[:, None] * other.factors
    expected = torch.nn.functional.normalize(left.double(), eps=0) @ torch.nn.functional.normalize(right).T
    bound = (1 + one.errors[:, None]) * (1 + other.errors) - 1 + (dim + 8) * 2**-24
    assert (np.abs(scaled - expected.numpy()) <= bound).all()
    assert (one.errors <= 2**-15 * dim**0.5).all()
    assert other.errors[-1] == other.factors[-1] == 0
    if bfloat16 and outlier == 1:
        assert np.median(one.errors) <= 2**-15


def test_rates_of_this_cpu() -> None:
    product, scan = measure_rates()
    assert 0 < product <= 1
    assert scan > 0


@pytest.mark.parametrize("name", ["", "generic"])
def test_code_for_another_cpu_has_no_instructions_of_this_one(name: str) -> None:
    script = f"""
        from llvmlite import binding
        from mergekit_omp.solver.gram.vectors import has_feature

        features = binding.get_host_cpu_features()
        assert [feature for feature in features if has_feature(feature)] == [
            feature for feature in features if features[feature] and not {name!r}
        ]
    """
    environment = os.environ | {"NUMBA_CPU_NAME": name}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)


def test_out_of_memory_halves_the_chunk(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Inject a fault: chunks of more than five targets run out of memory, in one thread as on a GPU."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    targets, atoms = random_rows(40, 32, 25), random_rows(200, 32, 26)
    expected = solve_omp(targets, atoms, 6)
    original = scan_search.find_supports
    sizes: list[int] = []

    def short_of_memory(rows: torch.Tensor, *arguments: object) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (injected)")
        return original(rows, *arguments)

    monkeypatch.setattr(scan_search, "find_supports", short_of_memory)
    force(monkeypatch, chunk=40)
    codes = solve_omp(targets, atoms, 6)
    assert torch.equal(codes.indices, expected.indices)
    assert max(sizes) == 40
    assert "Out of memory with 40 targets per chunk: continuing with 20" in caplog.text


def pursuit_of(count: int, targets: int, k: int, seed: int) -> fixed_shape.FixedPursuit:
    """Start a pursuit in fixed shapes, with groups of atoms as on a CPU."""
    atoms, rows = random_rows(count, 48, seed, 1.0), random_rows(targets, 48, seed + 1, 1.0)
    return fixed_shape.FixedPursuit(rows, Screen(atoms, atoms.norm(dim=1), torch.float16), k)


def test_a_step_of_fixed_shapes_is_one_graph_and_keeps_its_tensors() -> None:
    """Compile a step as one graph, without a branch on data and without a shape that depends on data."""
    pursuit, expected = pursuit_of(900, 30, 12, 40), pursuit_of(900, 30, 12, 40)
    places = {name: value.data_ptr() for name, value in vars(pursuit).items() if isinstance(value, torch.Tensor)}
    graphs = CompileCounter()
    step = torch.compile(pursuit.step, fullgraph=True, dynamic=False, backend=graphs)
    for _ in range(12):
        step()
        expected.step()
        assert pursuit.counts.tolist() == expected.counts.tolist()
    assert graphs.frame_count == 1
    assert torch.equal(pursuit.support, expected.support)
    assert pursuit.done.all()
    assert places == {name: value.data_ptr() for name, value in vars(pursuit).items() if name in places}


@pytest.mark.parametrize("places", [1, 2, 16])
def test_a_recorded_step_is_replayed(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a CUDA graph by one of torch's operations, which also repeats what was done without asking Python.

    Targets with more candidates than places are crowded.
    """
    steps: list[int] = []

    def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        graph = make_fx(lambda: step())()
        return lambda: steps.append(1) or graph()

    monkeypatch.setattr(fixed_shape, "PLACES", places)
    monkeypatch.setattr(fixed_shape, "capture", record)
    crowds = count_calls(monkeypatch, fixed_shape.FixedPursuit, "step_of_crowded")
    force(monkeypatch, REPLAY, 40)
    atoms, targets = random_rows(3000, 96, 82, 2.0), random_rows(40, 96, 83, 2.0)
    atoms[7] = atoms[3] + 1e-6 * atoms[5]
    targets[:2] = atoms[[3, 9]]
    assert torch.equal(solve_omp(targets, atoms, 24).indices, reference_omp(targets, atoms, 24).indices)
    assert 20 <= len(steps) <= 30
    assert bool(crowds) == (places < 16)


def test_a_step_that_cannot_be_captured_runs_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Inject a fault: the capture of a CUDA graph fails, as it does on a GPU whose libraries cannot."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing (injected)")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", fail)
    monkeypatch.setattr(fixed_shape, "_NOT_CAPTURED", set())
    pursuit = pursuit_of(300, 5, 8, 42)
    for _ in range(2):
        assert fixed_shape.capture(pursuit.step, torch.device("cuda", 0)) == pursuit.step
    assert caplog.text.count("without CUDA graphs") == 1


def test_triton_kernels_do_what_the_operations_of_torch_do() -> None:
    """Run the kernels in Triton's interpreter, which needs no GPU, with atoms that are zero, equal and nearly so."""
    pytest.importorskip("triton")
    script = """
        import torch
        from mergekit_omp.solver.scan import gpu_kernel, gpu_operations

        draw = torch.Generator().manual_seed(0)
        for targets, dim, k in [(7, 24, 20), (3, 300, 8), (2, 2100, 4)]:
            atoms = torch.randn(60, dim, generator=draw)
            atoms[5], atoms[7], atoms[9] = atoms[3], 0, atoms[3] + 1e-3 * atoms[4]
            norms, size = atoms.norm(dim=1).double(), torch.zeros(targets, dtype=torch.int64)
            residual, basis = torch.randn(targets, dim, generator=draw).double(), torch.zeros(targets, k, dim).double()
            states = [(residual, basis), (residual.clone(), basis.clone())]
            for atom in [3, 5, 9, 7, 1, 2, 11, 12][:k]:
                choice, useful = torch.full_like(size, atom), torch.rand(targets, generator=draw) < 0.8
                candidates = torch.randint(-1, 60, (targets, 16), generator=draw)
                correlations, added = [], []
                for (residual, basis), correlate, orthogonalize in zip(
                    states,
                    [gpu_kernel.launch_correlate, gpu_operations.correlate],
                    [gpu_kernel.launch_orthogonalize, gpu_operations.orthogonalize],
                ):
                    correlations.append(correlate(residual, atoms, candidates))
                    added.append(orthogonalize(atoms, choice, norms[choice], useful, basis, size, residual))
                for found, expected in [correlations, added, *zip(*states)]:
                    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
                size += added[0]
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_rows_of_any_size(size: float, way: str) -> None:
    """Check rows beyond the range of float16, with one dominant coordinate."""
    atoms, targets = size * random_rows(600, 32, 84, 1.0), random_rows(9, 32, 85, 1.0) / size
    atoms[:, 7] *= 30
    assert torch.equal(solve_omp(targets, atoms, 12).indices, reference_omp(targets, atoms, 12).indices)


def test_near_copies_are_told_apart_by_a_state_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check atoms that differ by less than float32 can tell once one of them is in the support."""
    force(monkeypatch, REPLAY)
    atoms, targets = random_rows(900, 40, 86, 2.0), random_rows(10, 40, 87, 2.0)
    atoms[20:30] = atoms[:10] + 1e-4 * atoms[30:40]
    targets[4] = atoms[2] + 1e-5 * atoms[500]
    assert torch.equal(solve_omp(targets, atoms, 40).indices, reference_omp(targets, atoms, 40).indices)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[str]:
    """Return a list to which every call of a method adds its name."""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: calls.append(name) or original(*arguments))
    return calls


def test_any_device_of_torch_has_a_chunk_size() -> None:
    """Check other devices, such as Intel's accelerators, which mergekit supports."""
    plan = plan_solve(torch.device("xpu"), ProblemShape(10_000, 39_237, 576, 64), memory_budget=2**34)
    assert (plan.method, plan.dtype, plan.threads) == ("scan", torch.float32, 1)
    assert plan.chunk > 400


@pytest.mark.parametrize("targets", [1, 100, 768, 10_000])
@pytest.mark.parametrize("atoms", [500, 39_237, 128_000])
def test_threads_finish_together_and_scans_stay_in_kept_blocks(targets: int, atoms: int) -> None:
    threads, size = 2, 2
    chunk = scan_chunk(CPU, 2**36, ProblemShape(targets, atoms, 640, 64), threads, atoms, torch.float16)
    assert chunk * atoms * size <= KEPT_BLOCK
    assert -(-targets // chunk) % threads == 0 or targets < threads
    assert chunk > min(targets / threads, KEPT_BLOCK / (atoms * size), 256) / 2


@pytest.mark.parametrize(
    ("atoms", "dim", "k", "mib"), [(20_000, 128, 16, 150), (4_000, 1024, 64, 200), (2_000, 512, 256, 400)]
)
@pytest.mark.parametrize("rows", ["random", "orthogonal"])
@pytest.mark.parametrize("way", ["scan", WHOLE, HALF])
def test_memory_stays_within_the_budget(atoms: int, dim: int, k: int, mib: int, rows: str, way: str) -> None:
    """Measure the peak resident memory of a new process, in addition to its memory before the solve.

    Targets orthogonal to all atoms are the worst case: every atom may be the best one.
    """
    if way != "scan":
        mib += gram_matrix_bytes(ProblemShape(300, atoms, dim, k), 2, half=way == HALF) // 2**20
    script = f"""
        import torch
        from benchmarks.memory import peak, start_of_peak
        from mergekit_omp.solver import dispatch, memory, solve_omp

        memory.FEWEST_OF_HALF = 1
        dispatch.gram_pays = lambda *_: {way != "scan"}
        slots = memory.gram_slots
        memory.gram_slots = lambda *given, half: slots(*given, half=half) if half == {way == HALF} else 0
        draw = torch.Generator().manual_seed(0)
        atoms, targets = torch.randn({atoms}, {dim}, generator=draw), torch.randn(300, {dim}, generator=draw)
        if {rows == "orthogonal"}:
            atoms[:, {dim // 2}:], targets[:, :{dim // 2}] = 0, 1e-6
        solve_omp(targets[:8], atoms[:500], 4, memory_budget=2**26)
        before = start_of_peak(on_gpu=False)
        solve_omp(targets, atoms, {k}, memory_budget={mib * 2**20})
        print((peak(on_gpu=False) - before) / 2**20)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert 0 < float(output.stdout) <= 1.1 * mib


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_matrices_of_a_scan_are_counted(dtype: torch.dtype) -> None:
    atoms = random_rows(640, 48, 0, 1.0)  # whole groups
    screen = Screen(atoms, atoms.norm(dim=1), dtype)
    held = screen.atoms.nbytes + screen.rounded.nbytes
    assert held == scan_matrix_bytes(ProblemShape(1, 640, 48, 8), dtype)


@pytest.mark.parametrize("screen", SCREENS)
@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 200),
    dim=st.integers(1, 120),
    seed=st.integers(0, 10_000),
    outlier=st.sampled_from([1.0, 30.0, 1e4]),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_bounds_of_a_screen_hold(screen: str, count: int, dim: int, seed: int, outlier: float, size: float) -> None:
    """Check that exact correlations are within their bounds, and that candidates include the best atom."""
    atoms, residuals = random_rows(count, dim, seed, 1.0), size * random_rows(9, dim, seed + 1, 1.0)
    atoms[:, seed % dim] *= outlier
    residuals[:3, (seed // 2) % dim] *= outlier
    exact = (residuals.double() @ atoms.double().T).abs()
    found = Screen(atoms, atoms.norm(dim=1), getattr(torch, screen)).scan(residuals.clone(), residuals.norm(dim=1))
    values, order = found.values.abs().double(), found.order
    errors = found.unit[:, None, None] * (found.rounding * values + found.errors[:, None])
    assert sorted(order[order >= 0].tolist()) == list(range(count))
    within = (exact[:, order] - found.unit[:, None, None] * values).abs() <= errors
    assert within[:, order >= 0].all()
    for most in (10**6, 150, 1):
        pairs: list[tuple[int, int]] = []
        for part, rows, atom in found.candidates(most):
            assert set(rows.tolist()) == set(range(part.stop - part.start)), "each residual has a candidate"
            assert len(rows) <= most or part.stop - part.start == 1
            pairs += zip((rows + part.start).tolist(), atom.tolist(), strict=True)
        assert len(set(pairs)) == len(pairs)
        assert set(zip(range(9), exact.argmax(1).tolist(), strict=True)) <= set(pairs)
        if most == 10**6:
            expected = pairs
        assert pairs == expected


def test_apply_is_the_weighted_sum_whatever_the_chunk() -> None:
    atoms, targets = random_rows(100, 16, 27), random_rows(9, 16, 28)
    codes = solve_omp(targets, atoms, 5)
    rows = random_rows(100, 24, 29).bfloat16()
    dense = torch.zeros(9, 100).scatter_(1, codes.indices, codes.coefficients)
    combined = codes.apply(rows)
    assert combined.dtype == torch.float32
    torch.testing.assert_close(combined, dense @ rows.float())
    torch.testing.assert_close(codes.apply(rows, chunk_bytes=1), combined)


def test_relative_residual_is_that_of_the_combination() -> None:
    atoms, targets = random_rows(500, 64, 30), random_rows(9, 64, 31)
    codes = solve_omp(targets, atoms, 10)
    error = (codes.apply(atoms) - targets).norm(dim=1) / targets.norm(dim=1)
    torch.testing.assert_close(codes.relative_residuals, error, rtol=1e-4, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 120),
    dim=st.integers(1, 40),
    k=st.integers(1, 48),
    seed=st.integers(0, 10_000),
    common=st.sampled_from([0.0, 3.0]),
)
def test_properties_of_every_solution(count: int, dim: int, k: int, seed: int, common: float) -> None:
    """Check distinct atoms, at most k, a residual orthogonal to them, and that more atoms never increase it."""
    atoms, targets = random_rows(count, dim, seed, common), random_rows(7, dim, seed + 1, common)
    codes = solve_omp(targets, atoms, k)
    last, zero = torch.full((7,), torch.inf, dtype=torch.float64), 1e-12 * targets.norm(dim=1)
    for row in supports(codes):
        assert len(set(row)) == len(row) <= min(k, count, dim)
    for size in range(codes.indices.shape[1] + 1):
        _, residual = least_squares(targets, atoms, codes.indices[:, :size])
        assert (residual.norm(dim=1) <= last + zero).all()
        last = residual.norm(dim=1)
    chosen = atoms[codes.indices.clamp(min=0)].double() * (codes.indices >= 0)[:, :, None]
    inner = torch.einsum("bkd,bd->bk", torch.nn.functional.normalize(chosen, dim=2), residual)
    assert (inner.abs().amax(1) <= 1e-7 * targets.norm(dim=1)).all()


def gram_of(atoms: torch.Tensor, threads: int = 1, *, half: bool = False, in_integers: bool = True) -> Gram:
    return build_gram(atoms, atoms.norm(dim=1), threads, half=half, in_integers=in_integers)


def cosines_of(gram: Gram) -> torch.Tensor:
    """Return the matrix float64 (N, P) of a Gram matrix, in which only the upper part of a half one is filled."""
    count, width = len(gram.atoms), len(gram.norms)
    cosines = torch.zeros(count, width, dtype=torch.float64)
    for strip, start in enumerate(gram.starts[:-1].tolist()):
        rows = min(count, (strip + 1) * STRIP) if gram.half else count
        for row in range(rows):
            place = start + row * gram.stride
            cosines[row, strip * STRIP : (strip + 1) * STRIP] = torch.from_numpy(gram.cosines[place : place + STRIP])
    return cosines / UNIT


@pytest.mark.parametrize("half", [False, True])
@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(1, 2300),
    dim=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
    in_integers=st.booleans(),
)
def test_gram_is_the_matrix_of_cosines(
    half: bool, count: int, dim: int, seed: int, size: float, in_integers: bool
) -> None:
    """Check within the bounds, with zeros for zero atoms."""
    atoms, rows = size * random_rows(count, dim, seed, 1.0), random_rows(3, dim, seed + 1).double()
    atoms[seed % count] = 0
    unit = torch.nn.functional.normalize(atoms.double() / size)
    atoms[seed % count, 0] = 1e-40  # as good as none
    gram = gram_of(atoms, threads=2, half=half, in_integers=in_integers)
    kept = np.zeros((5, padded(count)), np.int16)
    errors = gram.store_cosines(rows, rows.norm(dim=1), kept, np.array([3, 0, 4]))
    difference = (cosines_of(gram)[:, :count] - unit @ unit.T).abs()
    bound = (1 + gram.rounding) * torch.from_numpy(gram.errors)[:, None] / UNIT + gram.rounding
    assert ((difference.triu() if half else difference) <= bound).all()
    assert bound.max() <= (0.5 if not in_integers else 0.5 + 2 * dim**0.5) / UNIT + (dim + 32) * 2**-24
    usual = np.inf if in_integers else 0.5 / UNIT + (dim + 16) * 2**-24
    assert (difference.triu() if half else difference).max() <= usual
    targets = torch.nn.functional.normalize(rows)
    inner = torch.from_numpy(kept)[[3, 0, 4]].double() / UNIT
    assert not kept[[1, 2]].any()
    assert (inner[:, count:] == 0).all()
    bound = (1 + gram.rounding) * torch.from_numpy(errors)[:, None] / UNIT + gram.rounding
    assert ((inner[:, :count] - targets @ unit.T).abs() <= bound.clamp(max=usual)).all()


@pytest.mark.parametrize("list_length", [1, 200])
@pytest.mark.parametrize("steps", [1, 2, 8, 30])
def test_proposed_steps_are_verified(steps: int, list_length: int) -> None:
    """Check that a candidate list that is too short undoes most steps but does not change the result."""
    atoms, targets = random_rows(3000, 96, 80, 1.0), random_rows(12, 96, 81, 1.0)
    options = {"most_steps": steps, "list_length": list_length}
    for half in (False, True):
        support, _, _ = gram_search.solve_by_gram(targets, gram_of(atoms, half=half), 24, 5, 2, **options)
        assert torch.equal(support, reference_omp(targets, atoms, 24).indices)


@pytest.mark.parametrize("absent", [("avx512",), ("avx512", "avx2")], ids=["256 bits", "any CPU"])
def test_other_instructions_find_the_same(absent: tuple[str, ...], tmp_path: Path) -> None:
    """Let the inner loops see a CPU without longer vectors or products of pairs, in a process of its own."""
    code = f"""
        import torch
        from llvmlite import binding
        features = binding.get_host_cpu_features()
        features.update((name, False) for name in features if name.startswith({absent!r}))
        binding.get_host_cpu_features = lambda: features
        from mergekit_omp.solver.gram import matrix, search, vectors
        from mergekit_omp.solver.reference import reference_omp
        assert vectors.MANY == 4
        assert (vectors.MULTIPLY_PAIRS is None) == ("avx2" in {absent!r})
        draw = torch.Generator().manual_seed(0)
        atoms, targets = torch.randn(1100, 48, generator=draw) + 0.3, torch.randn(6, 48, generator=draw) + 0.3
        gram = matrix.build_gram(atoms, atoms.norm(dim=1), 2, half=True)
        support, _, _ = search.solve_by_gram(targets, gram, 20, 4, 2)
        assert torch.equal(support, reference_omp(targets, atoms, 20).indices)
    """
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


@given(count=st.integers(1, 20), steps=st.sampled_from([STEPS // 2, STEPS]), seed=st.integers(0, 10_000))
def test_sums_of_a_scan_are_exact(count: int, steps: int, seed: int) -> None:
    """Add rows of any 16-bit integers; sums of some exceed 32 bits on the way to one that does not."""
    draw = np.random.default_rng(seed)
    some = draw.integers(-(2**15), 2**15, (1 + count, STRIP), np.int16)
    rows = np.concatenate([some, some[1:], some[:1]])
    factors = draw.integers(-(2**15) + 1, 2**15, (steps, 1 + count), np.int16)
    weights = np.concatenate([factors, -factors[:, 1:], np.zeros((steps, 1), np.int16)], axis=1)
    scales, norms = draw.random(steps, np.float32), draw.random(STRIP, np.float32)
    places = rows.ctypes.data + rows.strides[0] * np.arange(len(rows))
    correlations = np.empty((steps, STRIP), np.float32)
    add_rows(places, weights, scales, norms, 1, correlations)
    expected = np.abs(factors[:, :1] * some[0].astype(np.float64)) * scales[:, None] * norms
    assert np.allclose(correlations, expected, rtol=4 * 2**-24, atol=0)


@given(
    count=st.integers(40, 1100),
    dim=st.integers(4, 64),
    seed=st.integers(0, 10_000),
    common=st.sampled_from([0.0, 1.0, 10.0]),
    in_integers=st.booleans(),
)
def test_bounds_of_a_scan_hold(count: int, dim: int, seed: int, common: float, in_integers: bool) -> None:
    """Compare the correlations of drafted steps with those of float64."""
    atoms, targets = random_rows(count, dim, seed, common), random_rows(3, dim, seed + 1, common)
    gram = gram_of(atoms, in_integers=in_integers)
    search = gram_search._Search(targets, gram, 24, 3, 1, 8, 20, None)
    work, pursuits = workspace(dim, 24, 8), search.pursuits
    exact, largest = atoms.double().numpy(), atoms.double().norm(dim=1).max().item()
    while search._advance(0, 0, 3, work):
        for slot in np.flatnonzero(pursuits.status == gram_state.DRAFTED):
            support = pursuits.support[slot, : pursuits.verified[slot] + pursuits.length[slot] - 1]
            places = np.full(pursuits.weights.shape[2], pursuits.inner[slot].ctypes.data)
            places[1 : 1 + len(support)] = gram.cosines.ctypes.data + 2 * gram.stride * support
            estimates = np.empty((STEPS, len(gram.norms)), np.float32)
            for start in range(0, len(gram.norms), STRIP):
                part = np.empty((STEPS, STRIP), np.float32)
                weights, scales = pursuits.weights[slot], pursuits.scales[slot]
                add_rows(places + 2 * start, weights, scales, gram.norms[start : start + STRIP], 1, part)
                estimates[:, start : start + STRIP] = part
            for step in range(pursuits.length[slot]):
                chosen, target = exact[support[: pursuits.verified[slot] + step]], pursuits.targets[slot]
                residual = target - np.linalg.lstsq(chosen.T, target, rcond=None)[0] @ chosen
                correlations = np.abs(exact @ residual) / largest * UNIT
                bounds = pursuits.errors[slot, step] * gram.norms[:count]
                assert (np.abs(estimates[step, :count] - correlations) <= bounds).all()
        verify(gram, 0, len(gram.starts) - 1, search.below[0], pursuits, 0, 3, work)


def test_weights_beyond_16_bits() -> None:
    """Fit by two atoms that differ by little, with opposite coefficients of forty thousand."""
    atoms, target = torch.eye(60), torch.zeros(1, 60)
    atoms[1] = atoms[0]
    atoms[1, 1] = 2.5e-5
    target[0, :2] = torch.tensor([0.01, 1.0])
    target[0, 2:] = torch.linspace(4e-6, 2e-5, 58)
    expected = reference_omp(target, atoms, 8)
    assert expected.coefficients.abs().max() > 2**15
    support, _, _ = gram_search.solve_by_gram(target, gram_of(atoms), 8, 1, 1)
    assert torch.equal(support, expected.indices)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("listed", [80, 448])
def test_full_lists_do_not_change_the_result(half: bool, listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a slot few places for candidates and rivals; many atoms that are almost equal are rivals of each other."""
    monkeypatch.setattr(gram_state, "LISTED", listed)
    monkeypatch.setattr(gram_state, "RIVALS", 3)
    atoms = random_rows(1500, 96, 82, 1.0)
    atoms[500:1000] = atoms[7] + 1e-6 * torch.randn(500, 96, generator=torch.Generator().manual_seed(0))
    targets = torch.cat([random_rows(8, 96, 83, 1.0), atoms[7] + 0.1 * random_rows(4, 96, 84)])
    support, _, _ = gram_search.solve_by_gram(targets, gram_of(atoms, half=half), 12, 5, 2)
    assert torch.equal(support, reference_omp(targets, atoms, 12).indices)


@pytest.mark.parametrize("half", [False, True])
def test_an_error_in_one_thread_ends_all(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one thread run out of memory; with a half matrix the other waits for it."""
    fill = gram_search._Search._fill

    def fail_once(search: gram_search._Search, *arguments: object) -> None:
        with search.lock:
            first, search.results.support[0, 0] = search.results.support[0, 0] == -1, 0
        if first:
            raise MemoryError("injected")
        fill(search, *arguments)

    monkeypatch.setattr(gram_search._Search, "_fill", fail_once)
    atoms, targets = random_rows(1200, 32, 85), random_rows(40, 32, 86)
    with pytest.raises(MemoryError, match="injected"):
        gram_search.solve_by_gram(targets, gram_of(atoms, half=half), 8, 10, 2)


def test_the_plan_is_the_fastest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, budget = ProblemShape(10_000, 30_000, 576, 64), 2**33
    monkeypatch.setattr(dispatch, "measure_rates", lambda: Rates(1.0, 1.0))
    plan = plan_solve(CPU, shape, memory_budget=budget)
    assert (plan.method, plan.dtype) == ("gram", torch.int16)
    assert (plan.chunk, plan.half) == (SLOTS * plan.threads, False)
    assert 2 * 30_000**2 < plan.matrix_bytes < budget
    assert plan.products > 0
    assert not plan.in_integers
    monkeypatch.setattr(dispatch, "measure_rates", lambda: Rates(0.5, 1.0))
    faster = plan_solve(CPU, shape, memory_budget=budget)
    assert faster.in_integers
    assert 0.5 * plan.products < faster.products < plan.products
    monkeypatch.setattr(dispatch, "measure_rates", lambda: Rates(0.5, 2.0))
    assert plan_solve(CPU, shape, memory_budget=budget).products > plan.products
    half = plan_solve(CPU, shape, memory_budget=3 * 2**29)
    assert (half.method, half.half) == ("gram", True)
    assert 30_000**2 < half.matrix_bytes < 3 * 2**29
    for other in (
        plan_solve(CPU, shape._replace(targets=100), memory_budget=budget),
        plan_solve(CPU, shape, memory_budget=2**30),
        plan_solve(CPU, shape, memory_budget=2 * budget, sharing=16),
        plan_solve(torch.device("xpu"), shape, memory_budget=budget),
    ):
        assert other.method == "scan"
        assert other.products == 0
        assert 0 < other.chunk < shape.targets
    monkeypatch.setattr(dispatch, "load_gram_search", lambda: None)
    assert plan_solve(CPU, shape, memory_budget=budget).method == "scan", "numba is missing"


def test_the_log_names_the_method(caplog: pytest.LogCaptureFixture, way: str) -> None:
    with caplog.at_level(logging.INFO):
        solve_omp(random_rows(50, 32, 23), random_rows(200, 32, 24), 4)
    [line] = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    how = {WHOLE: "whole gram in int16", HALF: "half gram in int16", REPLAY: "scan in float16"}.get(
        way, f"scan in {way}"
    )
    assert line.startswith(f"OMP of 50 targets over 200 atoms, d = 32, k = 4, on cpu: {how}, ")
    assert ("targets together" if way in (WHOLE, HALF) else "threads x") in line
    assert line.endswith("MiB for matrices")


def test_a_solve_gives_no_warnings_and_sets_no_filter() -> None:
    """Solve in a new process in which torch has not warned yet and warnings are errors."""
    script = """
        import warnings
        import torch
        before = list(warnings.filters)
        from mergekit_omp.solver import solve_omp

        solve_omp(torch.eye(8)[:5], torch.eye(8), 2, devices=[torch.device("cpu")] * 3)
        assert warnings.filters == before
    """
    command = [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1e-12, 1.0, 1e12]), normalize=st.booleans())
def test_reference_is_scikit_learns(seed: int, size: float, normalize: bool) -> None:
    """Compare unit atoms with scikit-learn's; other atoms are scaled, and the coefficients with them."""
    atoms, targets = torch.nn.functional.normalize(random_rows(60, 24, seed).double()), random_rows(3, 24, seed + 1)
    scale = size * (0.5 + torch.arange(60)[:, None] % 7) if normalize else size
    codes = reference_omp(targets, scale * atoms, 8, normalize_atoms=normalize)
    expected = torch.from_numpy(orthogonal_mp(atoms.T.numpy(), targets.double().T.numpy(), n_nonzero_coefs=8).T)
    found = torch.zeros(3, 60, dtype=torch.float64).scatter_(1, codes.indices, codes.coefficients.double())
    torch.testing.assert_close(found * (scale * torch.ones(60, 1)).T, expected, rtol=1e-5, atol=1e-6)


def test_a_kernel_that_does_not_compile_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Inject a fault: Triton is installed but finds no C compiler."""

    def launch_correlate(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler. (injected)")

    name = "mergekit_omp.solver.scan.gpu_kernel"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(launch_correlate=launch_correlate))
    monkeypatch.setattr(sys.modules[name.rpartition(".")[0]], "gpu_kernel", sys.modules[name], raising=False)
    assert gpu_operations.find_kernel.__wrapped__(CPU) is None
    assert "takes longer" in caplog.text
    assert "C compiler" in caplog.text


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000), chunk=st.integers(1, 20), way=st.sampled_from([None, *SCREENS, WHOLE, HALF, REPLAY])
)
def test_order_of_atoms_and_chunks_do_not_matter(seed: int, chunk: int, way: str | None) -> None:
    atoms, targets = random_rows(300, 32, seed, 1.0), random_rows(20, 32, seed + 1, 1.0)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        force(patch, way, chunk)
        shuffled = solve_omp(targets, atoms[order], 12)
    assert torch.equal(order[shuffled.indices], solve_omp(targets, atoms, 12).indices)
