"""Attention over key/value caches: decoding, prefill in chunks, appends in place."""
