"""Copies that go on while the threads do: cp.async, and the TMA unit with its barriers."""
