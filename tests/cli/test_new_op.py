"""`heedful new-op`: what it refuses, what it writes, and that this builds and passes its tests."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from typer.testing import CliRunner

from heedful.cli import app, new_operation
from heedful.cli.new_operation import FILES, LISTS

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/native"
pytestmark = pytest.mark.skipif(not (ROOT / "engine/ops").exists(), reason="runs in a source tree only")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources that the command looks at, and that its files need to be built and tested."""
    for name in ("engine", "bridge", "tests", "src"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("_engine", "__pycache__"))
    for name in ("CMakeLists.txt", "pyproject.toml", ".clang-format"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def invoke(name, directory):
    return CliRunner(env={"COLUMNS": "400"}).invoke(app, ["new-op", name, "--directory", str(directory)])


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Demo", "is no name"),
        ("demo-op", "is no name"),
        ("demo__op", "is no name"),
        ("_demo", "is no name"),
        ("1demo", "is no name"),
        ("../demo", "is no name"),
        ("d" * 33, "is no name"),
        ("lambda", "is a keyword of Python or C++"),
        ("match", "is a keyword of Python or C++"),
        ("template", "is a keyword of Python or C++"),
        ("tensor_bytes", "is taken"),
        ("torch", "is taken"),
        ("real", "is taken"),
        ("attention_forward", "is taken"),
        ("catalogue", "_catalogue.py exists"),
        ("parametric_swish", "exists"),
        ("masks", "exists"),
    ],
)
def test_bad_names_are_refused_before_anything_is_written(checkout, name, text):
    before = contents(checkout)
    done = invoke(name, checkout)
    assert done.exit_code == 2
    assert text in done.output
    assert contents(checkout) == before


@pytest.mark.parametrize("path", [path.format(name="demo_op") for path in FILES.values()])
def test_no_file_is_overwritten(checkout, path):
    (checkout / path).write_text("mine")
    before = contents(checkout)
    done = invoke("demo_op", checkout)
    assert done.exit_code == 2
    assert f"{path} exists" in done.output
    assert contents(checkout) == before


def test_a_directory_that_is_no_checkout(tmp_path):
    done = invoke("demo_op", tmp_path)
    assert done.exit_code == 2
    assert "is no checkout of heedful's repository: there is no CMakeLists.txt" in done.output
    assert not list(tmp_path.iterdir())


def test_lists_of_another_form(checkout):
    path = checkout / LISTS[0]
    path.write_text(path.read_text().replace("_HOME = {", "_ELSEWHERE = {"))
    before = contents(checkout)
    done = invoke("demo_op", checkout)
    assert done.exit_code == 2
    assert "has no place for a line of demo_op: no _HOME" in done.output
    assert contents(checkout) == before


def test_nothing_stays_half_written(checkout, monkeypatch):
    before = contents(checkout)
    write_text = Path.write_text

    def fail_once(path, text, **options):
        if path.name == "__init__.py" and path.parent.name == "nn" and "DemoOp" in text:
            raise OSError("no space left on device")
        return write_text(path, text, **options)

    monkeypatch.setattr(Path, "write_text", fail_once)
    with pytest.raises(OSError, match="no space left"):
        new_operation.write_operation("demo_op", checkout)
    assert contents(checkout) == before


@pytest.mark.parametrize("name", ["x2", "demo_op", "a_name_as_long_as_names_can_be_z"])
def test_what_is_written_is_formatted(checkout, name):
    before = contents(checkout)
    assert invoke(name, checkout).exit_code == 0
    written = {path for path, text in contents(checkout).items() if before.get(path) != text}
    assert written == {checkout / path.format(name=name) for path in (*FILES.values(), *LISTS)}
    assert not any(
        "@" in path.read_text().replace("@fake", "").replace("@static", "") for path in written - set(before)
    )
    programs = Path(sys.executable).parent
    python = [path for path in written if path.suffix == ".py"]
    for command in (["ruff", "check"], ["ruff", "format", "--check"]):
        subprocess.run([programs / command[0], *command[1:], *python], cwd=checkout, check=True)
    cpp = [path for path in written if path.suffix != ".py"]
    subprocess.run([programs / "clang-format", "--dry-run", "-Werror", *cpp], cwd=checkout, check=True)


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.skipif(not (BUILD / "build.ninja").exists(), reason="links with the objects of make build; there are none")
def test_what_is_written_builds_and_passes_its_tests(checkout):
    """Only its own sources are compiled, as CMake finds them; the rest is linked from this checkout's build."""
    assert invoke("demo_op", checkout).exit_code == 0
    programs = Path(sys.executable).parent
    ninja, build = str(programs / "ninja"), checkout / "build"
    configure = [programs / "cmake", "-S", checkout, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run([*configure, "-DBUILD_TESTING=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"])
    targets = run([ninja, "-C", build, "-t", "targets", "all"]).splitlines()
    objects = [line.partition(":")[0] for line in targets if "ops/demo_op.cpp.o:" in line]
    assert len([name for name in objects if "_ops.dir" in name]) >= 2
    run([ninja, "-C", build, *objects])

    engine = checkout / "src/heedful/_engine"
    engine.mkdir()
    for library in ("libheedful_engine.so", "libheedful_torch.so"):
        own = [str(build / name) for name in objects if ("heedful_torch.dir" in name) == ("torch" in library)]
        link = run([ninja, "-C", BUILD, "-t", "commands", library]).splitlines()[-1]
        arguments = shlex.split(link.removeprefix(": && ").removesuffix(" && :"))
        at = arguments.index(library)
        assert arguments[at - 1] == "-o"
        arguments[at] = str(engine / library)
        run([*arguments[: at + 1], *own, *arguments[at + 1 :]], cwd=BUILD)

    # -S: the link of an editable install to this checkout's sources would come before the copy's.
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import pytest; sys.exit(pytest.main(sys.argv[3:]))"
    paths = [str(checkout / "src"), sysconfig.get_path("purelib")]
    tests = ["-q", "-p", "no:cacheprovider", "tests/ops/test_demo_op.py"]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HEEDFUL_ENGINE_DIR")
    }
    printed = run([sys.executable, "-S", "-c", code, *paths, *tests], cwd=checkout, env=environment)
    assert " passed" in printed
    assert "failed" not in printed
