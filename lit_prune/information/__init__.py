"""Information of channels, as pure functions: sums in, numbers (nats, float64) out."""
