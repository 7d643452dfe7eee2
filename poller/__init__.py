"""An asynchronous job-status poller and event bus."""

__version__ = "0.1.0"
