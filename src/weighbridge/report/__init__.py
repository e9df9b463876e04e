"""Reports: the same judgement for machines, for build servers, for a terminal and for a reader. Nothing is computed here."""
