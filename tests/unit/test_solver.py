"""The solver against slow, obvious references, and at its edges."""

import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from sklearn.linear_model import orthogonal_mp

import mergekit_omp.solver.dispatch as device_module
from mergekit_omp.errors import OmpError
from mergekit_omp.solver import SparseCodes, solve_omp
from mergekit_omp.solver.gram import matrix as gram
from mergekit_omp.solver.gram import search as speculation
from mergekit_omp.solver.gram.matrix import Gram
from mergekit_omp.solver.least_squares import least_squares
from mergekit_omp.solver.memory import GRAM_CHUNK, KEPT_BLOCK, chunk_size, gram_bytes, gram_chunk_size
from mergekit_omp.solver.scan import int8, projection
from mergekit_omp.solver.scan.int8 import Int8Screen
from mergekit_omp.solver.scan.screening import FloatScreen, Look, Screen
from mergekit_omp.solver.scan.shortlist import SIZE

CPU = torch.device("cpu")


def reference_omp(target: np.ndarray, atoms: np.ndarray, k: int) -> list[int]:
    """OMP in float64, one target at a time: add argmax |⟨r, a⟩|, refit by least squares, until r is zero."""
    support: list[int] = []
    residual = target
    while len(support) < min(k, len(atoms)) and np.linalg.norm(residual) > 1e-6 * np.linalg.norm(target):
        support.append(int(np.argmax(np.abs(atoms @ residual))))
        coefficients = np.linalg.lstsq(atoms[support].T, target, rcond=None)[0]
        residual = target - atoms[support].T @ coefficients
    return support


def random_rows(count: int, dim: int, seed: int, common: float = 0.0) -> torch.Tensor:
    """Gaussian rows of different lengths; with ``common`` they share a direction, as embeddings do."""
    draw = torch.Generator().manual_seed(seed)
    lengths = 0.5 + 2 * torch.rand(count, 1, generator=draw)
    return lengths * (torch.randn(count, dim, generator=draw) + common * torch.randn(dim, generator=draw))


def embedding(folder: Path) -> torch.Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            if "model.embed_tokens.weight" in weights.keys():  # noqa: SIM118
                return weights.get_tensor("model.embed_tokens.weight")
    raise AssertionError(f"no embedding in {folder}")


def supports(codes: SparseCodes) -> list[list[int]]:
    return [[atom for atom in row if atom >= 0] for row in codes.indices.tolist()]


SCREENS = {
    "int8": Int8Screen,
    "float16": partial(FloatScreen, dtype=torch.float16),
    "float32": partial(FloatScreen, dtype=torch.float32),
}


GRAM = "gram"


@pytest.fixture(params=[*SCREENS, GRAM])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way to solve exactly, whatever this machine would choose."""
    force(monkeypatch, request.param)
    return request.param


@pytest.fixture(params=SCREENS)
def screen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way to look at all atoms, whatever this machine would choose."""
    force(monkeypatch, request.param)
    return request.param


def skip_where_missing(screen: str | None) -> None:
    if screen == "int8" and not int8.is_supported():
        pytest.skip("this CPU or torch does not multiply 8-bit integers")


def force(monkeypatch: pytest.MonkeyPatch, screen: str | None = None, chunk: int | None = None) -> None:
    skip_where_missing(screen)
    if screen == GRAM:
        monkeypatch.setattr(device_module, "gain_of_gram", lambda *_: 2.0)
    elif screen is not None:
        monkeypatch.setattr(device_module, "_screen", SCREENS[screen])
    if chunk is not None:
        monkeypatch.setattr(device_module, "chunk_size", lambda *_: chunk)
        monkeypatch.setattr(device_module, "gram_chunk_size", lambda *_: chunk)


@pytest.mark.parametrize("common", [0.0, 2.0], ids=["isotropic", "common-direction"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_supports_are_those_of_a_float64_reference(way: str, common: float, dtype: torch.dtype) -> None:
    atoms, targets = random_rows(3000, 96, 0, common).to(dtype), random_rows(40, 96, 1, common).to(dtype)
    codes = solve_omp(targets, atoms, 24)
    expected = [reference_omp(x, atoms.double().numpy(), 24) for x in targets.double().numpy()]
    assert supports(codes) == expected


def test_same_as_scikit_learn(way: str) -> None:
    """sklearn selects in the same way on unit atoms, and its coefficients are the same least-squares solution."""
    atoms = torch.nn.functional.normalize(random_rows(400, 48, 2))
    targets = random_rows(30, 48, 3)
    codes = solve_omp(targets, atoms, 12)
    expected = orthogonal_mp(atoms.double().numpy().T, targets.double().numpy().T, n_nonzero_coefs=12).T
    found = torch.zeros(30, 400).scatter_(1, codes.indices, codes.coefficients)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("model", ["smollm2_dir", "gemma3_dir"])
def test_real_rows(model: str, way: str, request: pytest.FixtureRequest) -> None:
    """Real embeddings share strong directions and have near-copies; the supports are still those of float64."""
    rows = embedding(request.getfixturevalue(model))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    atoms, targets = rows[order[:6000]].float(), rows[order[6000:6008]].float()
    codes = solve_omp(targets, atoms, 32)
    expected = [reference_omp(x, atoms.double().numpy(), 32) for x in targets.double().numpy()]
    assert supports(codes) == expected


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


class TestScanEvery:
    """More than one atom from one look at all of them."""

    @pytest.mark.parametrize("model", ["smollm2_dir", "gemma3_dir"])
    def test_residuals_are_as_small_for_a_third_of_the_looks(
        self, model: str, screen: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = embedding(request.getfixturevalue(model))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        atoms, targets = rows[order[:12_000]].float(), rows[order[12_000:12_064]].float()
        looks: list[int] = []
        for screen_class in (FloatScreen, Int8Screen):

            def counted(self: Screen, residuals: torch.Tensor, look: Callable = screen_class.look) -> Look:
                looks.append(len(residuals))
                return look(self, residuals)

            monkeypatch.setattr(screen_class, "look", counted)
        exact = solve_omp(targets, atoms, 64)
        assert sum(looks) == 64 * 64
        looks.clear()
        fast = solve_omp(targets, atoms, 64, scan_every=8)
        assert 64 * 8 < sum(looks) < 64 * 64 / 3
        assert not torch.equal(fast.indices, exact.indices), "the choices are others"
        assert fast.relative_residuals.mean() < 1.015 * exact.relative_residuals.mean()

    def test_a_list_of_all_atoms_is_exact(self, screen: str) -> None:
        atoms, targets = random_rows(SIZE, 40, 70, 2.0), random_rows(30, 40, 71, 2.0)
        exact, fast = solve_omp(targets, atoms, 20), solve_omp(targets, atoms, 20, scan_every=20)
        assert torch.equal(fast.indices, exact.indices)

    def test_a_list_of_copies_is_not_worked_through(self) -> None:
        """Rows of tokens that were never trained differ by noise: of a list full of them one is enough."""
        plain = torch.eye(128)[:100]
        copies = torch.eye(128)[100] + 1e-5 * random_rows(4 * SIZE, 128, 72)
        target = 3 * plain[:32].sum(0) + copies[0] + 0.5 * plain[50:58].sum(0)
        atoms = torch.cat([plain, copies])
        for scan_every in (1, 12):
            codes = solve_omp(target[None], atoms, 41, scan_every=scan_every)
            assert (codes.indices >= 100).sum() == 1
            assert codes.relative_residuals.item() < 0.01

    def test_chunks_and_devices_give_the_same_codes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        atoms, targets = random_rows(2000, 64, 74, 2.0), random_rows(61, 64, 75, 2.0)
        whole = solve_omp(targets, atoms, 40, scan_every=6)
        for chunk, devices in [(1, [CPU]), (7, [CPU]), (61, [CPU] * 3)]:
            force(monkeypatch, None, chunk)
            codes = solve_omp(targets, atoms, 40, scan_every=6, devices=devices)
            assert torch.equal(codes.indices, whole.indices)

    def test_targets_that_end_early_leave_the_others_alone(self, screen: str) -> None:
        atoms = random_rows(500, 64, 76)
        targets = torch.cat([atoms[5:6], random_rows(3, 64, 77), atoms[7:8] + atoms[11:12]])
        together = solve_omp(targets, atoms, 16, scan_every=4)
        alone = [solve_omp(target[None], atoms, 16, scan_every=4).indices[0] for target in targets]
        assert torch.equal(together.indices, torch.stack(alone))
        assert supports(together)[0] == [5]
        assert set(supports(together)[4]) >= {7, 11}


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
    """|⟨r, a⟩| = |⟨r, -a⟩| exactly; the second of the pair is dependent and must not follow the first."""
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


def test_chunks_devices_and_ways_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms, targets = random_rows(2000, 64, 21, 2.0), random_rows(61, 64, 22, 2.0)
    force(monkeypatch, "float32", 61)
    whole = solve_omp(targets, atoms, 40)
    for screen, chunk, devices in [
        (GRAM, 1, [CPU]),
        (GRAM, 13, [CPU] * 3),
        (None, 1, [CPU]),
        (None, 7, [CPU]),
        ("float16", 61, [CPU] * 3),
        ("float32", 64, [CPU] * 2),
    ]:
        monkeypatch.undo()
        force(monkeypatch, screen, chunk)
        codes = solve_omp(targets, atoms, 40, devices=devices)
        assert torch.equal(codes.indices, whole.indices)
        torch.testing.assert_close(codes.coefficients, whole.coefficients, rtol=1e-6, atol=1e-6)


def test_devices_share_the_targets_and_progress_adds_up() -> None:
    finished: list[int] = []
    targets, atoms = random_rows(50, 32, 23), random_rows(200, 32, 24)
    codes = solve_omp(targets, atoms, 4, devices=[CPU] * 3, progress=finished.append)
    assert sum(finished) == 50
    assert len(finished) >= 3
    assert torch.equal(codes.indices, solve_omp(targets, atoms, 4).indices)


def test_threads_of_torch_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    solve_omp(random_rows(50, 32, 23), random_rows(200, 32, 24), 4)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "setting", ["torch.set_float32_matmul_precision('medium')", "torch.backends.cuda.matmul.allow_tf32 = True"]
)
def test_low_precision_settings_of_torch_do_not_reach_the_solver(setting: str) -> None:
    """«medium» computes float32 products in bfloat16 on CPUs that have it.

    A process of its own, and an earlier solve: torch tells no more what it is set to where the settings contradict.
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


def test_out_of_memory_halves_the_chunk(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A fault that is injected: chunks of more than five targets run out of memory."""
    targets, atoms = random_rows(40, 32, 25), random_rows(200, 32, 26)
    expected = solve_omp(targets, atoms, 6)
    honest = device_module.find_supports
    sizes: list[int] = []

    def short_of_memory(rows: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(len(rows))
        if len(rows) > 5:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory (injected)")
        return honest(rows, *rest)

    monkeypatch.setattr(device_module, "find_supports", short_of_memory)
    force(monkeypatch, chunk=40)
    codes = solve_omp(targets, atoms, 6)
    assert torch.equal(codes.indices, expected.indices)
    assert max(sizes) == 40
    assert "Out of memory with 40 targets at a time: going on with 20" in caplog.text


def test_any_device_of_torch_has_a_chunk_size() -> None:
    """mergekit runs on Intel's accelerators too."""
    assert chunk_size(torch.device("xpu"), 2**34, 10_000, 39_237, 576, 64, lanes=1, score_bytes=4) > 400


@pytest.mark.parametrize("targets", [1, 100, 768, 10_000])
@pytest.mark.parametrize("atoms", [500, 39_237, 128_000])
def test_lanes_finish_together_and_scores_stay_in_kept_blocks(targets: int, atoms: int) -> None:
    chunk = chunk_size(CPU, 2**36, targets, atoms, 640, 64, lanes := 2, score_bytes := 2)
    assert chunk * atoms * score_bytes <= KEPT_BLOCK
    assert -(-targets // chunk) % lanes == 0 or targets < lanes
    assert chunk > min(targets / lanes, KEPT_BLOCK / (atoms * score_bytes), 256) / 2


@pytest.mark.parametrize(
    ("atoms", "dim", "k", "mib"), [(20_000, 128, 16, 150), (4_000, 1024, 64, 200), (2_000, 512, 256, 400)]
)
@pytest.mark.parametrize("rows", ["random", "orthogonal"])
@pytest.mark.parametrize("way", ["looks", GRAM])
def test_memory_stays_within_the_budget(atoms: int, dim: int, k: int, mib: int, rows: str, way: str) -> None:
    """Peak resident memory of a process of its own, above what it held before the solve.

    Targets that are orthogonal to all atoms are the worst case: every atom may be the best one.
    """
    if way == GRAM:
        mib += gram_bytes(atoms, dim, 2) // 2**20
    script = f"""
        import torch
        import mergekit_omp.solver.dispatch as device_module
        from benchmarks.memory import peak, start_of_peak
        from mergekit_omp.solver import solve_omp

        device_module.gain_of_gram = lambda *_: {2.0 if way == GRAM else 1.0}
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
    """Every exact score is within its bounds, and the candidates hold the atom with the highest."""
    skip_where_missing(screen)
    atoms, residuals = random_rows(count, dim, seed, 1.0), size * random_rows(9, dim, seed + 1, 1.0)
    atoms[:, seed % dim] *= outlier
    residuals[:3, (seed // 2) % dim] *= outlier
    exact = (residuals.double() @ atoms.double().T).abs()
    look = SCREENS[screen](atoms).look(residuals.clone())
    errors = look.unit[:, None, None] * (look.rounding * look.scores.abs().double() + look.errors[:, None])
    magnitudes = look.unit[:, None, None] * look.scores.abs().double()
    assert sorted(look.order[look.order >= 0].tolist()) == list(range(count))
    within = (exact[:, look.order] - magnitudes).abs() <= errors
    assert within[:, look.order >= 0].all()
    for most in (10**6, 150, 1):
        pairs: list[tuple[int, int]] = []
        for some, rows, found in look.candidates(most):
            assert set(rows.tolist()) == set(range(some.stop - some.start)), "each residual has a candidate"
            assert len(rows) <= most or some.stop - some.start == 1
            pairs += zip((rows + some.start).tolist(), found.tolist(), strict=True)
        assert len(set(pairs)) == len(pairs)
        assert set(zip(range(9), exact.argmax(1).tolist(), strict=True)) <= set(pairs)
        if most == 10**6:
            expected = pairs
        assert pairs == expected


def test_screen_of_a_cpu_without_fast_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "is_supported", lambda: False)
    screen = device_module._screen(random_rows(10, 8, 34))
    assert isinstance(screen, FloatScreen)
    assert screen.low.dtype == torch.float32


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
    scan_every=st.integers(1, 9),
)
def test_properties_of_every_solution(count: int, dim: int, k: int, seed: int, common: float, scan_every: int) -> None:
    """At most k distinct atoms; the residual is orthogonal to them; more atoms never make it larger."""
    atoms, targets = random_rows(count, dim, seed, common), random_rows(7, dim, seed + 1, common)
    codes = solve_omp(targets, atoms, k, scan_every=scan_every)
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


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 700),
    dim=st.integers(1, 60),
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1e-12, 1.0, 1e12]),
)
def test_gram_is_the_matrix_of_cosines(count: int, dim: int, seed: int, size: float) -> None:
    """Within half a unit and the rounding of the product, with zeros for zero atoms and where there is none."""
    atoms = size * random_rows(count, dim, seed, 1.0)
    atoms[seed % count] = 0
    unit = torch.nn.functional.normalize(atoms.double() / size)
    atoms[seed % count, 0] = 1e-40  # as good as none
    matrix = Gram(atoms, lanes=2)
    cosines = torch.from_numpy(matrix.cosines).double() / gram.UNIT
    error = (cosines[:, :count] - unit @ unit.T).abs().max().item()
    assert error <= 0.5 / gram.UNIT + (dim + 16) * 2**-24
    assert (cosines[:, count:] == 0).all()
    inner = matrix.inner(torch.nn.functional.normalize(random_rows(3, dim, seed + 1)))
    assert inner.shape == (3, gram.padded(count))
    assert (inner[:, count:] == 0).all()


@pytest.mark.parametrize("listed", [1, 200])
@pytest.mark.parametrize("steps", [1, 2, 8, 30])
def test_what_was_speculated_is_verified(steps: int, listed: int) -> None:
    """With a shortlist too short to hold what OMP takes, most steps are undone, and the answer is the same."""
    atoms, targets = random_rows(3000, 96, 80, 1.0), random_rows(12, 96, 81, 1.0)
    expected = [reference_omp(x, atoms.double().numpy(), 24) for x in targets.double().numpy()]
    support, _, _ = speculation.solve(targets, Gram(atoms, lanes=1), 24, ahead=steps, listed=listed)
    assert support.tolist() == expected


def test_without_numba_or_room_all_atoms_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (10_000, 30_000, 576, 64)
    assert device_module.gain_of_gram(CPU, *shape) > 1
    assert GRAM_CHUNK / 2 < gram_chunk_size(2**33, *shape, lanes=2) <= GRAM_CHUNK
    assert gram_chunk_size(2**33, 100, *shape[1:], lanes=4) == 25
    assert gram_chunk_size(2**30, *shape, lanes=2) == 0
    monkeypatch.setattr(gram, "is_supported", lambda: False)
    assert device_module.gain_of_gram(CPU, *shape) == 1


def test_a_kernel_that_does_not_compile_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault that is injected: Triton is there, and finds no C compiler."""

    def take(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler. (injected)")

    name = "mergekit_omp.solver.scan.gpu_kernel"
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(take=take))
    monkeypatch.setattr(sys.modules[name.rpartition(".")[0]], "projection_kernel", sys.modules[name], raising=False)
    assert projection.find_kernel.__wrapped__(CPU) is None
    assert "a fifth longer" in caplog.text
    assert "C compiler" in caplog.text


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), chunk=st.integers(1, 20), screen=st.sampled_from([None, *SCREENS, GRAM]))
def test_order_of_atoms_and_chunks_do_not_matter(seed: int, chunk: int, screen: str | None) -> None:
    atoms, targets = random_rows(300, 32, seed, 1.0), random_rows(20, 32, seed + 1, 1.0)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        force(patch, screen, chunk)
        shuffled = solve_omp(targets, atoms[order], 12)
    assert torch.equal(order[shuffled.indices], solve_omp(targets, atoms, 12).indices)
