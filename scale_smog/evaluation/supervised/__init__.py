"""Evaluations that train a classifier: linear, logistic, fine-tuning."""
