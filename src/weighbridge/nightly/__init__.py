"""One night of a fleet: what is due, within which budget, asked all at once and judged together."""
