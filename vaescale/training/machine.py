"""How busy this machine is: the numbers and names of MLflow's system metrics, so that its page of them shows."""

import psutil
import torch

MEGABYTE = 1e6


def system_metrics() -> dict[str, float]:
    """Of the whole machine, since the last call where it is a rate: percentages of use, and megabytes."""
    memory = psutil.virtual_memory()
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
    }
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found[f"system/gpu_{number}_memory_usage_megabytes"] = (total - free) / MEGABYTE
        found[f"system/gpu_{number}_memory_usage_percentage"] = 100 * (1 - free / total)
    return found
