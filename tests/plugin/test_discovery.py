"""Test that mergekit finds the package after ``pip install``, and that the package never breaks an environment."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.network  # pip builds the package in an environment of its own

PROJECT = Path(__file__).parents[2]
OURS = ("mergekit_omp", "_mergekit_omp", "_editable_impl_mergekit_omp")


class Environment:
    """A virtual environment with all packages of this one except this package."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site_packages = Path(self._run(["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith(OURS):
                (self.site_packages / entry.name).symlink_to(entry)

    def pip(self, *arguments: str) -> str:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "--disable-pip-version-check",
            *arguments,
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=PROJECT).stdout

    def run(self, code: str, *options: str) -> str:
        return self._run([*options, "-c", code]).strip()

    def _run(self, arguments: list[str]) -> str:
        # From the root, so that the project is not found as the current folder.
        result = subprocess.run([self.python, *arguments], capture_output=True, text=True, cwd="/")
        assert result.returncode == 0, result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("environment"))
    environment.pip("install", "--no-deps", ".")
    return environment


KNOWS_OMP = "from mergekit import merge_methods as m; assert m.get('omp').spec.name == 'omp'; m.get('omp_slerp')"
WRAPPED = "import mergekit.merge, mergekit.plan; "
WRAPPED += "assert hasattr(mergekit.merge.run_merge, '__wrapped__'); "
WRAPPED += "assert hasattr(mergekit.plan.MergePlanner._plan, '__wrapped__')"


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        "import mergekit.merge_methods",
        "from mergekit.merge_methods import registry",
        "from mergekit.plan import MergePlanner; assert hasattr(MergePlanner._plan, '__wrapped__')",
        "from mergekit.merge import run_merge; assert hasattr(run_merge, '__wrapped__')",
        "import mergekit.scripts.run_yaml as r; assert hasattr(r.run_merge, '__wrapped__')",
        "from mergekit_omp.plugin.merge_methods import RealignedMerge",
        "import mergekit.scripts.multimerge as r; assert hasattr(r.run_merge, '__wrapped__')",
    ],
)
def test_known_whatever_is_imported_first(environment: Environment, first: str) -> None:
    environment.run(f"{first}; {KNOWS_OMP}; {WRAPPED}")


def test_known_after_an_editable_install(tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.pip("install", "--no-deps", "-e", ".")
    environment.run(f"{KNOWS_OMP}; {WRAPPED}")


def test_registering_by_hand(environment: Environment) -> None:
    """Check that one call is enough without torch's autoload, and that a second call has no effect."""
    by_hand = "import mergekit_omp; mergekit_omp.register(); mergekit_omp.register()"
    autoload_off = "import os; os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'"
    environment.run(f"{autoload_off}; from mergekit.merge import run_merge; {by_hand}; {KNOWS_OMP}; {WRAPPED}")
    environment.run(f"{autoload_off}; {by_hand}; {KNOWS_OMP}; {WRAPPED}")
    environment.run(f"import torch; {by_hand}; {KNOWS_OMP}; {WRAPPED}")


def test_importing_torch_imports_no_other_package(environment: Environment) -> None:
    heavy = "[name for name in ('mergekit', 'transformers', 'pydantic', 'wrapt') if name in sys.modules]"
    assert environment.run(f"import sys, torch; print({heavy})") == "[]"


def test_the_cost_at_import_is_below_five_milliseconds(environment: Environment) -> None:
    """Check the CPU time of the fastest of ten: other processes slow all of them down."""
    code = """
import sys, time, torch
def cost():
    for name in [name for name in sys.modules if name.partition('.')[0] == 'mergekit_omp']:
        del sys.modules[name]
    started = time.process_time()
    from mergekit_omp.plugin.autoload import on_torch_import
    on_torch_import()
    return time.process_time() - started
print(min(cost() for _ in range(10)))
"""
    assert float(environment.run(code)) < 0.005


@pytest.mark.parametrize("broken", ["wrapt", "mergekit", "pydantic"])
def test_broken_dependency_never_breaks_torch(environment: Environment, tmp_path: Path, broken: str) -> None:
    (tmp_path / f"{broken}.py").write_text("raise ImportError('broken')")
    environment.run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch; torch.zeros(1)")


def test_another_mergekit_is_reported(environment: Environment) -> None:
    """Check that a missing internal name rejects recipes of this package only."""
    code = (
        "import mergekit.plan, mergekit.merge, mergekit.config as c, mergekit.options as o; "
        "del mergekit.plan.MergePlanner.plan_to_disk; "
        "config = lambda method: c.MergeConfiguration(merge_method=method, models=[{'model': '/none'}])\n"
        "try: mergekit.merge.run_merge(config('omp'), '/tmp/none', o.MergeOptions())\n"
        "except ValueError as error: print(error)"
    )
    assert "omp works with mergekit>=0.1.5,<0.2, but mergekit 0.1.5 is installed" in environment.run(code)


def test_uninstalling_leaves_nothing(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    before = {path for path in environment.site_packages.iterdir() if path.name != "__pycache__"}
    environment.pip("install", "--no-deps", ".")
    assert environment.run(f"{KNOWS_OMP}; print('known')") == "known"
    environment.pip("uninstall", "--yes", "mergekit-omp")
    assert {path for path in environment.site_packages.iterdir() if path.name != "__pycache__"} == before
    code = (
        "import torch; from mergekit import merge_methods as m; print([s.spec.name for s in m.registered_methods()])"
    )
    assert "omp" not in environment.run(code)
    shutil.rmtree(tmp_path / "environment")
