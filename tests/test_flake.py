"""flake.nix, as far as it goes without fetching nixpkgs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import heedful

FLAKE = Path(__file__).parents[1] / "flake.nix"
NIX = shutil.which("nix-instantiate")
pytestmark = [
    pytest.mark.skipif(not FLAKE.exists(), reason="runs in a source tree only"),
    pytest.mark.skipif(NIX is None, reason="no nix-instantiate here (Debian: apt install nix-bin)"),
]

# Functions that return their arguments stand in for those of nixpkgs.
OUTPUTS = """
let
  flake = import FILE;
  genAttrs = names: make: builtins.listToAttrs (map (name: { inherit name; value = make name; }) names);
  named = names: genAttrs names (name: name);
  python = named [ "scikit-build-core" "torch" "numpy" "typer" "rich" "matplotlib" ];
  pkgs = system: named [ "cmake" "ninja" "gcc" "gnumake" "clang-tools" "python3" "swi-prolog" "zlib" ] // {
    lib = { licenses.asl20 = "asl20"; makeLibraryPath = builtins.concatStringsSep ":"; };
    python3Packages = python // { buildPythonPackage = given: given; };
    mkShell = given: given;
    stdenv = { mkDerivation = given: given; hostPlatform.system = system; cc.cc.lib = "cc"; };
  };
  nixpkgs = { lib = { inherit genAttrs; }; legacyPackages = genAttrs [ "x86_64-linux" "aarch64-linux" ] pkgs; };
  self = flake.outputs { inherit self nixpkgs; } // { outPath = "/source"; };
  packages = self.packages.x86_64-linux;
in builtins.deepSeq self.devShells packages.default.pname + " " + packages.engine.version
"""


def test_it_is_a_flake():
    subprocess.run([NIX, "--parse", FLAKE], check=True, capture_output=True)
    command = [NIX, "--eval", "--strict", "-E", OUTPUTS.replace("FILE", str(FLAKE))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == f'"heedful {heedful.__version__}"', done.stderr
