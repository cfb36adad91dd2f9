"""The systems that are compared, each a small program of its own. Whole answers, not streamed, unless it says so."""
