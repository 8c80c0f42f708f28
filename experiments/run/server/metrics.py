"""What a server counts, in the text format of Prometheus."""

import bisect
import collections
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Upper bounds, in seconds.
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# Over how many seconds the rate that is shown to people is taken.
WINDOW = 10.0


class Histogram:
    """How many of some durations were at most so long."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def lines(self, name: str, labels: str) -> Iterable[str]:
        """As Prometheus reads it: every bucket counts those before it."""
        for bound, count in zip((*BOUNDS, "+Inf"), itertools.accumulate(self.counts), strict=True):
            yield f'{name}_bucket{{{labels},le="{bound}"}} {count}'
        yield f"{name}_sum{{{labels}}} {self.sum:.6f}"
        yield f"{name}_count{{{labels}}} {sum(self.counts)}"


class Metrics:
    """Counts of one server; all of one thread.

    Args:
      caches: names of the lanes.
      clock: seconds, which only grow.
    """

    def __init__(self, caches: Iterable[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.ended: collections.Counter[tuple[str, str]] = collections.Counter()
        self.refused: collections.Counter[int] = collections.Counter()
        self.tokens = dict.fromkeys(caches, 0)
        self.queued = {name: Histogram() for name in self.tokens}
        self.first = {name: Histogram() for name in self.tokens}
        self.whole = {name: Histogram() for name in self.tokens}
        self._recent: collections.deque[tuple[float, int]] = collections.deque()

    def wrote(self, cache: str, tokens: int) -> None:
        """Counts tokens of a step."""
        self.tokens[cache] += tokens
        self._recent.append((self._clock(), tokens))
        self._forget()

    def tokens_per_second(self) -> float:
        """Of all lanes in the last seconds."""
        self._forget()
        return sum(tokens for _, tokens in self._recent) / WINDOW

    def mean_seconds(self) -> float:
        """From the arrival to the end of a request, on average; 1 where none has ended."""
        count = sum(sum(each.counts) for each in self.whole.values())
        return sum(each.sum for each in self.whole.values()) / count if count else 1.0

    def text(self, state: Mapping[str, Mapping[str, Any]]) -> str:
        """All of it, with gauges of the lanes as they are now."""
        lines = ["# TYPE effjax_requests_total counter"]
        for (cache, end), count in sorted(self.ended.items()):
            lines.append(f'effjax_requests_total{{cache="{cache}",end="{end}"}} {count}')
        lines.append("# TYPE effjax_refused_total counter")
        for status, count in sorted(self.refused.items()):
            lines.append(f'effjax_refused_total{{status="{status}"}} {count}')
        lines.append("# TYPE effjax_tokens_total counter")
        for cache, count in self.tokens.items():
            lines.append(f'effjax_tokens_total{{cache="{cache}"}} {count}')
        lines.append("# TYPE effjax_tokens_per_second gauge")
        lines.append(f"effjax_tokens_per_second {self.tokens_per_second():.3f}")
        for name in next(iter(state.values())):
            lines.append(f"# TYPE effjax_{name} gauge")
            lines += [f'effjax_{name}{{cache="{cache}"}} {told[name]}' for cache, told in state.items()]
        for name, histograms in (
            ("effjax_queue_seconds", self.queued),
            ("effjax_first_token_seconds", self.first),
            ("effjax_request_seconds", self.whole),
        ):
            lines.append(f"# TYPE {name} histogram")
            for cache, histogram in histograms.items():
                lines += histogram.lines(name, f'cache="{cache}"')
        return "\n".join(lines) + "\n"

    def _forget(self) -> None:
        while self._recent and self._recent[0][0] < self._clock() - WINDOW:
            self._recent.popleft()
