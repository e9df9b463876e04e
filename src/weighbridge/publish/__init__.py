"""Trust reports in public: sealed evidence, an append-only log, and a static site made from both and nothing else."""
