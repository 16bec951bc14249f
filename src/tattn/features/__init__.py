"""Rows and what is made of them: monomials, bases, scaled channels."""
