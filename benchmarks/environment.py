"""Where and on what a result was measured, and where results are written."""

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "numpy",
    "dew-flash-attn-cu13", "tokamax", "torch",  # of peers
)  # fmt: skip


def output_of(*command: str) -> str | None:
    """A command's first line of output, or None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def environment() -> dict[str, str]:
    """Commit, date, GPU, driver and versions, for the head of every result file.

    A tree without git history takes its commit from JAX_FA3_COMMIT.
    """
    import jax_fa3

    here = Path(__file__).parent
    commit = output_of("git", "-C", str(here), "rev-parse", "--short=12", "HEAD")
    if commit and output_of("git", "-C", str(here), "status", "--porcelain", "-uno"):
        commit += ", with changes"
    query = ("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader")
    driver, _, power = (output_of(*query) or "none").partition(", ")
    return {
        "commit": commit or os.environ.get("JAX_FA3_COMMIT", "unknown"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": jax.devices()[0].device_kind,
        "driver": driver,
        "power limit": power or "unknown",
        "python": platform.python_version(),
        "jax_fa3": jax_fa3.__version__,
        **{name: version(name) for name in PACKAGES},
    }


def save(data: dict, path: Path) -> None:
    """Writes JSON in one move, so that an interrupted run leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)
