"""Session set-up: eight CPU devices and no GPU suite, or, with JAX_FA3_REQUIRE_GPU=1 (which `make
gpu-test` sets), the platform that JAX finds.

The variables must be set before JAX is first imported, hence here.
"""

import os

if not os.environ.get("JAX_FA3_REQUIRE_GPU"):
    collect_ignore = ["gpu"]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    ).strip()


def pytest_report_header():
    if not os.environ.get("JAX_FA3_REQUIRE_GPU"):
        return "tests/gpu: left out, JAX_FA3_REQUIRE_GPU is not set"
