"""Vocoder pools: windows of frames in, samples out. `base` is the contract, `inline` and `ray_pool` keep it."""
