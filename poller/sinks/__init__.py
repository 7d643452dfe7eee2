"""Where events go: the protocol of a sink, and one file per broker."""
