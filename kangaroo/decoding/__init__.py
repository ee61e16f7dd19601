"""Speculative decoding with one model: shallow layers draft, deep layers verify. Start reading at `speculate.py`."""
