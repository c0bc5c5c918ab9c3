"""Whether Triton kernels, of the noise and of GroupNorm, run on this machine's GPU; torch's operations take their place elsewhere."""

import importlib.util
import os

from vaescale.system import console

SWITCH = "VAESCALE_TRITON"
"""The environment variable that switches the kernels off, with the value 0."""

_usable: list[bool] = []  # the answer, once it is known


def kernels_run() -> bool:
    """Whether Triton can start kernels: it needs a C compiler and Python's headers when it runs. A reason against is said once.

    Call it before torch.compile reads the answer. (torch.compiler.assume_constant_result would import the compiler at every start.)
    """
    if not _usable:
        fault = "" if os.environ.get(SWITCH, "1") != "0" else f"{SWITCH} is 0"
        fault = fault or _why_not()
        if fault:
            console.say(f"noise and GroupNorm use torch's slower operations: {fault}")
        _usable.append(not fault)
    return _usable[0]


def _why_not() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
        _ = driver.active.utils
    except Exception as error:  # a compiler's failure, a missing header or a missing driver
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"Triton cannot start kernels here ({reason})"
    return ""
