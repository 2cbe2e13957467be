"""Training: the loop, one step, ranks together, evaluation, and what watches over them. Imported late: it loads
torch."""
