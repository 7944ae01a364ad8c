"""What the compiled libraries must be like, whatever they compute."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import heedful
from heedful.backend.native import library, structures

ROOT = Path(__file__).parents[1]
SHIM = ROOT / "bridge" / "torch_shim.h"
OBJECTS = sorted((ROOT / "build" / "native").glob("CMakeFiles/heedful_tier_*.dir/**/*.o"))

needs_source = pytest.mark.skipif(not SHIM.exists(), reason="no source tree")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
needs_objects = pytest.mark.skipif(not OBJECTS, reason="not built by make build")


def tier_of(path: Path) -> str:
    found = re.search(r"heedful_tier_([^/]+?)(_ops)?\.dir", str(path))
    assert found is not None
    return found[1]


def read(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def compile_against_torch(source: Path, *options: str) -> subprocess.CompletedProcess[str]:
    include = Path(torch.__file__).parent / "include"
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{SHIM.parent}", *options, str(source)]
    return subprocess.run(command, capture_output=True, text=True)


@needs_source
@needs_compiler
def test_hand_declarations_agree_with_torch(tmp_path):
    source = tmp_path / "both.cpp"
    source.write_text('#include <torch/csrc/stable/c/shim.h>\n#include "torch_shim.h"\n')
    result = compile_against_torch(source)
    assert result.returncode == 0, result.stderr


@needs_source
@needs_compiler
def test_declarations_of_torchs_kernels_agree_with_torch(tmp_path):
    generated = "torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h"
    source = tmp_path / "kernels.cpp"
    source.write_text(f'#include <{generated}>\n#include <torch/csrc/stable/c/shim.h>\n#include "torch_flash.h"\n')
    result = compile_against_torch(source)
    assert result.returncode == 0, result.stderr
    declared = set(re.findall(r"\baoti_torch_cpu_\w+(?=\()", (SHIM.parent / "torch_flash.h").read_text()))
    assert len(declared) == 2
    assert declared <= set(re.findall(r"\w+", (Path(torch.__file__).parent / "include" / generated).read_text()))


@needs_source
@needs_compiler
def test_a_drifted_declaration_is_noticed(tmp_path):
    drifted = SHIM.read_text().replace(
        "aoti_torch_get_dim(AtenTensorHandle tensor, int64_t *", "aoti_torch_get_dim(AtenTensorHandle tensor, int32_t *"
    )
    assert drifted != SHIM.read_text()
    (tmp_path / "drifted.h").write_text(drifted)
    source = tmp_path / "both.cpp"
    source.write_text('#include <torch/csrc/stable/c/shim.h>\n#include "drifted.h"\n')
    assert "aoti_torch_get_dim" in compile_against_torch(source).stderr


@needs_source
@needs_compiler
def test_the_oldest_torch_has_every_function(tmp_path):
    version = re.search(
        r"TORCH_SHIM_VERSION \(\(UINT64_C\((\d+)\) << 56\) \| \(UINT64_C\((\d+)\) << 48\)\)", SHIM.read_text()
    )
    assert version is not None
    assert f'"torch>={version[1]}.{version[2]},' in (ROOT / "pyproject.toml").read_text()
    names = re.findall(r"\b((?:aoti_)?torch_\w+)\(", SHIM.read_text())
    assert len(names) > 20
    source = tmp_path / "names.cpp"
    uses = "".join(f"    (void)&{name};\n" for name in names)
    source.write_text(f"#include <torch/csrc/stable/c/shim.h>\nvoid use() {{\n{uses}}}\n")
    target = (int(version[1]) << 56) | (int(version[2]) << 48)
    result = compile_against_torch(source, f"-DTORCH_TARGET_VERSION={target:#x}")
    assert result.returncode == 0, result.stderr


@needs_objects
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: f"{tier_of(path)}/{path.stem.removesuffix('.cpp')}")
def test_a_tier_leaks_nothing_to_the_others(path):
    # The linker keeps one copy of a weak symbol for everybody: an AVX-512 copy would kill older processors.
    # (The pointer to the unwinder's own routine is the same in all of them.)
    weak = {line.split()[-1] for line in read("nm", path).splitlines() if re.search(r" [WVu] ", line)}
    assert weak <= {"DW.ref.__gxx_personality_v0"}


@needs_objects
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="names x86 registers")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump on PATH")
def test_code_that_every_processor_runs_uses_the_baseline():
    common = sorted((ROOT / "build" / "native").glob("CMakeFiles/heedful_common.dir/**/*.o"))
    for path in [*common, *(path for path in OBJECTS if tier_of(path) == "portable")]:
        assert not re.search(r"%[yz]mm", read("objdump", "-d", path)), path
    for path in (path for path in OBJECTS if tier_of(path) == "avx2"):
        assert not re.search(r"%zmm", read("objdump", "-d", path)), path


@pytest.mark.parametrize("name", ["libheedful_engine.so", "libheedful_torch.so"])
class TestLibrary:
    def test_needs_only_what_is_on_every_system(self, name):
        needed = set(re.findall(r"NEEDED.*\[(.+)\]", read("readelf", "-dW", library.directory() / name)))
        # A second OpenMP runtime beside torch's own would fight it for the cores.
        allowed = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
        allowed |= {"libpthread.so.0", "ld-linux-aarch64.so.1"}
        if name == "libheedful_torch.so":
            assert {"libheedful_engine.so", "libtorch_cpu.so"} <= needed
            needed -= {"libheedful_engine.so", "libtorch_cpu.so"}
        assert needed <= allowed

    def test_is_found_beside_the_other(self, name):
        runpath = re.findall(r"R(?:UN)?PATH.*\[(.*)\]", read("readelf", "-dW", library.directory() / name))
        assert runpath in ([], ["$ORIGIN"])

    def test_has_no_executable_stack(self, name):
        (stack,) = re.findall(r"GNU_STACK.*", read("readelf", "-lW", library.directory() / name))
        assert "RWE" not in stack

    def test_exports_only_the_interface(self, name):
        exported = read("nm", "-D", "--defined-only", library.directory() / name).split()[2::3]
        assert all(symbol.startswith("heedful_") for symbol in exported)
        assert bool(exported) == (name == "libheedful_engine.so")


def test_one_version():
    assert library.version() == heedful.__version__


def test_every_function_of_the_header_is_exported():
    headers = (library.directory().parent / "include").rglob("*.h")
    declared = {name for header in headers for name in re.findall(r"\b(heedful_\w+)\(", header.read_text())}
    exported = read("nm", "-D", "--defined-only", library.directory() / "libheedful_engine.so").split()[2::3]
    assert declared == set(exported)


LAYOUT = """
#include <cstddef>
#include <cstdio>
#include "heedful.h"
int main() {
LINES}
"""


@needs_source
@needs_compiler
def test_the_structures_lie_in_memory_as_the_header_says(tmp_path):
    mirrored = {name: getattr(structures, name) for name in dir(structures) if name.startswith("Engine")}
    lines, wanted = "", ""
    for name, structure in mirrored.items():
        declared = "heedful_" + name.removeprefix("Engine").lower()
        lines += f'    printf("{name} %zu\\n", sizeof({declared}));\n'
        wanted += f"{name} {ctypes.sizeof(structure)}\n"
        for field, *_ in structure._fields_:
            lines += f'    printf("{field} %zu\\n", offsetof({declared}, {field}));\n'
            wanted += f"{field} {getattr(structure, field).offset}\n"
    source = tmp_path / "layout.cpp"
    source.write_text(LAYOUT.replace("LINES", lines))
    read("g++", f"-I{ROOT / 'engine' / 'include'}", source, "-o", tmp_path / "layout")
    assert read(tmp_path / "layout") == wanted


@needs_source
def test_versions_and_dtypes_are_those_of_the_header():
    header = (ROOT / "engine" / "include" / "heedful.h").read_text()
    assert f"#define HEEDFUL_ABI_VERSION {library.ABI_VERSION}\n" in header
    enumerated = dict(re.findall(r"HEEDFUL_(\w+) = (\d+)", header.partition("typedef enum heedful_dtype")[2]))
    assert {name.upper(): str(code) for name, code in structures.DTYPES.items()} == enumerated


def test_constants_of_the_engine_are_named():
    assert library.tuning()
    with pytest.raises(ValueError, match="name takes one of 'item_"):
        library.tune("nothing", 1)
    for name, value in library.tuning().items():
        library.tune(name, value)
        with pytest.raises(ValueError, match=f"{name}: is -1, takes"):
            library.tune(name, -1)
        assert library.tuning()[name] == value


ISA_WITHOUT_TORCH = """
import ctypes, sys
sys.modules["torch"] = None
engine = ctypes.CDLL(sys.argv[1])
engine.heedful_isa_name.restype = ctypes.c_char_p
print(engine.heedful_isa_name(engine.heedful_isa_selected()).decode())
"""


def test_isa_is_capped_by_name_with_no_torch_in_sight():
    names = library.isa_names()
    assert names[0] == "portable"
    assert library.isa_runnable(0)
    engine = str(library.directory() / "libheedful_engine.so")
    for index, name in enumerate(names):
        if library.isa_runnable(index):
            command = [sys.executable, "-c", ISA_WITHOUT_TORCH, engine]
            environment = {**os.environ, "HEEDFUL_ISA": name}
            result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            assert result.stdout.strip() == name


def test_an_absent_engine_is_named(tmp_path):
    code = "from heedful.backend.native import library; library.load_operators()"
    environment = {**os.environ, "HEEDFUL_ENGINE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert f"ImportError: heedful's compiled engine is not there: no {tmp_path}" in result.stderr


def test_a_broken_engine_is_named(tmp_path):
    (tmp_path / "libheedful_engine.so").write_bytes(b"not a library")
    code = "from heedful.backend.native import library; library.engine()"
    environment = {**os.environ, "HEEDFUL_ENGINE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ImportError: heedful's compiled engine cannot be loaded" in result.stderr
