"""Compare the solver with other implementations of OMP, and measure how its time scales.

``python -m benchmarks.solver`` writes benchmarks/solver.md, which takes hours; ``-k`` and ``--tables`` select parts.
With ``--growth benchmarks/growth.png`` it plots the scaling instead. Needs the ``test`` extra and matplotlib;
orthogonal-matching-pursuit-gpu is measured if installed. On a CPU every measurement runs in its own process, for its
peak memory.
"""

import argparse
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.memory import peak, start_of_peak

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "examples"))

FEW_ATOMS = 8_000
"""Atoms of the second table, for which methods with a float32 Gram matrix fit into memory."""

BATCH = 512
"""Targets of batch_omp: mergekit's batch size, or a quarter of it at k = 256."""

PAIR = 10_000
"""Targets of this package's solver, whose set-up time is shared by all targets of a pair: as many as the smallest real
pair has, or a tenth of that at k = 256."""

MANY = 60_000
"""Targets of this package's solver for synthetic rows on a GPU, as for Llama 3's tokenizer and Mistral NeMo."""

GEMM_ROWS = {"cpu": 192, "cuda": 4096}
"""Rows of the plain products: about the chunk size of this package's solver."""

CHECKED = 4
"""Targets that are solved again in float64 for each row of the table."""

HEAD = """# The solver against other implementations

Written by `python -m benchmarks.solver{options}` on {machine}.

SmolLM2 (d = 576) and Gemma-3-270M (d = 640) are real embedding rows, split at random into atoms and targets.
*Synthetic* rows have the shape of larger models: Gaussian with a spectrum that decays as 1/√i, and a common direction,
rounded to bfloat16 as checkpoints are. There are as many atoms as real pairs have (SmolLM2 with Gemma's tokenizer
39,237, Llama 3's tokenizer and Mistral NeMo about 70,000), or {atoms:,} in a table of its own, so that methods that
hold a float32 Gram matrix of all atoms can take part. What is scaled down is the number of targets (a real pair has
10,000 to 200,000; Llama 3's tokenizer and Mistral NeMo 60,000); for each method it is in its column. Times are per
target, and include the set-up of each method (copies, Gram matrix, rounded atoms), except for the GEMMs.

- *forecast*: milliseconds per target that `mergekit-omp inspect` expects of ours.
- *ratio*: time per target of `batch_omp` divided by that of the row.
- *peak*: peak memory in addition to the data, resident on a CPU, allocated on a GPU. Ours uses up to 60 % of the free
  memory for a Gram matrix, or on a GPU for large chunks of targets; `memory_budget` limits it. With less memory, every
  step scans all atoms, as on a GPU, and chunks of targets are smaller.
- *same support*: share of the targets (those solved by both) whose set of atoms is `batch_omp`'s.
- *as float64*: of {checked} targets, those on which the two differ first, how many supports are those of a plain
  float64 OMP. Sometimes only the last digits of float32 distinguish two atoms; ours decides such choices in float64.
- *residual*: mean ‖x - x̂‖ / ‖x‖ over the targets that `batch_omp` solved too (its own in its line).
- `k GEMMs`: k plain products (targets, d) × (d, atoms) in the dtype of our scan (float16 on a GPU, float32 on this
  CPU): the limit of any method that multiplies all atoms with the residual at each step. Ours is faster where it has a
  Gram matrix. Not measured on the CPU at k = 256, where it is four times that of k = 64.

`batch_omp` is mergekit's (`mergekit.tokensurgeon.omp`), with one batch, of the 512 targets that mergekit takes at a
time (on the CPU at k = 256 a quarter of that). `omp-gpu` is
`orthogonal-matching-pursuit-gpu` {omp_gpu}; it assumes normalised atoms, so its supports differ. `sklearn` is
`sklearn.linear_model.orthogonal_mp_gram`.
"""


@dataclass(frozen=True)
class Case:
    """One problem."""

    rows: str  # "smollm2", "gemma3" or "synthetic"
    dim: int
    atoms: int
    k: int
    targets: int
    device: str = "cpu"


@dataclass
class Result:
    """Result of a method for a case; ``indices`` (B, k) are on the CPU, ``forecast`` are seconds."""

    seconds: float
    peak: int
    targets: int
    forecast: float | None = None
    indices: Tensor | None = None
    residual: Tensor | None = None
    error: str = ""


def load(case: Case) -> tuple[Tensor, Tensor]:
    """Load atoms (N, d) and targets (B, d) in float32; the first targets do not depend on their number."""
    draw = torch.Generator().manual_seed(0)
    if case.rows == "synthetic":
        spectrum = torch.arange(1, case.dim + 1).rsqrt()
        common = torch.randn(case.dim, generator=draw) * spectrum
        atoms = torch.randn(case.atoms, case.dim, generator=draw) * spectrum + common
        targets = torch.randn(case.targets, case.dim, generator=draw) * spectrum + common
        return atoms.bfloat16().float(), targets.bfloat16().float()
    import real_weights

    (path,) = real_weights.checkpoint(case.rows).glob("*.safetensors")
    with safe_open(path, "pt") as weights:
        rows = weights.get_tensor("model.embed_tokens.weight")
    order = torch.randperm(len(rows), generator=draw)[: case.atoms + case.targets]
    chosen = rows[order].float()
    return chosen[: case.atoms].clone(), chosen[case.atoms :].clone()


def problem(case: Case) -> tuple[Tensor, Tensor]:
    """Load atoms (N, d) and targets (B, d) to the device of a case, with a cache on a GPU."""
    if case.device == "cpu":
        return load(case)
    atoms, targets = _on_gpu(replace(case, k=0, targets=MANY if case.rows == "synthetic" else PAIR))
    return atoms, targets[: case.targets]


@lru_cache(maxsize=4)
def _on_gpu(case: Case) -> tuple[Tensor, Tensor]:
    atoms, targets = load(case)
    return atoms.to(case.device), targets.to(case.device)


def ours(atoms: Tensor, targets: Tensor, k: int) -> Tensor:
    """Run this package's solver."""
    from mergekit_omp.solver import solve_omp

    return solve_omp(targets, atoms, k).indices


def batch_omp(atoms: Tensor, targets: Tensor, k: int) -> Tensor:
    """Run mergekit's solver."""
    from mergekit.tokensurgeon.omp import batch_omp as solve_batch

    return torch.cat([solve_batch(batch, atoms, k)[0] for batch in targets.split(512)])


def sklearn(atoms: Tensor, targets: Tensor, k: int) -> Tensor:
    """Run scikit-learn's solver with a Gram matrix."""
    from sklearn.linear_model import orthogonal_mp_gram

    gram, inner = (atoms @ atoms.T).numpy(), (atoms @ targets.T).numpy()
    return _dense_to_indices(torch.from_numpy(orthogonal_mp_gram(gram, inner, n_nonzero_coefs=k)).T, k)


def omp_gpu(atoms: Tensor, targets: Tensor, k: int) -> Tensor:
    """Run orthogonal-matching-pursuit-gpu."""
    from orthogonal_matching_pursuit_gpu import run_omp

    return _dense_to_indices(run_omp(atoms.T.contiguous(), targets, k, normalize=False, fit_intercept=False), k)


def gemms(atoms: Tensor, targets: Tensor, k: int) -> Callable[[], Tensor]:
    """Prepare a function that computes only k plain products."""
    from mergekit_omp.solver.dispatch import scan_dtype
    from mergekit_omp.solver.scan.screening import Screen

    screen = Screen(atoms, atoms.norm(dim=1), scan_dtype(atoms.device))
    left, rows_per_product = targets.to(screen.rounded.dtype), GEMM_ROWS[atoms.device.type]

    def run() -> Tensor:
        for rows in left.split(rows_per_product):
            for _ in range(k):
                rows @ screen.rounded.T
        return torch.empty(0)

    left[:rows_per_product] @ screen.rounded.T
    return run


def _dense_to_indices(coefficients: Tensor, k: int) -> Tensor:
    return torch.as_tensor(coefficients).abs().topk(k, dim=1).indices.cpu()


def without_setup(
    solve: Callable[[Tensor, Tensor, int], Tensor],
) -> Callable[[Tensor, Tensor, int], Callable[[], Tensor]]:
    """Wrap a solver whose set-up is part of the measurement."""
    return lambda atoms, targets, k: partial(solve, atoms, targets, k)


METHODS: dict[str, Callable[[Tensor, Tensor, int], Callable[[], Tensor]]] = {
    "batch_omp": without_setup(batch_omp),
    "ours": without_setup(ours),
    "k GEMMs": gemms,
    "omp-gpu": without_setup(omp_gpu),
    "sklearn": without_setup(sklearn),
}


def measure(method: str, case: Case) -> Result:
    """Measure one method in this process."""
    from mergekit_omp.report.forecast import Solve, timed
    from mergekit_omp.solver.dispatch import load_gram_search
    from mergekit_omp.solver.least_squares import fit_supports

    atoms, targets = problem(case)
    on_gpu = case.device != "cpu"
    METHODS[method](atoms[:64], targets[:2], 2)()  # imports, and one-time set-up of libraries
    if not on_gpu and (search := load_gram_search()) is not None:
        from mergekit_omp.solver.gram.matrix import build_gram

        gram = build_gram(atoms[:64], atoms[:64].norm(dim=1), threads=1, half=False)
        search.solve_by_gram(targets[:2], gram, 2, slots=2, threads=1)  # numba compiles once per installation
    run = METHODS[method](atoms, targets, case.k)
    before = start_of_peak(on_gpu)
    start = time.perf_counter()
    try:
        indices = run()
    except Exception as error:
        return Result(0, 0, 0, error=f"did not run: {type(error).__name__}: {error}".splitlines()[0][:90])
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    result = Result(seconds, peak(on_gpu) - before, len(targets))
    if method == "ours":
        solve = Solve("donor", "base", 1, len(targets), len(atoms), case.dim, case.k)
        result.forecast = timed(solve, case.device).seconds
    if indices.numel():
        result.indices = indices.cpu()
        few = targets[:512]
        parts = [
            fit_supports(x, atoms, i)[1]
            for x, i in zip(few.split(16), indices[:512].to(few.device).split(16), strict=True)
        ]
        result.residual = torch.cat(parts).cpu()
    return result


def float64_supports(case: Case, indices: list[int]) -> list[set[int]]:
    """Solve some targets with a plain float64 OMP and return their supports."""
    atoms, targets = problem(case)
    atoms, targets = atoms.double(), targets[indices].double()
    supports: list[list[int]] = [[] for _ in indices]
    bases = [targets[:0] for _ in indices]
    residuals = targets.clone()
    for _ in range(case.k):
        for target, atom in enumerate((residuals @ atoms.T).abs().argmax(1).tolist()):
            supports[target].append(atom)
            direction, basis = atoms[atom], bases[target]
            for _ in range(2):
                direction = direction - basis.T @ (basis @ direction)
            bases[target] = basis = torch.cat([basis, direction[None] / direction.norm()])
            residuals[target] = targets[target] - basis.T @ (basis @ targets[target])
    return [set(support) for support in supports]


def measure_and_report(method: str, case: Case) -> Result:
    """Measure one method, and print its time."""
    print(f"{method}: {case}", file=sys.stderr, flush=True)
    result = runner(case)(measure, method, case)
    print(f"  {result.seconds:.2f} s {result.error}", file=sys.stderr, flush=True)
    return result


def runner(case: Case) -> Callable[..., Any]:
    """Return how to call a function for a case: in a new process, or in this one for a GPU.

    On a GPU torch counts allocated memory, and the rows stay on the device.
    """
    return in_a_process if case.device == "cpu" else lambda function, *arguments: function(*arguments)


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "safetensors"])
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def cases(device: str, sparsities: Sequence[int]) -> list[Case]:
    """Return the cases with as many atoms as real pairs have."""
    shapes = [
        ("smollm2", 576, 39_237),
        ("gemma3", 640, 70_000),
        ("synthetic", 2048, 70_000),
        ("synthetic", 4096, 70_000),
    ]
    return [Case(rows, dim, atoms, k, 0, device) for k in sparsities for rows, dim, atoms in shapes]


def table(grid: list[Case], methods: Iterable[str]) -> Iterator[str]:
    """Yield a row for each case and method as soon as it is measured."""
    yield (
        "| rows | d | atoms | k | method | targets | ms per target | forecast | ratio | peak MiB | same support "
        "| as float64 | residual |"
    )
    yield "|" + 13 * "---|"
    for case in grid:
        on_gpu = case.device != "cpu"
        many, few = (PAIR, BATCH) if on_gpu or case.k < 256 else (PAIR // 10, BATCH // 4)
        if on_gpu and case.rows == "synthetic" and case.k < 256:
            many = MANY
        counts = {
            "ours": many,
            "k GEMMs": GEMM_ROWS[case.device] * max(1, 64 // case.k),
            "omp-gpu": 64,
            "sklearn": 4,
        }
        # k GEMMs take k times as long as one: minutes at k = 256, without new information.
        results = {
            method: measure_and_report(method, replace(case, targets=counts.get(method, few)))
            for method in methods
            if not (method == "k GEMMs" and case.k == 256 and not on_gpu)
        }
        checked = _check(replace(case, targets=few), results["batch_omp"], results["ours"])
        for method, result in results.items():
            yield _row(case, method, result, results["batch_omp"], checked.get(method, ""))


def _check(case: Case, reference: Result, result: Result) -> dict[str, str]:
    """Count the supports that equal those of float64, among the first targets that differ and the first targets."""
    if reference.indices is None or result.indices is None:
        return {}
    supports = {"batch_omp": reference.indices[: case.targets], "ours": result.indices[: case.targets]}
    differ = (
        (supports["batch_omp"].sort(1).values != supports["ours"].sort(1).values).any(1).nonzero().flatten().tolist()
    )
    checked = list(dict.fromkeys([*differ[: CHECKED - 1], *range(CHECKED)]))[:CHECKED]
    exact = runner(case)(float64_supports, case, checked)
    return {
        method: f"{sum(set(found[i].tolist()) == right for i, right in zip(checked, exact, strict=True))} of {CHECKED}"
        for method, found in supports.items()
    }


def _row(case: Case, method: str, result: Result, reference: Result, checked: str) -> str:
    head = f"| {case.rows} | {case.dim} | {case.atoms:,} | {case.k} | {method}"
    if result.error:
        return f"{head} | {result.error} | | | | | | | |"
    per_target = result.seconds / result.targets
    ratio = reference.seconds / reference.targets / per_target
    same, residual = "", ""
    if result.indices is not None and reference.indices is not None:
        shared = min(result.targets, reference.targets, 512)
        equal = result.indices[:shared].sort(1).values == reference.indices[:shared].sort(1).values
        same = f"{100 * equal.all(1).float().mean():.1f} %"
        residual = f"{result.residual[:shared].mean():.6f}"
    bold, digits = "**" if method == "ours" else "", 2 if per_target > 1e-3 else 4
    forecast = "" if result.forecast is None else f"{1000 * result.forecast / result.targets:.{digits}f}"
    return (
        f"{head} | {result.targets} | {1000 * per_target:.{digits}f} | {forecast} "
        f"| {bold}{ratio:.1f}×{bold} | {result.peak / 2**20:,.0f} | {same} | {checked} | {residual} |"
    )


def growth(path: Path, device: str) -> None:
    """Plot time against targets, atoms, d and k, each with the others fixed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    base = Case("synthetic", 1024, 16_000, 64, 4096, device)
    axes_of = {
        "targets": [1024, 2048, 4096, 8192, 16_384],
        "atoms": [4000, 8000, 16_000, 32_000],
        "dim": [512, 1024, 2048, 4096],
        "k": [16, 32, 64, 128],
    }
    names = {"targets": "targets", "atoms": "atoms", "dim": "dimensions d", "k": "sparsity k"}
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.6), sharey=True, layout="constrained")
    for panel, (field, values) in zip(panels, axes_of.items(), strict=True):
        seconds = [measure_and_report("ours", replace(base, **{field: value})).seconds for value in values]
        panel.loglog(values, seconds, "o-", label="measured")
        panel.loglog(values, [seconds[0] * value / values[0] for value in values], "--", color="grey", label="linear")
        panel.set_xlabel(names[field])
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds")
    panels[0].legend()
    shape = f"{base.targets} targets, {base.atoms:,} atoms, d = {base.dim}, k = {base.k}"
    figure.suptitle(f"solve_omp on {device}: {shape}; one of them varied")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Write the tables or draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--growth", type=Path, help="plot the scaling to this file instead of writing tables")
    parser.add_argument("--device", default="cpu", help="device of the scaling plot")
    parser.add_argument("-k", type=int, nargs="+", default=[64, 8, 256], help="sparsities to measure")
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=["real", "few", "gpu"],
        default=["real", "few", *(["gpu"] if torch.cuda.is_available() else [])],
        help="real: atoms of real pairs, at each -k; few: few atoms, at k = 64; gpu: as real, on a GPU",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the process of a measurement, too
    if options.growth:
        growth(options.growth, options.device)
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        omp_gpu_version = version("orthogonal-matching-pursuit-gpu")
    except PackageNotFoundError:
        omp_gpu_version = "(not installed)"
    machine = f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    sides = ["batch_omp", "ours", "k GEMMs"]
    head = HEAD.format(
        options="".join(f" {word}" for word in sys.argv[1:]),
        machine=machine,
        atoms=FEW_ATOMS,
        omp_gpu=omp_gpu_version,
        checked=CHECKED,
    )
    parts = []
    if "real" in options.tables:
        parts.append(("With as many atoms as real pairs have:\n", cases("cpu", options.k), sides))
    if "few" in options.tables:
        small = [replace(case, atoms=FEW_ATOMS) for case in cases("cpu", [64])]
        parts.append((f"With {FEW_ATOMS:,} atoms:\n", small, list(METHODS)))
    if "gpu" in options.tables:
        title = f"On one {torch.cuda.get_device_name()}, torch {torch.__version__}:\n"
        parts.append((title, cases("cuda", options.k), sides))
    with (HERE / "solver.md").open("w") as page:
        print(head, end="", file=page)
        for title, grid, methods in parts:
            print("\n" + title, file=page)
            for line in table(grid, methods):
                print(line, file=page, flush=True)


if __name__ == "__main__":
    main()
