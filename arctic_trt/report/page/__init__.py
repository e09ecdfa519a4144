"""The report that people look at: a page, its pictures and a model card, drawn from the numbers that other commands left."""
