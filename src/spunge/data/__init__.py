"""Rows in, parts out: read any source, filter and split it by SQL, select the samples of each part."""
