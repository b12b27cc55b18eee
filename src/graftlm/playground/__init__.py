"""A local web page on which the parts of a composed model write side by side.

turns.py    one thread computes at a time, token by token
sampling.py random numbers of a visitor's own
runs.py     what the models write for one prompt, in threads that end when they are told to
page.py     the page, and what happens when a visitor does something
"""
