"""A local provider that serves a real model and tells the truth, or one named lie.

``variants`` says what can be served, ``weights`` makes the files, ``llamacpp`` runs llama.cpp's server,
``front`` is the HTTP host in front of it, and ``provider`` puts them together. The auditor knows nothing of it.
"""
