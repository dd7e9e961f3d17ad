"""How far a long write is: a bar on a terminal, a line at every tenth elsewhere."""

import sys


class Progress:
    """progress(done bytes, all bytes). title: one word before the bar."""

    def __init__(self, title: str):
        self._title, self._bar, self._tenth = title, None, 0

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=total, unit="B", unit_scale=True, desc=self._title)
            self._bar.update(done - self._bar.n)
            if done == total:
                self._bar.close()
        elif total >= 10**9 and 10 * done // total > self._tenth:
            self._tenth = 10 * done // total
            print(f"  {done:,} of {total:,} bytes", flush=True)
