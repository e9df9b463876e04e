"""A local provider that serves a real model and tells the truth, or one named lie.

``variants`` says what can be served, ``weights`` and ``checkpoint`` make the files, ``llamacpp`` runs llama.cpp's
server and ``torch_server`` one of local weights (``sampling`` draws its tokens), ``front`` is the HTTP host in front
of either, and ``provider`` puts them together. The auditor knows nothing of it.
"""
