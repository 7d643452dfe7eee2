"""Simulated vendors: each API from the other side, for the demo and the tests."""
