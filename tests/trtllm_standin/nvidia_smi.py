"""``nvidia-smi`` for GPUs that are not there; :mod:`tests.trtllm_standin.fixtures` installs it under that name.

``FAKE_GPUS``, ``FAKE_GPU_NAME``, ``FAKE_GPU_CAPABILITY``, ``FAKE_GPU_TOTAL_MIB``, ``FAKE_GPU_FREE_MIB`` and ``FAKE_DRIVER``
describe them. It answers ``--query-gpu=FIELDS --format=csv,noheader,nounits``, ``topo -m``, and no arguments.
"""

import os
import sys

COUNT = int(os.environ.get("FAKE_GPUS", "8"))
NAME = os.environ.get("FAKE_GPU_NAME", "NVIDIA H100 80GB HBM3")
TOTAL = os.environ.get("FAKE_GPU_TOTAL_MIB", "81559")
FREE = os.environ.get("FAKE_GPU_FREE_MIB", "81000")
DRIVER = os.environ.get("FAKE_DRIVER", "580.95.05")


def fields(index):
    """What is known about one GPU."""
    return {
        "index": str(index),
        "count": str(COUNT),
        "uuid": f"GPU-{index:08x}-0000-0000-0000-000000000000",
        "name": NAME,
        "gpu_name": NAME,
        "compute_cap": os.environ.get("FAKE_GPU_CAPABILITY", "9.0"),
        "memory.total": TOTAL,
        "memory.free": FREE,
        "memory.used": str(int(TOTAL) - int(FREE)) if TOTAL.isdigit() and FREE.isdigit() else "[N/A]",
        "driver_version": DRIVER,
        "pci.bus_id": f"00000000:{index:02X}:00.0",
        "fabric.state": "Completed" if COUNT > 1 else "N/A",
        "mig.mode.current": "Disabled",
    }


def query(names):
    """One line of CSV for each GPU."""
    known = fields(0)
    for name in names:
        if name not in known:
            print(f'Field "{name}" is not a valid field to query.\n')
            return 2
    for index in range(COUNT):
        print(", ".join(fields(index)[name] for name in names))
    return 0


def topology():
    """Every GPU joined to every other by 18 NVLinks."""
    print("\t" + "\t".join(f"GPU{index}" for index in range(COUNT)))
    for row in range(COUNT):
        print(f"GPU{row}\t" + "\t".join(" X " if row == column else "NV18" for column in range(COUNT)))
    return 0


def main(words):
    """Answer one command line."""
    if COUNT == 0:
        print("No devices were found")
        return 6
    queries = [word.partition("=")[2] for word in words if word.startswith("--query-gpu=")]
    if queries:
        return query([name.strip() for name in queries[0].split(",")])
    if words[:1] == ["topo"]:
        return topology()
    print(f"| NVIDIA-SMI {DRIVER}    Driver Version: {DRIVER}    CUDA Version: 13.0     |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
