"""Crossgate: a two-stage server for vision-language models that see through cross-attention."""
