"""A GPU for each of several processes. Before JAX is imported."""

import glob
import os


def take_gpu(number: int) -> None:
    """Lets this process, the `number`-th, see one of the GPUs that it might see, which others may
    see too."""
    every = ",".join(map(str, range(max(1, len(glob.glob("/dev/nvidia[0-9]*"))))))
    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or every).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
