"""Which tokens a cache keeps, and which of them a query reads."""
