"""The mathematics: arrays in, arrays out; numpy and scipy only; no input or output."""
