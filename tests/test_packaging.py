"""The wheel: built once, installed into an empty environment, and used from there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (
    *("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"),
    *("gpupipe", "kernels", "models", "benchmarks", "tests", "docs"),
)
PACKAGE_DIRS = {
    "gpupipe": "gpupipe",
    "kernels": "gpupipe/kernels",
    "models": "gpupipe/models",
    "benchmarks": "gpupipe/benchmarks",
}


def run(*command: str | Path, cwd: Path) -> str:
    """The command's standard output; fails with all of its output if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged: with a build folder in the repository, deleted files would get into the wheel."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def files(source: Path) -> set[str]:
    """The names that the packages' files should have in the wheel, listed before the build adds files.

    Of the benchmarks only the code: recorded rows and the script of a GPU session stay in the repository.
    """
    return {
        f"{package}/{path.relative_to(source / folder).as_posix()}"
        for folder, package in PACKAGE_DIRS.items()
        for path in (source / folder).rglob("*")
        if path.is_file() and (folder != "benchmarks" or path.suffix == ".py")
    }


@pytest.fixture(scope="module")
def wheel(source: Path, files: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline, with the installed setuptools."""
    for needed in ("pip", "setuptools"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    output = tmp_path_factory.mktemp("wheel")
    command = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(sys.executable, *command, "--wheel-dir", output, source, cwd=output)
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel in it; dependencies are found last, by a path file.

    A ``.pth`` file puts this environment's packages after the new one's own. The ``.pth`` files among those are not
    followed, so an editable gpupipe is not found.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    # Python 3.10 has no scheme of that name.
    scheme = "venv" if "venv" in sysconfig.get_scheme_names() else sysconfig.get_default_scheme()
    scripts = Path(sysconfig.get_path("scripts", scheme, vars={"base": str(folder)}))
    interpreter = scripts / Path(sys.executable).name
    site = Path(sysconfig.get_path("purelib", scheme, vars={"base": str(folder)}))
    command = ("-m", "pip", "--quiet", "--python", interpreter, "install", "--no-deps", "--no-index")
    run(sys.executable, *command, wheel, cwd=folder)
    here = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in here))
    return interpreter


def test_wheel_holds_every_file_of_the_packages(wheel: Path, files: set[str]) -> None:
    """If pyproject.toml forgot a package or data, only users would notice."""
    assert "gpupipe/kernels/__init__.py" in files
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert sorted(files - names) == [], "not in the wheel; see tool.setuptools in pyproject.toml"
    assert sorted(names - files) == [], "only in the wheel"


def test_source_distribution_holds_the_repository(source: Path, wheel: Path, tmp_path: Path) -> None:
    """With what its tests and its README need."""
    expected = {path.relative_to(source).as_posix() for name in SOURCES for path in _files_under(source / name)}
    build = f"import setuptools.build_meta as backend; print(backend.build_sdist({str(tmp_path)!r}))"
    *_, name = run(sys.executable, "-c", build, cwd=source).splitlines()
    with tarfile.open(tmp_path / name) as archive:
        found = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {"tests/conftest.py", "benchmarks/gpu_session.sh", "docs/performance.md"} <= expected
    assert sorted(expected - found) == [], "see MANIFEST.in"


def _files_under(path: Path) -> list[Path]:
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def test_wheel_claims_one_top_level_name(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gpupipe"}


def test_network_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(
        "import torch, gpupipe, gpupipe.kernels, gpupipe.models\n"
        "print(gpupipe.__file__, gpupipe.kernels.__file__, gpupipe.models.__file__, sep='\\n')\n"
        "network = gpupipe.models.UNet328(width=0.125).eval()\n"
        "print(*network(torch.zeros(1, 6, 320, 320), torch.zeros(1, 32, 16, 16)).shape)\n"
    )
    *paths, shape = run(python, "use.py", cwd=tmp_path).splitlines()
    environment = python.parent.parent
    assert [Path(path).relative_to(environment).parts[-2:] for path in paths] == [
        ("gpupipe", "__init__.py"),
        ("kernels", "__init__.py"),
        ("models", "__init__.py"),
    ]
    assert shape == "1 3 320 320"


def test_console_command_is_installed_and_answers(python: Path, tmp_path: Path) -> None:
    command = python.parent / ("gpupipe.exe" if os.name == "nt" else "gpupipe")
    assert command.is_file()
    said = run(command, "--help", cwd=tmp_path)
    for name in ("render", "demo", "doctor"):
        assert name in said


def test_package_in_the_repository_does_not_hold_itself_without_end(python: Path, source: Path) -> None:
    walk = "import gpupipe, pkgutil; found = pkgutil.walk_packages(gpupipe.__path__, 'gpupipe.', lambda name: None)"
    names = run(python, "-c", f"{walk}; print(*(module.name for module in found))", cwd=source).split()
    assert "gpupipe.kernels.cubic" in names
    assert not any("gpupipe.gpupipe.gpupipe" in name for name in names)


def test_package_runs_where_the_repository_is_the_current_folder(python: Path, source: Path) -> None:
    """Its folder gpupipe/ is found before the installed package, and lacks what lies beside it there."""
    assert run(python, "-m", "gpupipe", "--version", cwd=source).strip()
    told = "import gpupipe.kernels, gpupipe.models; print(gpupipe.kernels.__file__, gpupipe.models.__file__)"
    kernels, models = run(python, "-c", told, cwd=source).split()
    assert (Path(kernels).parent, Path(models).parent) == (source / "kernels", source / "models")
