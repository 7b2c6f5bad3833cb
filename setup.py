"""Builds the compiled parts of fmkernels with ninja. Everything else is in pyproject.toml.

fmkernels/_C.so      the C++ kernels and, where nvcc is found, the CUDA ones; torch.ops.load_library loads it. It uses
                     only torch's stable ABI: one build serves torch 2.11 and later, CPU and CUDA builds alike.
fmkernels/_host*.so  a pybind11 module that evaluates csrc/math from Python, for tests in a checkout; not in a wheel.

So a wheel serves every Python 3 as well: py3-none-linux_*, or py3-none-any without the library.

FMK_EXTENSION=0         install pure Python           FMK_DEBUG=1      -O1 -g
FMK_CUDA=auto|0|1       CUDA kernels; auto: if nvcc   FMK_SANITIZE=1   address and undefined-behaviour sanitizers
TORCH_CUDA_ARCH_LIST    "9.0+PTX" unless set          MAX_JOBS         compilers at once

Objects stay in build/, so that building again compiles only what has changed.
"""

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:  # what a fresh venv of Python 3.11 has is older
    sys.exit(
        f"\nfmkernels: building needs setuptools 77 or later, found {setuptools.__version__}:"
        '\n    pip install --upgrade "setuptools>=77" pybind11 ninja\n'
    )
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEBUG, SANITIZE = (os.environ.get(name, "0") not in ("", "0") for name in ("FMK_DEBUG", "FMK_SANITIZE"))

FLAGS = ["-O1", "-g"] if DEBUG or SANITIZE else ["-O3", "-g0"]  # no -march: the kernels use target_clones
FLAGS += "-std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=fast".split()
FLAGS += "-fopenmp-simd -Wall -Wno-unknown-pragmas".split()
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZE else []
# nvcc's registers and spills are kept beside the object, and shown only where the compilation fails.
NVCC_LOG = " > $out.log 2>&1 || (cat $out.log; false)"
NVCC_FLAGS = "-std=c++20 -O3 --expt-relaxed-constexpr -Xptxas=-v -Xcompiler=-fPIC,-fvisibility=hidden".split()


WITHOUT = "or install without compiled kernels: FMK_EXTENSION=0 pip install --no-build-isolation ."


def wanted():
    """Whether there is anything to compile; other systems than Linux have the references alone."""
    return os.environ.get("FMK_EXTENSION") != "0" and sys.platform == "linux"


def find_compiler():
    chosen = os.environ.get("CXX")
    found = next((name for name in ([chosen] if chosen else ("g++", "clang++", "c++")) if shutil.which(name)), None)
    if found is None:
        missing = f"CXX={chosen} is not found (one program, without arguments)" if chosen else "found none on PATH"
        sys.exit(
            f"\nfmkernels: building the kernels needs a C++20 compiler, {missing}. Install g++ 10 or later"
            f" (apt-get install g++, dnf install gcc-c++) or name one in CXX,\n{WITHOUT}\n"
        )
    return found


def find_nvcc():
    mode = os.environ.get("FMK_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"fmkernels: FMK_CUDA: expected auto, 0 or 1, got {mode!r}")
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    if mode == "1" and nvcc is None:
        sys.exit(
            f"fmkernels: FMK_CUDA=1: found no nvcc in {home}/bin or on PATH. Install the CUDA toolkit or set "
            "CUDA_HOME, or leave FMK_CUDA unset: Triton then serves the GPU"
        )
    return None if mode == "0" else nvcc


def find_torch():
    """The folder and the version of torch, without importing it."""
    spec = importlib.util.find_spec("torch")
    version = importlib.metadata.version("torch") if spec else "none"
    if not spec or tuple(map(int, version.split(".")[:2])) < (2, 11):
        sys.exit(
            f"\nfmkernels: building the kernels needs PyTorch 2.11 or later, found {version}. Install it first"
            ", then build against it:"
            '\n    pip install --upgrade torch "setuptools>=77" pybind11 ninja'
            "\n    pip install --no-build-isolation ."
            f"\n{WITHOUT}\n"
        )
    return Path(spec.submodule_search_locations[0]), version


def gencode(arch_list):
    """nvcc's flags for "8.0;9.0;10.0+PTX"."""
    for arch in arch_list.replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        yield f"-gencode=arch=compute_{number},code=sm_{number}"
        if arch.endswith("+PTX"):
            yield f"-gencode=arch=compute_{number},code=compute_{number}"


def tool_version(tool, line):
    return subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[line]


def escape(path):
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def command(words):
    """A command as ninja reads it."""
    return shlex.join(words).replace("$", "$$")


def remove_libraries():
    """Those of an earlier build, where the package is used in place."""
    for path in ROOT.glob("fmkernels/_*.so"):
        path.unlink()


class Wheel(bdist_wheel):
    def get_tag(self):  # nothing in it depends on the version of Python
        return ("py3", "none", super().get_tag()[2])


class BuildPython(build_py):
    def run(self):
        if self.editable_mode and not wanted():
            remove_libraries()
        super().run()


class Build(build_ext):
    def run(self):
        here = self.inplace or self.editable_mode
        if here and not wanted():
            remove_libraries()
        if self.extensions and not here:
            self.extensions = [extension for extension in self.extensions if extension.name != "fmkernels._host"]
        super().run()

    def get_ext_filename(self, name):  # _C is not a Python module: its name carries no Python version
        *packages, last = name.split(".")
        return "/".join([*packages, "_C.so"]) if last == "_C" else super().get_ext_filename(name)

    def build_extension(self, extension):
        name = extension.name.split(".")[-1]
        folder = Path("build", "sanitize" if SANITIZE else "debug" if DEBUG else "release", name)
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        library = folder / output.name
        cxx, (torch, torch_version) = find_compiler(), find_torch()
        if name == "_C":
            nvcc = find_nvcc()
            includes = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-Icsrc", f"-I{torch}/include"]
            libraries = [f"-L{torch}/lib", "-Xlinker", "--no-as-needed", "-ltorch"]
        else:
            if importlib.util.find_spec("pybind11") is None:
                sys.exit("fmkernels: building fmkernels._host, for the tests, needs pybind11: pip install pybind11")
            import pybind11

            nvcc, libraries = None, []
            includes = ["-Icsrc", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST") or "9.0+PTX"
        facts = {"torch": torch_version, "compiler": tool_version(cxx, 0), "flags": " ".join(FLAGS + SANITIZERS)}
        facts |= {"nvcc": nvcc and tool_version(nvcc, -1), "cuda_arch_list": nvcc and arch_list}

        cpp = [cxx, *FLAGS, *SANITIZERS, *includes]
        info = [*cpp, "-DFMK_BUILD_INFO=" + json.dumps(json.dumps(facts))]  # JSON in a C string literal
        cuda = [nvcc or "nvcc", "-ccbin", cxx, *NVCC_FLAGS, *gencode(arch_list), *includes]
        link = [nvcc, "-ccbin", cxx, "-cudart", "static", "-shared"] if nvcc else [cxx, *SANITIZERS, "-shared"]
        lines = [f"builddir = {escape(folder)}"]
        lines += [f"rule link\n command = {command(link)} $in {command(libraries)} -o $out"]
        for rule, words, log in (("cpp", cpp, ""), ("info", info, ""), ("cu", cuda, NVCC_LOG)):
            lines += [f"rule {rule}\n depfile = $out.d\n deps = gcc"]
            lines += [f" command = {command(words)} -MD -MF $out.d -c $in -o $out{log}"]
        objects = []
        for source in extension.sources:
            if nvcc or not source.endswith(".cu"):
                rule = "info" if source.endswith("build_info.cpp") else source.split(".")[-1]
                objects += [escape(folder / f"{source}.o")]
                lines += [f"build {objects[-1]}: {rule} {escape(source)}"]
        lines += [f"build {escape(library)}: link {' '.join(objects)}"]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        except OSError as error:
            sys.exit(f"fmkernels: building needs to write {folder.absolute()}: {error}. Copy the source elsewhere")

        ninja = shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH')}")
        if ninja is None:
            sys.exit("fmkernels: building the kernels needs ninja: pip install ninja")
        jobs = os.environ.get("MAX_JOBS") or str(min(os.cpu_count() or 1, 8))
        if subprocess.run([ninja, "-f", folder / "build.ninja", "-j", jobs]).returncode:
            sys.exit("fmkernels: compilation failed; FMK_CUDA=0 leaves out the CUDA kernels, FMK_EXTENSION=0 all")
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, output)


def sources(*patterns):
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


os.chdir(ROOT)
libraries = {"_C": sources("csrc/torch/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cu"), "_host": sources("csrc/host.cpp")}
headers = sources("csrc/**/*.h", "csrc/**/*.cuh")
modules = [Extension(f"fmkernels.{name}", files, depends=headers) for name, files in libraries.items() if files]
if not wanted():
    print("fmkernels: no compiled kernels (FMK_EXTENSION=0 or no Linux): references only")
setup(
    ext_modules=modules if wanted() else [],
    cmdclass={"build_ext": Build, "build_py": BuildPython, "bdist_wheel": Wheel},
)
