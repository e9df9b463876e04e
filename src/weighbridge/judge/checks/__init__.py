"""One question a module: a pure function from a case to a finding. Their prose stands in ``checks.toml``."""
