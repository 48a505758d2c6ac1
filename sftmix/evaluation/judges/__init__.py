"""Answers to MT-Bench and AlpacaEval, and a judge that rates them."""
