"""Judging: observations and a reference in, findings and a verdict out. Pure: nothing here can reach the network."""
