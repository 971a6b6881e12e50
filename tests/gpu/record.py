"""RECORD.json: proof that the GPU suite passed on these very kernel sources.

    make gpu-test                        writes it at the end of a whole run
    python tests/gpu/record.py --check   fails unless it fits the source tree and nothing failed

The check needs neither JAX nor a GPU.  The hash covers what is compiled into the kernels: every
file under src/ and cmake/, and CMakeLists.txt.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECORD = pathlib.Path("tests/gpu/RECORD.json")
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "numpy")


def kernel_sources(root):
    """Files that the hash covers, in a fixed order."""
    files = [
        path for folder in ("src", "cmake") for path in (root / folder).rglob("*") if path.is_file()
    ]
    return sorted([*files, root / "CMakeLists.txt"])


def source_hash(root=ROOT):
    """SHA-256 over relative names and contents."""
    digest = hashlib.sha256()
    for path in kernel_sources(root):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def driver_version():
    """The driver as nvidia-smi names it, or why it cannot be known."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({type(error).__name__})"


def package_versions():
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES if name in installed}


def write(counts, skipped, seconds, root=ROOT):
    """Write the record of a finished run; `skipped` maps test names to reasons."""
    import jax

    device = jax.devices()[0]
    record = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "source_hash": source_hash(root),
        "gpu": device.device_kind,
        "driver": driver_version(),
        "platform": " ".join(device.client.platform_version.split()),
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "counts": counts,
        "skipped": skipped,
        "seconds": round(seconds),
    }
    (root / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def problems(root=ROOT):
    """Why the record does not vouch for the source tree; empty when it does."""
    try:
        record = json.loads((root / RECORD).read_text())
    except OSError as error:
        return [f"{RECORD} cannot be read ({error}): run `make gpu-test` on a Hopper machine"]
    except ValueError as error:
        return [f"{RECORD} is not JSON: {error}"]
    found, current = [], source_hash(root)
    if record.get("source_hash") != current:
        found.append(
            f"{RECORD} is for source {str(record.get('source_hash'))[:12]}, the tree is "
            f"{current[:12]}: run `make gpu-test` again"
        )
    counts = record.get("counts", {})
    if counts.get("failed") != 0:
        found.append(f"{RECORD} has {counts.get('failed')} failed tests, expected 0")
    if not counts.get("passed"):
        found.append(f"{RECORD} has {counts.get('passed')} passed tests, expected some")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail unless the record fits")
    if not parser.parse_args().check:
        print(source_hash())
        return 0
    found = problems()
    print("\n".join(found) or f"{RECORD} fits the source.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
