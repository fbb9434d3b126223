"""What leaving the backbone early costs, measured: audits, calibration, and the paper's tables."""
