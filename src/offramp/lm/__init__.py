"""What is done with a language model: probing it, timing it, posteriors of its exits."""
