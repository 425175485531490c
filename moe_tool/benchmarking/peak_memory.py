"""The peak of a process's memory, counted anew from a moment on."""

from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def reset_peak_rss(clear_refs: Path = _CLEAR_REFS) -> bool:
    """Set the process's peak resident size (VmHWM) to its present size; return whether the system
    let us. Where it did not, a peak is that of the whole process so far."""
    try:
        clear_refs.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True
