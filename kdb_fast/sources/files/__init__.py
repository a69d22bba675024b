"""Records of files: CSV and TSV, Parquet, JSON Lines and arrays, compressed or not."""
