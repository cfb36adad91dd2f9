"""The benchmark: Crossgate beside `transformers` and what people put around it, every token compared with a reference.

Needs the development install: checkpoints and the launcher come from `tests`. No system imports another's code, but
pictures are preprocessed by one function for all, since a grey level's difference is another answer.
"""
