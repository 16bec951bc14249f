"""Polynomials in place of exp, and which of their monomials are kept."""
