"""Runs beside each other: which may be compared, how they rank, and the page, the table and the pictures made of them."""
