"""Load on a running Crossgate, over HTTP only; and `affinity`, a model of many, which alone imports `service`."""
