"""The methods of computing attention."""
