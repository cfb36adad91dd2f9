"""Load on a running Crossgate, over HTTP only: nothing here imports the service."""
