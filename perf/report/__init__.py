"""What people read: results files turned into figures, pages and sentences.

Nothing here measures. Figures, the HTML page and the log show what was found. diagnosis.py says why
a tile lost, compare.py what changed between two files. tuned_table.py saves the winners, where the
kernels find them.

This room imports `work`, `rows` and `compiler`.
"""
