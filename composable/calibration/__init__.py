"""What the dense model shows on a calibration set: second moments, recorded calls, layer states."""
