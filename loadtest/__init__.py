"""Load on a running Crossgate, over HTTP; `affinity`, a model of many; `bench`, which starts it beside its peers."""
