"""The commands that make, check and describe datasets; also data_tools/X.py."""
