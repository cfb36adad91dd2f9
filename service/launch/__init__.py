"""The embedded default: Triton from the PyPI wheel and the gateway, started, watched and stopped together.

Imports neither torch nor the gateway: both run as processes of their own.
"""
