"""Runnable examples of fastbn; installed as ``fastbn.examples``."""
