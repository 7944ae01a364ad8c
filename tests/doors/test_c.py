"""heedful.h from C: the example, the header's own words, and how a build finds both."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import heedful
from heedful import Causal, Documents, Padding, SlidingWindow
from heedful.backend.native import library
from heedful.patterns.schedule import Schedule

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "attention.c"
BUILD = ROOT / "build" / "native"
C99 = ("-std=c99", "-D_POSIX_C_SOURCE=200809L", "-O1", "-Wall", "-Wextra", "-Wpedantic", "-Werror")
LIBRARIES = ("-pthread", "-lm")

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no cc on PATH"),
    pytest.mark.skipif(not EXAMPLE.exists(), reason="runs in a source tree only"),
]
needs_pkg_config = pytest.mark.skipif(shutil.which("pkg-config") is None, reason="no pkg-config on PATH")


def run(*command: str | Path, **environment: str) -> str:
    env = os.environ | environment
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def compiled(source: Path, target: Path, *options: str) -> Path:
    run("cc", *C99, source, "-o", target, *options, *LIBRARIES)
    return target


def flags() -> tuple[str, ...]:
    lies = heedful.get_library_dir()
    return f"-I{heedful.get_include()}", f"-L{lies}", "-lheedful_engine", f"-Wl,-rpath,{lies}"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run(compiled(EXAMPLE, tmp_path_factory.mktemp("c") / "attention", *flags()))


def test_the_example_computes_attention(printed):
    batch, heads, kv_heads, queries, keys, dim = 2, 4, 2, 70, 90, 32

    def numbers(seed: float, heads: int, length: int) -> torch.Tensor:
        places = torch.arange(batch * length * heads * dim, dtype=torch.float64)
        return torch.sin(seed + 0.37 * places).float().double().view(batch, length, heads, dim)

    inputs = [numbers(0, heads, queries), numbers(1, kv_heads, keys), numbers(2, kv_heads, keys)]
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    found = heedful.attention(q, k, v, causal=True, layout="blhd", return_lse=True, backend="reference")
    gradients = torch.autograd.grad(found.out, (q, k, v), numbers(3, heads, queries))
    wanted = dict(zip(("out", "lse", "grad_query", "grad_key", "grad_value"), (*found[:2], *gradients), strict=True))
    for name, tensor in wanted.items():
        flat = tensor.detach().flatten()
        total = float((flat * (torch.arange(flat.numel()) % 7 + 1)).sum())
        shown = re.search(rf"\b{name} (\S+)", printed)
        assert shown is not None
        assert float(shown[1]) == pytest.approx(total, abs=1e-3, rel=1e-6), name
    assert "3 threads: the same bits" in printed
    assert heedful.__version__ in printed


def test_the_example_fails_where_numbers_are_wrong(tmp_path):
    """Which shows that it compares them."""
    text = EXAMPLE.read_text()
    wrong = text.replace("1 / sqrt(DIM);", "1.01 / sqrt(DIM);", 1)
    assert wrong != text
    (tmp_path / "wrong.c").write_text(wrong)
    program = compiled(tmp_path / "wrong.c", tmp_path / "wrong", *flags())
    assert subprocess.run([program], capture_output=True).returncode == 1


CODES = {
    "HEEDFUL_CAUSAL": Causal(),
    "HEEDFUL_WINDOW(3, 2)": SlidingWindow(3, 2),
    "HEEDFUL_LENGTHS": Padding(0, torch.tensor([1, 2])),
    "HEEDFUL_DOCUMENTS": Documents(torch.tensor([0, 2])),
    "HEEDFUL_CAUSAL_DOCUMENTS": Documents(torch.tensor([0, 2]), within=Causal()),
}


def test_codes_are_those_of_the_patterns(tmp_path):
    lines = "".join(
        f'    {{ const int64_t code[] = {name}; show("{name}", code, sizeof code / sizeof *code); }}\n'
        for name in CODES
    )
    (tmp_path / "codes.c").write_text(
        "#include <heedful.h>\n#include <stdio.h>\n"
        "static void show(const char *name, const int64_t *code, size_t length) {\n"
        '    printf("\\"%s\\": [", name);\n'
        '    for (size_t i = 0; i < length; ++i) printf("%s%d", i ? ", " : "", (int)code[i]);\n'
        '    printf("],\\n");\n}\n'
        f"int main(void) {{\n{lines}    return 0;\n}}\n"
    )
    shown = json.loads("{" + run(compiled(tmp_path / "codes.c", tmp_path / "codes", *flags())).rstrip(",\n") + "}")
    for name, pattern in CODES.items():
        # The order of an atom's terms has no meaning.
        found = Schedule.decode(shown[name])
        assert [set(atom) for atom in found.atoms] == [set(atom) for atom in pattern.schedule.atoms], name


@pytest.mark.parametrize("options", [("-x", "c++", "-std=c++11"), ("-x", "c++", "-std=c++17"), ("-x", "c", "-std=c99")])
def test_the_header_is_c_and_cpp(options, tmp_path):
    uses = ["heedful_attention_forward", "heedful_attention_backward", "heedful_attention_weights", "heedful_version"]
    (tmp_path / "uses.c").write_text(
        "#include <heedful.h>\nint main(void) {\n"
        + "".join(f"    if (!{name}) return 1;\n" for name in uses)
        + "    heedful_forward call = {0};\n"
        "    return heedful_attention_forward(&call, NULL) == HEEDFUL_OK || heedful_error_message()[0] == 0;\n}\n"
    )
    warnings = ("-Wall", "-Wextra", "-Wno-address", "-Wno-missing-field-initializers")
    run("cc", *options, *warnings, f"-I{heedful.get_include()}", "-c", tmp_path / "uses.c", "-o", tmp_path / "uses.o")
    run("cc", tmp_path / "uses.o", "-o", tmp_path / "uses", *flags())
    run(tmp_path / "uses")


def test_the_header_is_the_library_s():
    text = (Path(heedful.get_include()) / "heedful.h").read_text()
    version = re.search(r"#define HEEDFUL_ABI_VERSION (\d+)", text)
    assert version is not None
    assert int(version[1]) == library.engine().heedful_abi_version()
    assert (Path(heedful.get_library_dir()) / "libheedful_engine.so").exists()


def test_what_is_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("HEEDFUL_ENGINE_DIR", str(tmp_path))
    with pytest.raises(ImportError, match=r"libheedful_engine\.so is not there"):
        heedful.get_library_dir()


def moved(tmp_path: Path) -> Path:
    """The C interface of this installation in another place."""
    for folder in (heedful.get_include(), heedful.get_library_dir()):
        shutil.copytree(folder, tmp_path / "elsewhere" / Path(folder).name)
    return tmp_path / "elsewhere" / Path(heedful.get_library_dir()).name


def installed(tmp_path: Path) -> Path:
    """As a system has it."""
    if not (BUILD / "cmake_install.cmake").exists():
        pytest.skip("not built by make build")
    run("cmake", "--install", BUILD, "--component", "c", "--prefix", tmp_path / "usr")
    assert {path.name for path in (tmp_path / "usr" / "lib").iterdir()} == {
        "libheedful_engine.so",
        "pkgconfig",
        "cmake",
    }
    return tmp_path / "usr" / "lib"


needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake on PATH")
PLACES = pytest.mark.parametrize("place", [moved, pytest.param(installed, marks=needs_cmake)])


@needs_pkg_config
@PLACES
def test_pkg_config(place: Callable[[Path], Path], tmp_path):
    lies = place(tmp_path)
    path = {"PKG_CONFIG_PATH": str(lies / "pkgconfig")}
    assert run("pkg-config", "--modversion", "heedful", **path).strip() == heedful.__version__
    found = run("pkg-config", "--cflags", "--libs", "heedful", **path).split()
    assert all(str(tmp_path) in option for option in found if option[:2] in ("-I", "-L"))
    program = compiled(EXAMPLE, tmp_path / "attention", *found)
    assert "the same bits" in run(program, LD_LIBRARY_PATH=str(lies))


@needs_cmake
@PLACES
def test_cmake(place: Callable[[Path], Path], tmp_path):
    lies = place(tmp_path)
    project = tmp_path / "project"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(example LANGUAGES C)\n"
        f"find_package(heedful {heedful.__version__} REQUIRED)\nfind_package(Threads REQUIRED)\n"
        f"add_executable(attention {EXAMPLE})\n"
        "target_link_libraries(attention PRIVATE heedful::engine Threads::Threads m)\n"
    )
    found = f"-DCMAKE_PREFIX_PATH={lies.parent}" if place is installed else f"-Dheedful_DIR={lies}/cmake/heedful"
    run("cmake", "-S", project, "-B", project / "build", found)
    run("cmake", "--build", project / "build")
    assert "the same bits" in run(project / "build" / "attention")
