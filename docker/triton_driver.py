"""Compiles triton's driver module while the image is built, so that the image needs no C compiler.

Triton (3.7) compiles one C file, its `driver.c`, on the first launch of a kernel, and keeps the module in TRITON_CACHE_DIR under a
hash of the source; kernels themselves go through its own LLVM and ptxas. Here the same code runs without a GPU: the module is linked to
a stand-in for libcuda.so.1 whose functions do nothing, and finds the real one where there is a driver. The hash also holds what Python's
`platform` tells of the machine, which asks the program `file` where it is installed: both stages of the image must have it, or neither.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path


def compile_driver() -> None:
    """Leave the module in triton's cache.

    Raises:
        ImportError: it was compiled, and cannot be loaded for another reason than that this machine has no driver.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_stand_in(Path(folder) / "libcuda.so.1")
        os.environ["TRITON_LIBCUDA_PATH"] = folder
        from triton.backends.nvidia.driver import CudaUtils

        try:
            CudaUtils()
        except ImportError as error:  # it is loaded as soon as it stands in the cache, and there is no driver here
            if "libcuda.so.1" not in str(error):
                raise


def _write_stand_in(path: Path) -> None:
    """A library with every function of the driver that triton's C file calls: linkers leave out libraries that nothing is taken from."""
    package = importlib.util.find_spec("triton.backends.nvidia")
    assert package is not None, "triton is not installed"
    assert package.origin is not None, "triton's nvidia back-end has no file"
    called = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\()", Path(package.origin).with_name("driver.c").read_text())))
    source = "".join(f"void {name}(void) {{}}\n" for name in called)
    subprocess.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", path], input=source, text=True, check=True)


def main() -> int:
    """Compile, and say where the module lies."""
    compile_driver()
    modules = sorted(Path(os.environ["TRITON_CACHE_DIR"]).rglob(f"*{sysconfig.get_config_var('EXT_SUFFIX')}"))
    print(*modules or ["triton's driver module was not compiled"], sep="\n")
    return 0 if modules else 1


if __name__ == "__main__":
    sys.exit(main())
