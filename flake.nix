{
  description = "Exact attention for PyTorch that does work only for the keys a model attends to";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs = { self, nixpkgs }:
    let
      systems = [ "x86_64-linux" "aarch64-linux" ];
      forSystems = make: nixpkgs.lib.genAttrs systems (system: make nixpkgs.legacyPackages.${system});
      initText = builtins.readFile ./src/heedful/__init__.py;
      version = builtins.head (builtins.match ".*__version__ = \"([0-9.]+)\".*" initText);
    in
    {
      packages = forSystems (pkgs: {
        default = self.packages.${pkgs.stdenv.hostPlatform.system}.heedful;

        heedful = pkgs.python3Packages.buildPythonPackage {
          pname = "heedful";
          inherit version;
          pyproject = true;
          src = self;
          build-system = [ pkgs.python3Packages.scikit-build-core ];
          nativeBuildInputs = [ pkgs.cmake pkgs.ninja ];
          dontUseCmakeConfigure = true;
          dependencies = with pkgs.python3Packages; [ torch numpy typer rich matplotlib ];
          pythonImportsCheck = [ "heedful" "heedful.ops" "heedful.numpy" ];
          meta = {
            description = "Exact attention for PyTorch that does work only for the keys a model attends to";
            license = pkgs.lib.licenses.asl20;
            platforms = systems;
          };
        };

        engine = pkgs.stdenv.mkDerivation {
          pname = "heedful-engine";
          inherit version;
          src = self;
          nativeBuildInputs = [ pkgs.cmake pkgs.ninja ];
          doCheck = true;
          installPhase = ''
            runHook preInstall
            cmake --install . --component c --prefix $out
            runHook postInstall
          '';
        };
      });

      devShells = forSystems (pkgs: {
        default = pkgs.mkShell {
          packages = with pkgs; [ gcc gnumake cmake ninja clang-tools python3 swi-prolog ];
          LD_LIBRARY_PATH = pkgs.lib.makeLibraryPath [ pkgs.stdenv.cc.cc.lib pkgs.zlib ];
          shellHook = ''
            echo "make build sets up .venv and builds the engine; make test runs everything"
          '';
        };
      });
    };
}
