"""The commands: each opens its inputs, calls one function of the floors below, and reports."""
