"""How the C library deals with freed memory while a model trains on a CPU."""

import ctypes

# Parameters of mallopt, as <malloc.h> of glibc numbers them.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
    """Asks glibc to keep freed memory for the next step instead of giving it back; whether it will.

    XLA allocates and frees the temporaries of every step in one piece. Given back, they are mapped and zeroed page by
    page again: 308,000 faults and 0.6 of 3.7 processor seconds in the step of benchmarks/train_step.py (2026-11-25).
    The price is that the process stays as large as it once was, and larger where blocks of ever other sizes do not fit
    into what was freed: of one's own process only. To be called before the first threads, which would have arenas of
    their own; another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, -1)])
