"""Pure rules of the clinical pathway. Standard library only; clock, seed and thresholds are arguments."""
