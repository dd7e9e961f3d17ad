"""The machine that a benchmark's figures belong to; every benchmark that measures time prints it with them."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, its widest vector instructions, cores, load average and date."""
    fields: dict[str, str] = {}
    info = Path("/proc/cpuinfo")  # Linux; elsewhere the platform's name of the processor has to do
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", "").split()
    numbers = ("cpu family", "model", "stepping")
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "family, model, stepping": [int(fields[name]) for name in numbers if fields.get(name, "").isdigit()],
        "vectors": next((name for name in ("amx_bf16", "avx512f", "avx2", "avx") if name in flags), "unknown"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
    }
