"""What is compared: a file per library, whose `MEASURES` a process of its own serves to a case.

A side is imported by the interpreter that has its library: those of other libraries import nothing of nfjax.
"""
