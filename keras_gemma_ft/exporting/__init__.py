"""What is made of a tuned model, so that others can load it."""
