"""A package of a test's own that comes as source only, with a bit of C. It needs nothing to be built but a compiler.

Its builder takes settings: `word`, which the compiled code says; `count`, a file to which it adds a 1; and `hang`, a file
into which it writes the ids of its own process and of a compiler that never ends, in a group of its own as ninja starts
compilers.
"""

import io
import tarfile
from pathlib import Path

from localai_q.gallery.catalog import CompiledPackage

BUILDER = """
import os, pathlib, subprocess, sysconfig, zipfile

SAYS = "import ctypes, pathlib\\n_c = ctypes.CDLL(pathlib.Path(__file__).with_name('toy.so'))\\n"
SAYS += "_c.word.restype = ctypes.c_char_p\\n\\n\\ndef word():\\n    return _c.word().decode()\\n"


def build_wheel(folder, settings=None, _=None):
    settings = settings or {}
    print("-- looking around", flush=True)
    print("[1/2] Building C object toy.c.o", flush=True)
    if "count" in settings:
        with open(settings["count"], "a") as file:
            file.write("1")
    if "hang" in settings:
        reads_on = ["cc", "-x", "c", "-", "-o", os.devnull]
        end, own_end = os.pipe()  # it keeps what it reads from open itself
        compiler = subprocess.Popen(reads_on, stdin=end, pass_fds=(own_end,), process_group=0)
        pathlib.Path(settings["hang"]).write_text(f"{os.getpid()} {compiler.pid}")
        compiler.wait()
    word = settings.get("word", "nothing")
    subprocess.run(["cc", *os.environ.get("CFLAGS", "").split(), f'-DWORD="{word}"', "-shared", "-fPIC", "toy.c",
                    "-o", "toy.so"], check=True)
    print("[2/2] Linking C shared library toy.so", flush=True)
    tag = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
    name = f"toy_package-1.0-{tag}.whl"
    info = "toy_package-1.0.dist-info"
    with zipfile.ZipFile(pathlib.Path(folder) / name, "w") as wheel:
        wheel.writestr("toy_package/__init__.py", SAYS)
        wheel.write("toy.so", "toy_package/toy.so")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.2\\nName: toy-package\\nVersion: 1.0\\n")
        wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\\nRoot-Is-Purelib: false\\nTag: {tag}\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""
CODE = "const char *word(void) { return WORD; }\n"


def offer(folder: Path, code: str = CODE) -> Path:
    """Make the source distribution, in a folder that an index can be."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "PKG-INFO": "Metadata-Version: 2.2\nName: toy-package\nVersion: 1.0\n",
        "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'builder'\nbackend-path = ['.']\n"
                          "[project]\nname = 'toy-package'\nversion = '1.0'\n",
        "builder.py": BUILDER,
        "toy.c": code,
    }  # fmt: skip
    with tarfile.open(folder / "toy_package-1.0.tar.gz", "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"toy_package-1.0/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return folder


def package(**settings: str) -> CompiledPackage:
    """The package, as an entry names it."""
    return CompiledPackage(requirement="toy-package==1.0", settings=settings)
