"""Who is in which row of a running batch, who waits, and who may join: bookkeeping without arrays.

A request joins when a row is free and the pool has all the pages that it can come to need: what is reserved
then is never asked for again, so that no request that has begun is ever out of pages. Requests join in the
order they came; one that waits for many pages lets none pass, so that it is not passed for ever.
"""

import collections

from effjax.decoding.serving.pages import Pages
from effjax.decoding.serving.requests import Answer, Request, TooLarge


class Schedule:
    """Rows and pages of one running batch.

    Args:
      rows: of the batch.
      pages: of the pool.
      page: slots of a page.
      slots: of a row whose cache is full; more tokens need no more.
      length: tokens of the longest sequence.
    """

    def __init__(self, rows: int, pages: int, page: int, slots: int, length: int) -> None:
        self.page, self.slots, self.length = page, slots, length
        self.pool = Pages(pages)
        self.rows: list[Answer | None] = [None] * rows
        self.waiting: collections.deque[Answer] = collections.deque()

    @property
    def running(self) -> list[tuple[int, Answer]]:
        """Rows that write, and what."""
        return [(row, answer) for row, answer in enumerate(self.rows) if answer is not None]

    @property
    def idle(self) -> int:
        """Rows that are neither taken nor waited for; negative if more wait than there are rows for."""
        return sum(answer is None for answer in self.rows) - len(self.waiting)

    def pages_for(self, request: Request) -> int:
        """Pages that a request can come to need."""
        return -(-min(request.held, self.slots) // self.page)

    def check(self, request: Request) -> None:
        """Refuses what would not fit an empty batch.

        Raises:
          TooLarge: saying what there is.
        """
        if request.held > self.length:
            raise TooLarge(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new} new ones are more than a "
                f"sequence of {self.length} holds: shorten the prompt or ask for "
                f"{max(self.length - len(request.prompt) + 1, 0)} tokens at most."
            )
        if self.pages_for(request) > self.pool.count:
            raise TooLarge(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new} new ones need "
                f"{self.pages_for(request)} pages of the cache, which has {self.pool.count}: ask for less."
            )

    def add(self, answer: Answer) -> None:
        """Lets a request that was checked wait."""
        self.waiting.append(answer)

    def admit(self, now: float) -> list[Answer]:
        """Gives rows and pages to those who wait, as far as there are any; returns who joins."""
        joined = []
        for row, held in enumerate(self.rows):
            if held is not None or not self.waiting:
                continue
            pages = self.pool.take(self.pages_for(self.waiting[0].request))
            if pages is None:
                break
            answer = self.waiting.popleft()
            answer.row, answer.pages, answer.joined = row, pages, now
            self.rows[row] = answer
            joined.append(answer)
        return joined

    def remove(self, answer: Answer) -> None:
        """Frees what an answer has, or its place among those who wait."""
        if answer.row is None:
            self.waiting.remove(answer)
            return
        self.rows[answer.row] = None
        self.pool.give(answer.pages)
        answer.row, answer.pages = None, ()
