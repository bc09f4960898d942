"""Attention over packed documents: arithmetic on one rank, without communication."""
